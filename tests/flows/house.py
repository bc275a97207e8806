"""What `make up` starts, asked as a browser or a script would ask it."""

import copy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.flows.terminal import ROOT, Terminal
from tests.servers import free_port

OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
RUN_SECONDS = 180
UP_SECONDS = 240
BUSY_SECONDS = 20
# Many small portions of work: a kill lands in the middle of them.
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "teacher": {"source": "teacher"},
    "data": {
        "train": {"source": "text.jsonl"},
        "sequence_length": 32,
        "max_train_tokens": 8192,
        "max_evaluation_tokens": 512,
        "calibration_rows": 64,
    },
    "distillation": {
        "student": {"layers": 6},
        "cache": {"rows_per_shard": 2},
        "training": {"batch_rows": 2, "checkpoint_every_steps": 4, "learning_rate": 0.001},
    },
    "quantization": {"bits": 4, "group_size": 32},
    "evaluation": {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 2},
    "publish": {"name": "tiny"},
    "execution": {"threads": 1},
}
STAGES = [
    "import teacher",
    "prepare data",
    "cache teacher",
    "distil student",
    "quantize",
    "evaluate teacher",
    "evaluate student",
    "evaluate quantized student",
    "prepare data law",
    "train adapter law",
    "evaluate quantized student on law",
    "evaluate quantized student + law on law",
]
SHORT = [
    "import teacher",
    "prepare data",
    "quantize",
    "evaluate teacher",
    "evaluate quantized teacher",
]


@dataclass
class House:
    """A terminal in which `python -m flows up` was typed, and what it said of the servers."""

    terminal: Terminal
    prefect: str
    mlflow: str
    login: tuple[str, str] | None = None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = patiently(method, f"{self.prefect}/api{path}", body, self.login)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def ask_mlflow(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        url = f"{self.mlflow}/api/2.0/mlflow{path}"
        answer = httpx.request(method, url, json=body, params=query, auth=self.login, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def python(self, *arguments: str, seconds: float = 60) -> str:
        """Run Python with Prefect's address, as a user beside the servers, and return its words."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=self.terminal.environment()
            | {
                "PREFECT_API_URL": f"{self.prefect}/api",
                "PREFECT_HOME": str(self.terminal.folder / "prefect"),
                "DO_NOT_TRACK": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def deployment(self) -> dict[str, Any]:
        return self.deployment_of("compress")

    def deployment_of(self, name: str) -> dict[str, Any]:
        """Return a deployment that is named as its flow is."""
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/{name}/{name}")
        return found

    def order(self, recipe: dict[str, Any]) -> httpx.Response:
        """Ask for a run, as the form in the browser does."""
        return self.order_of("compress/compress", {"recipe": recipe})

    def order_of(self, deployment: str, parameters: dict[str, Any]) -> httpx.Response:
        """Ask for a run of any deployment."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        url = f"{self.prefect}/api/deployments/{found['id']}/create_flow_run"
        return patiently("POST", url, {"parameters": parameters}, self.login)

    def artifacts(self, flow_run: str, kind: str) -> list[dict[str, Any]]:
        """Return what a run has left of one type: table, markdown, link or progress."""
        of_run = {
            "flow_runs": {"id": {"any_": [flow_run]}},
            "artifacts": {"type": {"any_": [kind]}},
        }
        found: list[dict[str, Any]] = self.ask("POST", "/artifacts/filter", of_run)
        return found

    def await_end(self, flow_run: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            run: dict[str, Any] = self.ask("GET", f"/flow_runs/{flow_run}")
            if run["state"]["type"] in OVER:
                return run
            assert time.monotonic() < deadline, f"{run['state']}\n{self.log('worker')}"
            time.sleep(0.5)

    def make(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Order a run, and return it once it is done."""
        return self.done(self.ordered(recipe))

    def ordered(self, recipe: dict[str, Any]) -> str:
        """Order a run, and return its id."""
        answer = self.order(recipe)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def done(self, flow_run: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Return a run once it has ended well."""
        run = self.await_end(flow_run, seconds)
        assert run["state"]["name"] == "Completed", f"{run['state']}\n{self.log('worker')}"
        return run

    def states(self, flow_run: str) -> dict[str, str]:
        """Return the name of each task run's state."""
        of_run = {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 200}
        return {
            run["name"]: run["state_name"] for run in self.ask("POST", "/task_runs/filter", of_run)
        }

    def log(self, name: str) -> str:
        return (self.terminal.home / "logs" / f"{name}.log").read_text()[-3000:]


def patiently(
    method: str, url: str, body: Any = None, login: tuple[str, str] | None = None
) -> httpx.Response:
    """Ask once more where Prefect's database was busy: it says so, and its own client asks too."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        answer = httpx.request(method, url, json=body, auth=login, timeout=60)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
            return answer
        time.sleep(0.5)


def small_recipe(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the recipe with as little work as possible, with an adapter, its files in `folder`."""
    small = copy.deepcopy(recipe)
    small["teacher"]["source"] = str(folder / "teacher")
    data = small["data"]
    data["train"]["source"] = str(folder / "text.jsonl")
    data |= {"max_train_tokens": 1024, "max_evaluation_tokens": 256, "calibration_rows": 4}
    small["distillation"] = {
        "student": {"layers": 2},
        "training": {"steps": 4, "checkpoint_every_steps": 2, "evaluate_every_steps": 2},
    }
    small["adapters"] = [
        {
            "name": "law",
            "rank": 2,
            "data": copy.deepcopy(data) | {"max_train_tokens": 512},
            "training": {"steps": 2},
        }
    ]
    return small


def short_recipe(parts: Path) -> dict[str, Any]:
    """Return the small recipe without a student and an adapter."""
    recipe = small_recipe(RECIPE, parts)
    return {name: recipe[name] for name in recipe if name not in ("distillation", "adapters")}


def write_settings(terminal: Terminal, text: str, mode: int = 0o600) -> Path:
    terminal.home.mkdir(exist_ok=True)
    path = terminal.home / "settings.env"
    path.write_text(text)
    path.chmod(mode)
    return path


def open_house(folder: Path) -> Terminal:
    """Return a terminal whose servers will have ports of their own."""
    ports = {f"STILLROOM_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    return Terminal(folder, {"STILLROOM_HOME": str(folder / "home"), **ports})


def start(terminal: Terminal, login: tuple[str, str] | None = None) -> House:
    done = terminal.type("up", seconds=UP_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    host = terminal.variables.get("STILLROOM_HOST", "127.0.0.1")
    prefect, mlflow = (
        f"http://{host}:{terminal.variables[f'STILLROOM_{name}_PORT']}"
        for name in ("PREFECT", "MLFLOW")
    )
    assert prefect in done.stdout
    assert mlflow in done.stdout
    return House(terminal, prefect, mlflow, login)


def processes_of(home: Path) -> list[str]:
    """Return the command lines of all processes that run for a home."""
    # Of a process that is not ours there is nothing to see: None.
    seen = [process.info for process in psutil.process_iter(["environ", "cmdline"])]
    return [
        " ".join(each["cmdline"] or ())
        for each in seen
        if (each["environ"] or {}).get("STILLROOM_HOME") == str(home)
    ]
