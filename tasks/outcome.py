"""What a compress flow hands back: small, and enough to say where everything is."""

from dataclasses import dataclass


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
