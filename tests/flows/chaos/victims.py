"""Who is killed, and how a killed server comes back."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from tests.flows.house import House
from tests.stage_processes import is_fork_server, is_stage

Victim = Literal[
    "flow process",
    "worker",
    "flow process and worker",
    "Prefect server",
    "MLflow server",
    "S3 server",
]
VICTIMS: tuple[Victim, ...] = get_args(Victim)
NAMES: dict[Victim, str] = {
    "worker": "worker",
    "flow process and worker": "worker",
    "Prefect server": "prefect",
    "MLflow server": "mlflow",
}
DEATH_SECONDS = 10


@dataclass(frozen=True)
class Dead:
    """What a killed server had been started with."""

    name: str
    command: list[str]
    environment: dict[str, str]
    folder: str


@dataclass
class Rooms:
    """The house, and where its S3 server keeps the number of its process."""

    house: House
    s3_pid: Path

    def kill(self, victim: Victim, run: str) -> list[Dead]:
        """Kill a victim, without a warning; return what must come back."""
        dead, doomed = [], []
        if victim.startswith("flow process"):
            doomed += self.flow_processes(run)
            assert doomed, "the run has no process"
        if victim == "S3 server":
            server = psutil.Process(int(self.s3_pid.read_text()))
            dead.append(_remembered("s3", server))
            doomed.append(server)
        elif name := NAMES.get(victim):
            leader = psutil.Process(self._pids()[name])
            dead.append(_remembered(name, leader))
            # A worker's flows are groups of their own.
            doomed += _group(leader)
        for process in doomed:
            os.kill(process.pid, signal.SIGKILL)
        _await_death(doomed)
        return dead

    def bring_back(self, dead: list[Dead]) -> None:
        """Start again what was killed, as it had been started."""
        for each in dead:
            log = self.house.terminal.home / "logs" / f"{each.name}.log"
            with log.open("ab") as output:
                process = subprocess.Popen(
                    each.command,
                    env=each.environment,
                    cwd=each.folder,
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            if each.name == "s3":  # it goes into the background by itself
                assert process.wait(DEATH_SECONDS) == 0
            else:
                process.returncode = 0  # whoever takes the house down ends it
                self._note(each.name, process.pid)

    def flow_processes(self, run: str) -> list[psutil.Process]:
        """Return the processes of a run, of whatever kind, but for those of its stages."""
        return [
            each
            for each in self._processes_of(run)
            if not is_stage(each) and not is_fork_server(each)
        ]

    def works(self, run: str) -> bool:
        """Return whether a stage of the run has a process at work."""
        return any(map(is_stage, self._processes_of(run)))

    def lives(self, run: str) -> bool:
        """Return whether anything of the run has a process."""
        return bool(self._processes_of(run))

    def _processes_of(self, run: str) -> list[psutil.Process]:
        # Of a process that is not ours there is nothing to see: None.
        return [
            each
            for each in psutil.process_iter(["environ", "status"])
            if (each.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == run
            and each.info["status"] != psutil.STATUS_ZOMBIE
            and each.info["environ"]["STILLROOM_HOME"] == str(self.house.terminal.home)
        ]

    def _pids(self) -> dict[str, int]:
        listed = json.loads((self.house.terminal.home / "services.json").read_text())
        return dict(listed["pids"])

    def _note(self, name: str, pid: int) -> None:
        file = self.house.terminal.home / "services.json"
        listed = json.loads(file.read_text())
        listed["pids"][name] = pid
        file.write_text(json.dumps(listed))


def _remembered(name: str, process: psutil.Process) -> Dead:
    return Dead(name, process.cmdline(), process.environ(), process.cwd())


def _group(leader: psutil.Process) -> list[psutil.Process]:
    return [
        process
        for process in [leader, *leader.children(recursive=True)]
        if os.getpgid(process.pid) == leader.pid
    ]


def _await_death(processes: Iterable[psutil.Process]) -> None:
    deadline = time.monotonic() + DEATH_SECONDS
    for process in processes:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, process
            time.sleep(0.01)
