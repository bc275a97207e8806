"""What the benchmark must show, as claims about its rows. What was not measured is not claimed."""

from collections import defaultdict
from statistics import median
from typing import Any

from benchmarks.claims import Claim, at_most
from benchmarks.comparison import Estimate, paired_difference, paired_ratio
from benchmarks.quantization.work import DRAWS

Rows = list[dict[str, Any]]
WITHOUT_TEXT = ("stillroom-rtn", "bitsandbytes-default")
RATIOS = {4: 0.55, 3: 0.45}  # of GPTQModel's defaults, by bits


def quality_claims(rows: Rows) -> list[Claim]:
    """Return the claims on KL, for each setting and peer that was measured beside ours.

    A peer that ran on all blocks is compared on those, one that did not on the first few.
    """
    tables = _tables(rows)
    deepest: dict[tuple[str, tuple[Any, ...]], int] = {}
    for name, (*grid, blocks) in tables:
        if ("stillroom-default", (*grid, blocks)) in tables:
            key = (name, tuple(grid))
            deepest[key] = max(blocks, deepest.get(key, 0))
    claims: list[Claim] = []
    for setting in dict.fromkeys(setting for _, setting in tables):
        ours = tables.get(("stillroom-default", setting))
        peers = {
            name: each
            for (name, at), each in tables.items()
            if at == setting and deepest.get((name, setting[:-1])) == setting[-1]
        }
        peers.pop("stillroom-default", None)
        if ours is None:
            continue
        for name, theirs in sorted(peers.items()):
            claims.append(_below(name, setting, *_shared(ours, theirs)))
        claims += _ratio_claims(setting, ours, peers)
    return claims


def speed_claims(rows: Rows, floor: float) -> list[Claim]:
    """Return the claims on CPU seconds; `floor` is in CPU seconds, at the timed rows' blocks."""
    timed: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["repeat"] is not None:
            timed[_name(row), row.get("instructions", "native")].append(row["cpu_seconds"])
    seconds = {name: median(each) for name, each in timed.items()}
    claims: list[Claim] = []
    for instructions, words in (("native", ""), ("avx2", " where all use AVX2")):
        plain = seconds.get(("stillroom-plain", instructions))
        default = seconds.get(("stillroom-default", instructions))
        for peer, share in (("gptqmodel-default", 1 / 5), ("llmcompressor-default", 1 / 3)):
            theirs = seconds.get((peer, instructions))
            if theirs and plain:
                part = f"1/{round(1 / share)}"
                text = f"plain GPTQ takes at most {part} of {peer}'s CPU seconds{words}"
                claims.append(at_most(text, share, plain / theirs))
            if theirs and default:
                text = f"the default takes fewer CPU seconds than {peer}{words}"
                claims.append(at_most(text, 1.0, default / theirs))
        if plain:
            text = f"plain GPTQ takes at most 1.5 times the fp32 floor's CPU seconds{words}"
            claims.append(at_most(text, 1.5, plain / floor))
    return claims


def _below(peer: str, setting: tuple[Any, ...], ours: Any, theirs: Any) -> Claim:
    difference = paired_difference(ours, theirs)
    text = f"{_words(setting)}: KL below {peer}'s by more than two paired standard errors"
    # In units of the error, so that the bound is the sentence's.
    bound = -2 * difference.standard_error
    return Claim(text, bound, difference.value, difference.standard_error, difference.value < bound)


def _ratio_claims(setting: tuple[Any, ...], ours: Any, peers: dict[str, Any]) -> list[Claim]:
    bits, words = setting[0], _words(setting)
    claims: list[Claim] = []
    if "gptqmodel-default" in peers:
        ratio = paired_ratio(*_shared(ours, peers["gptqmodel-default"]))
        text = f"{words}: KL at most {RATIOS[bits]} of GPTQModel's defaults"
        claims.append(_at_most(text, RATIOS[bits], ratio))
    best = {name: each for name, each in peers.items() if name.endswith("-best")}
    if bits == 3 and best:
        ratios = {name: paired_ratio(*_shared(ours, each)) for name, each in best.items()}
        name = max(ratios, key=lambda each: ratios[each].value)
        text = f"{words}: KL at most 0.7 of the best peer at its best options ({name})"
        claims.append(_at_most(text, 0.7, ratios[name]))
    return claims


def _at_most(text: str, bound: float, estimate: Estimate) -> Claim:
    return at_most(text, bound, estimate.value, estimate.standard_error)


def _tables(rows: Rows) -> dict[tuple[str, tuple[Any, ...]], dict[int, list[float]]]:
    """Return KL a token of each test row, by method and setting, then by draw."""
    tables: dict[tuple[str, tuple[Any, ...]], dict[int, list[float]]] = defaultdict(dict)
    for row in rows:
        if row["repeat"] is None:
            setting = (row["bits"], row["group_size"], row["symmetric"], row["blocks"])
            values = [each / row["tokens"] for each in row["row_kl"]]
            # What needs no text is the same on every draw.
            draws = range(DRAWS) if _name(row) in WITHOUT_TEXT else [row["draw"]]
            tables[_name(row), setting] |= dict.fromkeys(draws, values)
    return dict(tables)


def _shared(ours: dict[int, Any], theirs: dict[int, Any]) -> tuple[list[Any], list[Any]]:
    """Return both on the draws that both have."""
    draws = sorted(ours.keys() & theirs.keys())
    return [ours[draw] for draw in draws], [theirs[draw] for draw in draws]


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']}-{row['variant']}"


def _words(setting: tuple[Any, ...]) -> str:
    bits, group, symmetric, blocks = setting
    grid = "per channel" if group == -1 else f"group {group}"
    return f"{bits}-bit, {grid}, {'symmetric' if symmetric else 'asymmetric'}, {blocks} blocks"
