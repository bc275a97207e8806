"""Which workers STILLROOM_GPUS asks for."""

import pytest

from stillroom.errors import StillroomError
from tasks.servers.gpu_workers import gpu_workers


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        ("", []),
        ("0", ["0"]),
        ("0, 1", ["0", "1"]),
        ("cpu,cpu", ["", ""]),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"]),
    ],
)
def test_a_worker_has_its_gpu_alone(listed: str, devices: list[str]) -> None:
    workers = gpu_workers(listed)
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers] == devices
    assert len({worker.name for worker in workers}) == len(devices)
    for worker in workers:
        command = " ".join(worker.module("pool"))
        assert "--limit 1" in command
        assert "--pool pool" in command


@pytest.mark.parametrize("listed", ["0,0", "all", "0;1", "-1", "0,$(true)"])
def test_what_is_no_gpu(listed: str) -> None:
    with pytest.raises(StillroomError, match="STILLROOM_GPUS: expected numbers or UUIDs"):
        gpu_workers(listed)
