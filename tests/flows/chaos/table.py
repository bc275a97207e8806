"""The table of what happened, for the operator's page."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.flows.chaos.victims import Victim

HEADING = """# kill -9 of each part, in each long stage

Written by `make chaos`. A small recipe was ordered from the server; its store and MLflow's files
lay in an S3 bucket (Ceph). In the middle of a stage a part was killed without a warning; a killed
server or worker came back after 10 seconds. Then the run had two minutes to end in a state that is
true, and the same recipe was ordered once more. Whatever was finished before is the same artifact
afterwards, `store verify` finds nothing wrong, and one version is registered.

| killed | during | the run ended as | seconds after the return | the next order |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Case:
    """Who is killed, and in which stage."""

    victim: Victim
    stage: str


@dataclass(frozen=True)
class Row:
    """What came of a case."""

    case: Case
    state: str
    seconds: float
    cached: int

    def line(self) -> str:
        """Return it as a line of the table."""
        after = f"Completed, {self.cached} stages Cached"
        return (
            f"| {self.case.victim} | {self.case.stage} | {self.state} | {self.seconds:.0f} | "
            f"{after} |"
        )


def write_table(rows: Iterable[Row], file: Path) -> None:
    """Write the rows as a page."""
    file.write_text(HEADING + "\n".join(row.line() for row in rows) + "\n")
