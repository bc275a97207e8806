"""Where things are, and who may reach them: read from the environment and one file when asked.

The defaults need no server.
"""

import ipaddress
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from stillroom.errors import SettingsError, StoreError
from tasks.settings_file import SettingsFile, refusal

QUIET_SERVICES = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
SHORTEST_PASSWORD = 12
"""Characters; MLflow takes none that is shorter."""
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """Each field is a variable: STILLROOM_HOME, STILLROOM_STORE and so on.

    What the environment does not say may stand in a file, settings.env in the home or where
    STILLROOM_SETTINGS points; a file with secrets must be its owner's alone.
    """

    model_config = SettingsConfigDict(
        env_prefix="STILLROOM_", env_ignore_empty=True, frozen=True, hide_input_in_errors=True
    )

    home: Path = Path(".stillroom")
    """Folder for everything that is made without a server."""
    store: str = ""
    """file:///folder or s3://bucket/prefix of the artifacts; empty: the folder store in home."""
    mlflow_tracking_uri: str = Field(default="", validation_alias="MLFLOW_TRACKING_URI")
    """MLflow server or database; empty: the server of `make up`, else a SQLite file in home."""
    mlflow_artifacts: str = ""
    """Where MLflow keeps files, such as s3://bucket/mlflow; empty: mlflow-artifacts in home, or
    below the address of a store on S3, mlflow."""
    data_roots: str = ""
    """Folders, with colons between, below which recipes that come through the server read."""
    s3_sources: str = ""
    """Places such as s3://bucket/prefix, with spaces between, below which they read too."""
    allow_remote_code: bool = False
    """Whether such recipes may have a model's own code run: `teacher.trust_remote_code`."""
    runs_at_once: int = Field(default=4, ge=1)
    """How many runs go on at once in the default queue of `make up`; the others wait. Many at once
    want PostgreSQL: with twenty, Prefect's server has hung over its SQLite file."""
    gpus: str = ""
    """GPUs that `make up` starts a worker for each, such as 0,1; cpu: a worker without a GPU."""
    recipes: Path = Path(__file__).parents[1] / "deployments" / "recipes"
    """Folder of the recipes that are ordered by name: files of the operator's own."""
    progress_seconds: float = Field(default=5.0, ge=0)
    """How often a long stage tells Prefect how far it is; each time is a request to the server."""
    scratch: Path | None = None
    """Folder for work in progress; absent: scratch in home."""

    host: str = "127.0.0.1"
    """Address to which `make up` binds the servers; others than loopback need a password."""
    prefect_port: Port = 4200
    """Port of Prefect's server."""
    mlflow_port: Port = 5000
    """Port of MLflow's server."""
    user: Annotated[str, Field(pattern=r"^[^:\s]+$")] = "stillroom"
    """Name to log in with at both servers."""
    password: SecretStr | None = None
    """Password of both servers, 12 characters or more; absent: they ask for none."""
    cors_origins: str = ""
    """Web pages, such as https://portal.example.org, whose scripts may call the servers: with
    spaces between."""
    allowed_hosts: str = ""
    """Names besides loopback's, such as gpu-box, under which MLflow is called: with spaces
    between."""
    prefect_database: SecretStr | None = None
    """postgresql+asyncpg://user:password@host/name; absent: a SQLite file in home."""
    mlflow_database: SecretStr | None = None
    """postgresql+psycopg2://user:password@host/name; absent: a SQLite file in home."""

    def __init__(self, **values: Any) -> None:
        """Read the settings.

        Raises:
            SettingsError: one of them is not what it must be, or the file is not safe.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(refusal(error, type(self))) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Have the environment come before the file."""
        return init_settings, env_settings, SettingsFile(settings_cls)

    @field_validator("password")
    @classmethod
    def _long_enough(cls, password: SecretStr | None) -> SecretStr | None:
        text = password.get_secret_value() if password else None
        if text is not None and (len(text) < SHORTEST_PASSWORD or not text.isprintable()):
            raise ValueError(
                f"expected at least {SHORTEST_PASSWORD} characters that can be printed, "
                f"{len(text)} came"
            )
        return password

    @field_validator("prefect_database", "mlflow_database")
    @classmethod
    def _known_driver(cls, url: SecretStr | None, field: Any) -> SecretStr | None:
        driver = {"prefect_database": "asyncpg", "mlflow_database": "psycopg2"}[field.field_name]
        if url is not None and not url.get_secret_value().startswith(f"postgresql+{driver}://"):
            raise ValueError(f"expected postgresql+{driver}://user:password@host/name")
        return url

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
        """MLflow's address: as set, of the running server of this home, or its database."""
        return self.mlflow_tracking_uri or self.services().get("mlflow", self.mlflow_store)

    @property
    def mlflow_store(self) -> str:
        """The address of the database that MLflow keeps its records in; it may hold a password."""
        if self.mlflow_database is not None:
            return self.mlflow_database.get_secret_value()
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password of both servers, if they have any."""
        return (self.user, self.password.get_secret_value()) if self.password else None

    @property
    def is_loopback(self) -> bool:
        """Whether the servers can be reached from this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def near_host(self) -> str:
        """The servers' host as this machine calls it, ready for an address."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host
        if address.is_unspecified:
            return "127.0.0.1" if address.version == 4 else "[::1]"
        return self.host if address.version == 4 else f"[{self.host}]"

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
        """Return the variables under which Prefect and MLflow stay at home, and say nothing.

        They hold the login of the servers, and the database where no server is called.
        """
        server = self.services().get("prefect")
        # Prefect's own server does not make the folder that its database is to lie in.
        try:
            (self.root / "prefect").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.root} cannot be written: {error.strerror}; set STILLROOM_HOME to a folder "
                "that can"
            ) from error
        here = {"PREFECT_HOME": str(self.root / "prefect"), **QUIET_SERVICES, **self.logins()}
        # Its own server's first start takes longer than Prefect's 20 s where the machine is busy.
        here["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
        if server:
            here["PREFECT_API_URL"] = server
        elif "PREFECT_API_URL" not in os.environ:
            # Prefect runs that server with uvicorn, which is to collect garbage aside.
            here["UVICORN_LOOP"] = "tasks.servers.prefect_server:new_loop"
            if self.prefect_database:
                database = self.prefect_database.get_secret_value()
                here["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        return {name: value for name, value in here.items() if name not in os.environ}

    def logins(self) -> dict[str, str]:
        """Return the variables with which clients of Prefect and MLflow log in."""
        if self.login is None:
            return {}
        user, password = self.login
        return {
            "PREFECT_API_AUTH_STRING": f"{user}:{password}",
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }


def is_of(pid: int, home: Path) -> bool:
    """Return whether a process runs for this home; not so a later one that got its number."""
    import psutil

    try:
        environment: dict[str, str] = psutil.Process(pid).environ()
    except psutil.Error:  # gone, ended and not yet collected, or someone else's
        return False
    return environment.get("STILLROOM_HOME") == str(home)
