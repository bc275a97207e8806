"""Where things are: read from the environment when asked, with defaults that need no server."""

import json
import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from stillroom.errors import StoreError

QUIET_SERVICES = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class Settings(BaseSettings):
    """Each field is an environment variable: STILLROOM_HOME, STILLROOM_STORE and so on."""

    model_config = SettingsConfigDict(env_prefix="STILLROOM_", frozen=True)

    home: Path = Path(".stillroom")
    """Folder for everything that is made without a server."""
    store: str = ""
    """file:///folder or s3://bucket/prefix of the artifacts; empty: the folder store in home."""
    mlflow_tracking_uri: str = Field(default="", validation_alias="MLFLOW_TRACKING_URI")
    """MLflow server or database; empty: the server of `make up`, else a SQLite file in home."""
    mlflow_artifacts: str = ""
    """Where MLflow keeps files, such as s3://bucket/mlflow; empty: beside the store."""
    data_roots: str = ""
    """Folders, with colons between, below which recipes that come through the server read."""
    s3_sources: str = ""
    """Places such as s3://bucket/prefix, with spaces between, below which they read too."""
    allow_remote_code: bool = False
    """Whether such recipes may have a model's own code run: `teacher.trust_remote_code`."""
    gpus: str = ""
    """GPUs that `make up` starts a worker for each, such as 0,1; cpu: a worker without a GPU."""
    recipes: Path = Path(__file__).parents[1] / "deployments" / "recipes"
    """Folder of the recipes that are ordered by name: files of the operator's own."""
    progress_seconds: float = Field(default=5.0, ge=0)
    """How often a long stage tells Prefect how far it is; each time is a request to the server."""
    scratch: Path | None = None
    """Folder for work in progress; absent: scratch in home."""

    @property
    def root(self) -> Path:
        """The home as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def store_url(self) -> str:
        """The artifact store's URL."""
        return self.store or (self.root / "store").as_uri()

    @property
    def tracking_uri(self) -> str:
        """MLflow's address: as set, of the running server of this home, or the SQLite file."""
        own = f"sqlite:///{self.root / 'mlflow.db'}"
        return self.mlflow_tracking_uri or self.services().get("mlflow", own)

    @property
    def artifact_location(self) -> str:
        """Where MLflow's clients put files directly."""
        if self.mlflow_artifacts:
            return self.mlflow_artifacts
        if self.store_url.startswith("s3://"):
            return f"{self.store_url}/mlflow"
        return (self.root / "mlflow-artifacts").as_uri()

    @property
    def scratch_root(self) -> Path:
        """Folder for work in progress."""
        return (self.scratch or self.root / "scratch").absolute()

    @property
    def services_file(self) -> Path:
        """Where `make up` writes down what it started."""
        return self.root / "services.json"

    def services(self) -> dict[str, str]:
        """Return the addresses of the servers that `make up` started here, if all of them run."""
        try:
            listed = json.loads(self.services_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # the latter: being written just now
            return {}
        runs = listed["ready"] and all(is_of(pid, self.root) for pid in listed["pids"].values())
        services: dict[str, str] = listed["services"] if runs else {}
        return services

    def environment(self) -> dict[str, str]:
        """Return the variables under which Prefect and MLflow stay at home, and say nothing."""
        server = self.services().get("prefect")
        # Prefect's own server does not make the folder that its database is to lie in.
        try:
            (self.root / "prefect").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.root} cannot be written: {error.strerror}; set STILLROOM_HOME to a folder "
                "that can"
            ) from error
        here = {"PREFECT_HOME": str(self.root / "prefect"), **QUIET_SERVICES}
        if server:
            here["PREFECT_API_URL"] = server
        return {name: value for name, value in here.items() if name not in os.environ}


def is_of(pid: int, home: Path) -> bool:
    """Return whether a process runs for this home; not so a later one that got its number."""
    import psutil

    try:
        environment: dict[str, str] = psutil.Process(pid).environ()
    except psutil.Error:  # gone, ended and not yet collected, or someone else's
        return False
    return environment.get("STILLROOM_HOME") == str(home)
