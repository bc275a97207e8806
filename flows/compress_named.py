"""Make what a recipe of the operator's own says: whoever orders the run knows only its name."""

from prefect import flow
from prefect.client.schemas.objects import State

from flows.compress import judged, make
from flows.plan import resolver
from tasks.explain import concluded
from tasks.named import RecipeName, load_named
from tasks.outcome import Outcome
from tasks.settings import Settings


@flow(name="compress-named", flow_run_name="{recipe_name}", persist_result=False)
def compress_named(recipe_name: RecipeName, changes: tuple[str, ...] = ()) -> "State[Outcome]":
    """Make a small model by a recipe in the worker's folder of recipes.

    Args:
        recipe_name: name of the file, without its .yaml.
        changes: values to change, such as quantization.bits=3; a source that is changed must be
            one that recipes through the server may read.
    """
    return concluded(recipe_name, lambda: judged(_make(recipe_name, changes)))


def _make(name: str, changes: tuple[str, ...]) -> Outcome:
    folder = Settings().recipes
    own = load_named(name, folder)
    return make(load_named(name, folder, changes), resolver(own))
