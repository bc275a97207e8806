"""What a recipe may say. `Recipe` is the whole; each stage has a section of its own."""

from stillroom.config.adapters import Adapter, Merge
from stillroom.config.distillation import Cache, Distillation, Student
from stillroom.config.intrinsic_dimension import DimensionSearch, IntrinsicDimension
from stillroom.config.loading import dump_recipe, load_dimension_recipe, load_recipe, validate
from stillroom.config.quantization import Quantization
from stillroom.config.recipe import BASE_TEXT, Recipe
from stillroom.config.section import Section
from stillroom.config.sections import (
    Data,
    Evaluation,
    Execution,
    Gates,
    Model,
    Publish,
    Text,
)
from stillroom.config.training import Training

__all__ = [
    "BASE_TEXT",
    "Adapter",
    "Cache",
    "Data",
    "DimensionSearch",
    "Distillation",
    "Evaluation",
    "Execution",
    "Gates",
    "IntrinsicDimension",
    "Merge",
    "Model",
    "Publish",
    "Quantization",
    "Recipe",
    "Section",
    "Student",
    "Text",
    "Training",
    "dump_recipe",
    "load_dimension_recipe",
    "load_recipe",
    "validate",
]
