"""A claim of a benchmark: a sentence, its bound, and what was measured."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances


@dataclass(frozen=True)
class Claim:
    """A sentence, the bound in it, and whether what was measured is within."""

    claim: str
    bound: float
    measured: float
    standard_error: float | None
    holds: bool

    def as_json(self) -> dict[str, Any]:
        """Return it as results.json has it."""
        return asdict(self)


def at_most(claim: str, bound: float, measured: float, error: float | None = None) -> Claim:
    """Return a claim that holds if `measured` is no more than `bound`."""
    return Claim(claim, bound, measured, error, measured <= bound)


def at_least(claim: str, bound: float, measured: float, error: float | None = None) -> Claim:
    """Return a claim that holds if `measured` is no less than `bound`."""
    return Claim(claim, bound, measured, error, measured >= bound)


def claims_table(claims: Iterable[Claim]) -> str:
    """Return the claims as a Markdown table."""
    lines = ["| holds | claim | bound | measured |", "|---|---|---|---|"]
    for claim in claims:
        error = claim.standard_error
        measured = f"{claim.measured:.4g}" + ("" if error is None else f" ± {error:.2g}")
        verdict = "yes" if claim.holds else "**no**"
        lines.append(f"| {verdict} | {claim.claim} | {claim.bound:.4g} | {measured} |")
    return "\n".join(lines)


def print_claims(claims: Iterable[Claim]) -> None:
    """Print each claim with its bound and what was measured."""
    for claim in claims:
        error = "" if claim.standard_error is None else f" ± {claim.standard_error:.4g}"
        verdict = "holds" if claim.holds else "FAILS"
        print(f"{verdict}  {claim.claim}: {claim.measured:.4g}{error} (bound {claim.bound:.4g})")


def write_measure(path: Path, claims: list[Claim], **more: Any) -> None:
    """Keep a measurement with its claims as JSON; the report picks it up from its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [claim.as_json() for claim in claims]
    found = more | {"circumstances": circumstances(), "claims": kept}
    path.write_text(json.dumps(found, indent=1) + "\n")
