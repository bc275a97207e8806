"""The workers of the GPU pool that `make up` starts: one a GPU, each with that GPU alone."""

import re
from dataclasses import dataclass

from stillroom.errors import StillroomError

# CUDA_VISIBLE_DEVICES takes a GPU's number, or its UUID, or that of a part of one.
_DEVICE = re.compile(r"cpu|\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,80}")


@dataclass(frozen=True)
class GpuWorker:
    """A worker that does one run at a time, for two would share its GPU's memory."""

    name: str
    device: str

    def module(self, pool: str) -> tuple[str, ...]:
        """Return the Python module that it is, with its arguments."""
        return (
            *("prefect", "worker", "start", "--pool", pool, "--type=process"),
            *("--limit", "1", "--name", self.name),
        )

    @property
    def environment(self) -> dict[str, str]:
        """What it has beside the environment of all."""
        device = "" if self.device == "cpu" else self.device
        return {"CUDA_VISIBLE_DEVICES": device}


def gpu_workers(listed: str) -> list[GpuWorker]:
    """Return the workers that STILLROOM_GPUS asks for.

    Raises:
        StillroomError: an entry is no device, or a GPU is there twice.
    """
    devices = [each.strip() for each in listed.split(",") if each.strip()]
    for device in devices:
        if not _DEVICE.fullmatch(device) or (device != "cpu" and devices.count(device) > 1):
            raise StillroomError(
                "STILLROOM_GPUS: expected numbers or UUIDs of GPUs, with commas between, each once,"
                f" or cpu for a worker without one; {device!r} came in {listed!r}"
            )
    return [GpuWorker(f"gpu-worker-{i}", device) for i, device in enumerate(devices)]
