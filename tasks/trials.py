"""What flow and stages share of a search: its plan, and the names of its files."""

from typing import Any

from stillroom.intrinsic_dimension.search import Search

RESULT = "intrinsic_dimension.json"
PLOT = "curve.png"


def search_of(section: dict[str, Any], task: str, seed: int) -> Search:
    """Return the search that a recipe's section describes, its seeds counted from `seed`."""
    return Search(
        min_dimension=section["min_dimension"],
        max_dimension=section["max_dimension"],
        grid_points=section["grid_points"],
        tolerance=section["tolerance"],
        seeds=tuple(range(seed, seed + section["seeds"])),
        share=section["share"],
        from_untrained=task != "sequence_classification",
    )
