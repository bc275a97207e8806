import pytest

from tasks import stage_code
from tasks.stages import STAGES


def test_no_stage_has_changed_unnoticed() -> None:
    changed = stage_code.changed_stages(stage_code.read_recorded())
    assert not changed, (
        f"the code of {', '.join(changed)} is not the recorded one: raise the version in "
        "tasks/stages.py if results change, then run `python -m tasks.stage_code --record`, or "
        '`python -m tasks.stage_code --waive "why the results stay the same"`'
    )


def test_code_of_another_version_needs_no_waiver_and_drops_old_ones() -> None:
    old = {s.name: {"version": s.version - 1, "code": "x", "waivers": ["y"]} for s in STAGES}
    fresh = stage_code.record(old, None)
    assert all(entry["waivers"] == [] for entry in fresh.values())
    assert stage_code.changed_stages(fresh) == []


def test_code_of_the_same_version_needs_a_waiver() -> None:
    old = {s.name: {"version": s.version, "code": "x", "waivers": []} for s in STAGES}
    with pytest.raises(SystemExit):
        stage_code.record(old, None)
    fresh = stage_code.record(old, "only renamed")
    assert all(entry["waivers"] == ["only renamed"] for entry in fresh.values())


def test_a_stage_rests_on_its_library_code() -> None:
    quantize = stage_code._closure("tasks.work.quantize_model")
    assert "stillroom.quantization.gptq" in quantize
    assert "stillroom.distillation.distill" not in quantize
