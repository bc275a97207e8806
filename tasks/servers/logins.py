"""Who may reach the servers: a user and a password, the same for Prefect and MLflow."""

import configparser
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import httpx

from stillroom.errors import LoginError, SettingsError
from tasks.settings import Settings

OWNER_ALONE = 0o600


def require_login_outside(settings: Settings) -> None:
    """Refuse servers that other machines can reach and that ask for no password.

    Raises:
        SettingsError: they would be such.
    """
    if settings.login is None and not settings.is_loopback:
        raise SettingsError(
            f"STILLROOM_HOST is {settings.host}: other machines could reach servers that ask for "
            "no password; set STILLROOM_PASSWORD (and STILLROOM_USER), or leave the host at "
            "127.0.0.1"
        )


def known_login() -> tuple[str, str] | None:
    """Return user and password for Prefect's server: of the settings, or of Prefect's variable."""
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    return Settings().login or ((user, password) if user else None)


@contextmanager
def logging_in() -> Iterator[None]:
    """Turn a login that Prefect's server refuses into a LoginError."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise
        raise LoginError(
            f"Prefect's server at {error.request.url.host} refuses the "
            "login, or wants one: set STILLROOM_USER and STILLROOM_PASSWORD, or Prefect's own "
            "PREFECT_API_AUTH_STRING"
        ) from error


def mlflow_login_variables(settings: Settings) -> dict[str, str]:
    """Return what MLflow's server needs to ask for a password; its files are made in the home."""
    assert settings.login is not None
    user, password = settings.login
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(_write_config(settings)),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": _secret_key(settings.root / "mlflow-secret-key"),
    }


def adopt_password(settings: Settings, mlflow: str) -> None:
    """Make the password of the settings the user's at MLflow, which keeps the one it knew first.

    Raises:
        LoginError: MLflow refuses it all the same.
    """
    if settings.login is None or _lets_in(mlflow, settings.login):
        return
    with warnings.catch_warnings(action="ignore"):  # MLflow's own, about what it rests on
        from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    user, password = settings.login
    users: Any = SqlAlchemyStore()
    users.init_db(_users_database(settings))
    users.update_user(user, password=password, is_admin=True)
    if not _lets_in(mlflow, settings.login):
        raise LoginError(
            f"MLflow refuses the login of {user} with the password that it was just given; "
            f"{settings.root / 'logs' / 'mlflow.log'} may say why"
        )


def _lets_in(mlflow: str, login: tuple[str, str]) -> bool:
    # A proxy of the environment is not for loopback.
    with httpx.Client(trust_env=False, timeout=30, auth=login) as client:
        answer = client.get(f"{mlflow}/api/2.0/mlflow/users/current")
    return answer.status_code != httpx.codes.UNAUTHORIZED


def _write_config(settings: Settings) -> Path:
    """Write the file in which MLflow looks for its users' database; that may hold a password."""
    config = configparser.ConfigParser(interpolation=None)
    config["mlflow"] = {
        # Of users that are added later: they read, and manage what they made.
        "default_permission": "READ",
        # MLflow expands what follows a percent sign.
        "database_uri": _users_database(settings).replace("%", "%%"),
    }
    path = settings.root / "mlflow-auth.ini"
    with _open_private(path, os.O_TRUNC) as file:
        config.write(file)
    return path


def _users_database(settings: Settings) -> str:
    if settings.mlflow_database is not None:
        return settings.mlflow_store
    path = settings.root / "mlflow-auth.db"
    _open_private(path, 0).close()  # it holds hashes of passwords
    return f"sqlite:///{path}"


def _secret_key(path: Path) -> str:
    """Return the key that signs MLflow's forms; it is drawn once for a home."""
    with _open_private(path, 0, "a+") as file:
        file.seek(0)
        key = file.read()
        if not key:
            key = secrets.token_hex(32)
            file.write(key)
    return key


def _open_private(path: Path, flags: int, mode: str = "w") -> TextIO:
    """Open a file that its owner alone may read; it is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR | os.O_CREAT | flags, OWNER_ALONE)
    os.fchmod(number, OWNER_ALONE)
    return cast(TextIO, os.fdopen(number, mode))
