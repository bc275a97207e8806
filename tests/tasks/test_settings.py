import os
from pathlib import Path

import pytest

from stillroom.errors import SettingsError
from tasks.servers.logins import require_login_outside
from tasks.servers.processes import require_free
from tasks.servers.variables import (
    base_variables,
    mlflow_options,
    mlflow_variables,
    prefect_variables,
)
from tasks.settings import Settings
from tasks.settings_file import variable_of

EXAMPLE = Path(__file__).parents[2] / "deployments" / "settings.example.env"
PASSWORD = "not a short one"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave no setting in the environment but a home."""
    for name in os.environ:
        if name.startswith(("STILLROOM_", "MLFLOW_", "PREFECT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path))


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_environment_comes_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "settings.env", "STILLROOM_USER=ann\nMLFLOW_TRACKING_URI=http://a\n")
    assert (Settings().user, Settings().tracking_uri) == ("ann", "http://a")
    monkeypatch.setenv("STILLROOM_USER", "bob")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b")
    assert (Settings().user, Settings().tracking_uri) == ("bob", "http://b")


def test_what_is_set_to_nothing_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "settings.env", "STILLROOM_USER=\nSTILLROOM_MLFLOW_PORT=5001\n")
    monkeypatch.setenv("STILLROOM_PASSWORD", "")
    monkeypatch.setenv("STILLROOM_MLFLOW_PORT", "")
    settings = Settings()
    assert (settings.user, settings.login, settings.mlflow_port) == ("stillroom", None, 5001)


@pytest.mark.parametrize(
    "password",
    ["twelve chars", "${HOME}${HOME}", "hash # in it", "percent%%dollar$1", 'with "quotes"'],
)
def test_a_password_is_read_as_it_stands(tmp_path: Path, password: str) -> None:
    write(tmp_path / "settings.env", f"# the login\nSTILLROOM_PASSWORD='{password}'\n")
    assert Settings().login == ("stillroom", password)
    assert password not in repr(Settings())


def test_another_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_SETTINGS", str(tmp_path / "team.env"))
    with pytest.raises(SettingsError, match=r"team.env cannot be read: No such file"):
        Settings()
    write(tmp_path / "team.env", "STILLROOM_USER=ann\n")
    assert Settings().user == "ann"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
@pytest.mark.parametrize(
    "line",
    [
        f"STILLROOM_PASSWORD={PASSWORD}",
        "STILLROOM_PREFECT_DATABASE=postgresql+asyncpg://u:hush@h/d",
        "STILLROOM_MLFLOW_DATABASE=postgresql+psycopg2://u:hush@h/d",
    ],
)
def test_a_file_with_a_secret_is_its_owners_alone(tmp_path: Path, mode: int, line: str) -> None:
    path = write(tmp_path / "settings.env", f"{line}\n", mode)
    with pytest.raises(SettingsError, match="chmod 600") as refused:
        Settings()
    assert PASSWORD not in str(refused.value)
    assert "hush" not in str(refused.value)
    path.chmod(0o600)
    Settings()


def test_others_may_read_a_file_without_secrets(tmp_path: Path) -> None:
    write(tmp_path / "settings.env", "STILLROOM_USER=ann\nSTILLROOM_PASSWORD=\n", 0o644)
    assert Settings().user == "ann"


def test_what_is_no_setting_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "settings.env", "STILLROOM_PASWORD=hush hush hush\n")
    with pytest.raises(SettingsError, match="STILLROOM_PASWORD is no setting") as refused:
        Settings()
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("STILLROOM_PASSWORD", "hush hush", "at least 12 characters"),
        ("STILLROOM_USER", "ann:hush", "pattern"),
        ("STILLROOM_MLFLOW_PORT", "70000", "65535"),
        ("STILLROOM_PREFECT_DATABASE", "postgresql://u:hush@h/d", r"postgresql\+asyncpg://"),
        ("STILLROOM_MLFLOW_DATABASE", "mysql://u:hush@h/d", r"postgresql\+psycopg2://"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=rf"{variable}: .*{said}") as refused:
        Settings()
    assert "hush" not in str(refused.value) or variable == "STILLROOM_USER"


def test_clients_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().logins() == {}
    monkeypatch.setenv("STILLROOM_PASSWORD", PASSWORD)
    assert (
        Settings().environment().items()
        >= {
            "PREFECT_API_AUTH_STRING": f"stillroom:{PASSWORD}",
            "MLFLOW_TRACKING_USERNAME": "stillroom",
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }.items()
    )
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of another server")
    assert "MLFLOW_TRACKING_PASSWORD" not in Settings().environment()


def test_without_servers_the_databases_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    prefect, mlflow = "postgresql+asyncpg://u:p@h/a", "postgresql+psycopg2://u:p@h/b"
    monkeypatch.setenv("STILLROOM_PREFECT_DATABASE", prefect)
    monkeypatch.setenv("STILLROOM_MLFLOW_DATABASE", mlflow)
    assert Settings().tracking_uri == mlflow
    assert Settings().environment()["PREFECT_API_DATABASE_CONNECTION_URL"] == prefect
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    assert "PREFECT_API_DATABASE_CONNECTION_URL" not in Settings().environment()


@pytest.mark.parametrize(
    ("host", "near", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("localhost", "localhost", True),
        ("::1", "[::1]", True),
        ("0.0.0.0", "127.0.0.1", False),
        ("::", "[::1]", False),
        ("192.0.2.7", "192.0.2.7", False),
        ("gpu-box", "gpu-box", False),
    ],
)
def test_other_machines_are_let_at_no_open_server(
    host: str, near: str, loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_HOST", host)
    assert Settings().near_host == near
    if loopback:
        require_login_outside(Settings())
    else:
        with pytest.raises(SettingsError, match="STILLROOM_PASSWORD"):
            require_login_outside(Settings())
    monkeypatch.setenv("STILLROOM_PASSWORD", PASSWORD)
    require_login_outside(Settings())


def test_a_host_that_is_none_of_this_machine() -> None:
    with pytest.raises(SettingsError, match="STILLROOM_HOST"):
        require_free("192.0.2.7", 4200, "STILLROOM_PREFECT_PORT")


def test_the_databases_passwords_are_their_servers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_PREFECT_DATABASE", "postgresql+asyncpg://u:hush@h/prefect")
    monkeypatch.setenv("STILLROOM_MLFLOW_DATABASE", "postgresql+psycopg2://u:hush@h/mlflow")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://u:hush@h/p")
    everyones = base_variables(Settings(), {"prefect": "http://p/api", "mlflow": "http://m"})
    assert not [name for name, value in everyones.items() if "hush" in value]
    prefects, mlflows = prefect_variables(Settings()), mlflow_variables(Settings())
    assert prefects["PREFECT_API_DATABASE_CONNECTION_URL"].endswith("h/prefect")
    assert prefects["PREFECT_SERVER_DATABASE_CONNECTION_URL"].endswith("h/p")
    assert mlflows["MLFLOW_BACKEND_STORE_URI"].endswith("h/mlflow")


def test_pages_and_names_that_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefect_variables(Settings())["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == (
        "http://127.0.0.1:4200"
    )
    assert not {"--allowed-hosts", "--cors-allowed-origins"} & set(mlflow_options(Settings()))
    monkeypatch.setenv("STILLROOM_CORS_ORIGINS", "https://a.example.org https://b.example.org")
    monkeypatch.setenv("STILLROOM_ALLOWED_HOSTS", "gpu-box")
    pages = "https://a.example.org,https://b.example.org"
    assert prefect_variables(Settings())["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == pages
    options = mlflow_options(Settings())
    assert options[options.index("--cors-allowed-origins") + 1] == pages
    hosts = options[options.index("--allowed-hosts") + 1].split(",")
    assert {"localhost:*", "127.0.0.1:*", "gpu-box", "gpu-box:*"} <= set(hosts)
    monkeypatch.delenv("STILLROOM_ALLOWED_HOSTS")
    monkeypatch.setenv("STILLROOM_HOST", "::2")
    options = mlflow_options(Settings())
    assert {"[::2]", "[[]::2]:*"} <= set(options[options.index("--allowed-hosts") + 1].split(","))


def test_the_example_names_every_setting_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = EXAMPLE.read_text().splitlines()
    shown = [line.removeprefix("# ").partition("=") for line in lines if "STILLROOM_" in line]
    names = [name for name, equals, _ in shown if equals]
    known = {variable_of(Settings, field) for field in Settings.model_fields}
    # The file lies in the home.
    assert {*names, "MLFLOW_TRACKING_URI"} == known - {"STILLROOM_HOME"}
    assert len(names) == len(set(names))
    switched_on = "\n".join(f"{name}={value}" for name, _, value in shown)
    write(tmp_path / "settings.env", switched_on)
    settings = Settings()  # each value is one that the setting takes
    assert settings.login is not None
    write(tmp_path / "settings.env", EXAMPLE.read_text())
    assert Settings().login is None  # as it is shipped it sets no password
