"""What a compress flow hands back: small, and enough to say where everything is."""

from dataclasses import dataclass
from typing import Literal

Approval = Literal["not asked", "pending", "approved", "refused"]


@dataclass(frozen=True)
class Outcome:
    """The end of a run, for the terminal and for whoever called the flow."""

    summary: str
    gates_passed: bool
    table: str
    gates: tuple[str, ...]
    versions: tuple[str, ...]
    report: str
    mlflow: str
    page: str = ""
    """Table and gates as Markdown."""
    approval: Approval = "not asked"
    to_approve: str = ""
    """Reference that `python -m flows approve` takes where the answer is pending or refused."""
