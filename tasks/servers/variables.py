"""What the servers are told: by variables, since everyone on a machine can read command lines."""

import os
from pathlib import Path

from tasks.servers.logins import mlflow_login_variables
from tasks.settings import QUIET_SERVICES, Settings
from tasks.settings_file import VARIABLE, settings_path

ROOT = Path(__file__).parents[2]
PREFECT_DATABASE = (
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
)
DATABASES = (
    "STILLROOM_PREFECT_DATABASE",
    "STILLROOM_MLFLOW_DATABASE",
    "MLFLOW_BACKEND_STORE_URI",
    *PREFECT_DATABASE,
)
"""Variables with the databases' passwords: each server is told its own, and no worker any."""
NEAR = ("localhost", "127.0.0.1", "[::1]")
"""Names of this machine, under which MLflow answers by itself."""


def base_variables(settings: Settings, services: dict[str, str]) -> dict[str, str]:
    """Return the environment of all servers and of the worker."""
    file = settings_path()
    ours = {name: value for name, value in os.environ.items() if name not in DATABASES}
    return (
        # Somebody waits for each run: workers ask oftener for the next one than each 10 s.
        {"PREFECT_WORKER_QUERY_SECONDS": "2"}
        | ours
        | QUIET_SERVICES
        | settings.logins()
        # They run in another folder.
        | ({VARIABLE: str(file)} if file else {})
        | {
            "PREFECT_HOME": str(settings.root / "prefect"),
            "PREFECT_API_URL": services["prefect"],
            "MLFLOW_TRACKING_URI": services["mlflow"],
            # Scheduled scoring of traces: seven processes that nobody here asks for.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "STILLROOM_HOME": str(settings.root),
            # The pull step of the deployments reads it: recipes name files relative to it.
            "STILLROOM_ROOT": str(ROOT),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "compression")]),
        }
    )


def prefect_variables(settings: Settings) -> dict[str, str]:
    """Return what Prefect's server alone is told."""
    variables = {name: os.environ[name] for name in PREFECT_DATABASE if name in os.environ}
    variables |= {
        # The page asks the server that it came from, under whichever name that was called.
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # By default scripts of every page that a browser shows may call it.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(settings.cors_origins.split())
        or f"http://{settings.near_host}:{settings.prefect_port}",
    }
    if settings.login:
        variables["PREFECT_SERVER_API_AUTH_STRING"] = ":".join(settings.login)
    if settings.prefect_database:
        url = settings.prefect_database.get_secret_value()
        variables["PREFECT_API_DATABASE_CONNECTION_URL"] = url
    return variables


def mlflow_options(settings: Settings) -> list[str]:
    """Return the options of `mlflow server` that are no secret."""
    options = ["--default-artifact-root", settings.artifact_location]
    # Clients put files in their place directly, not through the server.
    options.append("--no-serve-artifacts")
    if settings.login:
        options += ["--app-name", "basic-auth"]
    if settings.cors_origins:
        options += ["--cors-allowed-origins", ",".join(settings.cors_origins.split())]
    if settings.allowed_hosts or settings.near_host not in NEAR:
        options += ["--allowed-hosts", ",".join(_hosts(settings))]
    return options


def mlflow_variables(settings: Settings) -> dict[str, str]:
    """Return what MLflow's server alone is told."""
    variables = {"MLFLOW_BACKEND_STORE_URI": settings.mlflow_store}
    return variables | (mlflow_login_variables(settings) if settings.login else {})


def _hosts(settings: Settings) -> list[str]:
    """Return the names under which MLflow answers: a list of one's own replaces its own."""
    names = dict.fromkeys([*NEAR, settings.near_host, *settings.allowed_hosts.split()])
    # It takes them for patterns where they hold a star.
    return [form for name in names for form in (name, f"{name.replace('[', '[[]')}:*")]
