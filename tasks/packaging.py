"""The small files of a registered version: its code, requirements, signature and MLmodel.

The weights are not copied: they are uploaded from where they lie, beside what is made here.
"""

import importlib.metadata
import threading
import warnings
from pathlib import Path
from typing import Any

import stillroom
from stillroom.contents import LISTING, Contents
from stillroom.serving import CODE, DEFAULT_NEW_TOKENS, MASK
from stillroom.serving_options import DEFAULT_CONFIG

REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "llvmlite", "numpy", "pandas")
EXAMPLE_TEXT = "Once upon a time"

# MLflow runs a model's code with a stand-in in sys.modules, takes the model from a global, and puts
# both back: of two threads at once one finds the other's, and the stand-in stays for good.
_ONE_AT_A_TIME = threading.Lock()


def write_package(folder: Path, contents: Contents, model: Any, run_id: str) -> None:
    """Write into `folder` everything of a registered version but the model's own files.

    Args:
        folder: does not exist yet.
        contents: what the version holds; it goes along as stillroom.json.
        model: the LoggedModel it is written for.
        run_id: run that made it.
    """
    with warnings.catch_warnings():
        # MLflow's own type hints make it warn on import.
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc
    from mlflow.models import Model

    code = folder.with_name("served_model.py")
    code.write_text(CODE)
    description = Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        run_id=run_id,
        model_id=model.model_id,
    )
    example = f"{EXAMPLE_TEXT} {MASK}" if contents.task == "masked_lm" else EXAMPLE_TEXT
    with _ONE_AT_A_TIME:
        mlflow.pyfunc.save_model(
            folder,
            mlflow_model=description,
            python_model=code,
            code_paths=[str(Path(stillroom.__file__).parent)],
            model_config=DEFAULT_CONFIG,
            signature=_signature(contents.task),
            input_example=[example],
            pip_requirements=requirements(),
        )
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / LISTING).write_text(contents.to_json())
    # What `save_model(artifacts=…)` writes, without its copy of the weights.
    description.flavors["python_function"]["artifacts"] = {
        name: {"path": path, "uri": path}
        for name, path in (("model", "artifacts/model"), ("contents", f"artifacts/{LISTING}"))
    }
    description.model_size_bytes = sum(file.size for file in contents.files)
    description.save(folder / "MLmodel")


def requirements() -> list[str]:
    """Return what a machine needs to load a version, pinned to what is installed here."""
    # A build's mark such as +cpu names no release that an index would have.
    versions = {name: importlib.metadata.version(name) for name in REQUIREMENTS}
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]


def _signature(task: str) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    # Without a name, so that a list of texts will do as well as a table with a column `text`.
    inputs = Schema([ColSpec(DataType.string)])
    if task == "sequence_classification":
        outputs = Schema(
            [
                ColSpec(DataType.string, "label"),
                ColSpec(DataType.double, "score"),
                ColSpec(Array(DataType.double), "scores"),
            ]
        )
        return ModelSignature(inputs=inputs, outputs=outputs)
    if task == "masked_lm":
        outputs = Schema(
            [
                ColSpec(DataType.string, "filled"),
                ColSpec(Array(DataType.string), "words"),
                ColSpec(Array(DataType.double), "scores"),
            ]
        )
        return ModelSignature(inputs=inputs, outputs=outputs)
    outputs = Schema([ColSpec(DataType.string, "generated")])
    params = ParamSchema([ParamSpec("max_new_tokens", DataType.long, DEFAULT_NEW_TOKENS)])
    return ModelSignature(inputs=inputs, outputs=outputs, params=params)
