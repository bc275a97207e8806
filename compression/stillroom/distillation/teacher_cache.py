"""Run the teacher once over all rows and keep, on disk, what it said at each position."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.numpy import save_file
from torch import nn

from stillroom.checkpoint import Checkpoints, NoCheckpoints
from stillroom.data.examples import Examples
from stillroom.distillation.cache_files import (
    CacheFacts,
    CacheKind,
    TeacherCache,
    tensor_file,
    write_facts,
)
from stillroom.distillation.capture_plan import CacheOptions, CapturePlan
from stillroom.distillation.teacher_outputs import piece_arrays
from stillroom.memory import keeping_free_memory
from stillroom.progress import Progress, silent
from stillroom.training.state import require_same

__all__ = [
    "CacheFacts",
    "CacheKind",
    "CacheOptions",
    "CapturePlan",
    "TeacherCache",
    "capture",
    "capture_pieces",
    "gather",
]

SEAL = "seal.json"


def capture(
    teacher: nn.Module,
    examples: Examples,
    folder: Path,
    options: CacheOptions,
    *,
    tokenizer_hash: str,
    fingerprint: str = "",
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
) -> TeacherCache:
    """Write the teacher's targets of all rows into `folder`, and return their reader.

    A finished shard is a checkpoint piece shard-00003: a rerun loads it instead of computing it,
    and the folder has the same bytes as after an uninterrupted run. `tokenizer_hash` is the
    teacher's own, `fingerprint` names the teacher. Classifiers are kept "dense", one row of logits
    a row, whatever the kind. Of a masked language model, whose rows' labels are not shifted,
    position t is the distribution of token t itself.

    Raises:
        DataError: there is no row.
        MismatchError: the rows were made with another tokenizer; a checkpoint is of other work.
        NotFiniteError: the teacher's logits are NaN or infinite.
    """
    plan = CapturePlan(examples, options, tokenizer_hash, fingerprint)
    kept = checkpoints or NoCheckpoints()
    return gather(plan, folder, kept, lambda: teacher, progress=progress)


def capture_pieces(
    teacher: nn.Module,
    plan: CapturePlan,
    names: Iterable[str],
    checkpoints: Checkpoints,
    *,
    made: Callable[[str], None] = lambda name: None,
) -> None:
    """Ask the teacher for the pieces `names`, in their order, and keep each among `checkpoints`.

    `made` is told of each. Any process can make any piece of a plan, and makes the same bytes;
    `names` may be drawn as the work goes, so that several share it.

    Raises:
        NotFiniteError: the teacher's logits are NaN or infinite.
    """
    with keeping_free_memory():
        for name in names:
            with tempfile.TemporaryDirectory() as temporary:
                _make(teacher, plan, name, Path(temporary), checkpoints)
            made(name)


def gather(
    plan: CapturePlan,
    folder: Path,
    checkpoints: Checkpoints,
    teacher: Callable[[], nn.Module],
    *,
    progress: Progress = silent,
) -> TeacherCache:
    """Write the cache into `folder` out of its pieces, and return its reader.

    `teacher()` is asked for the pieces that `checkpoints` do not hold; where none is missing it is
    never called.

    Raises:
        MismatchError: a piece is of other work.
        NotFiniteError: the teacher's logits are NaN or infinite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loaded = functools.cache(teacher)
    done = set(checkpoints.names())
    facts = None
    with keeping_free_memory():
        for name, rows in plan.pieces.items():
            with tempfile.TemporaryDirectory() as temporary:
                piece = Path(temporary)
                if name in done:
                    checkpoints.load(name, piece)
                else:
                    _make(loaded(), plan, name, piece, checkpoints)
                facts = _place(piece, name, plan, facts)
                shutil.move(piece / tensor_file(name), folder / tensor_file(name))
            progress(rows.stop, len(plan.examples), "rows")
    assert facts is not None, "a plan has at least one piece"
    write_facts(folder, facts, list(plan.pieces))
    return TeacherCache.open(folder)


def _make(
    teacher: nn.Module, plan: CapturePlan, name: str, piece: Path, checkpoints: Checkpoints
) -> None:
    arrays, facts = piece_arrays(teacher, plan, name)
    save_file(arrays, piece / tensor_file(name))
    (piece / SEAL).write_text(json.dumps(plan.seal(name, facts), sort_keys=True))
    checkpoints.save(name, piece)


def _place(piece: Path, name: str, plan: CapturePlan, facts: CacheFacts | None) -> CacheFacts:
    """Return the cache's facts, by the first piece's seal, and refuse a piece of other work."""
    seal = json.loads((piece / SEAL).read_text())
    # The plan does not know how wide the teacher's outputs are: the first piece tells.
    facts = facts or plan.facts(seal.get("vocabulary", 0), seal.get("hidden_size", 0))
    require_same(name, seal, plan.seal(name, facts))
    return facts
