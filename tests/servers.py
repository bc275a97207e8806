"""Real servers for tests, on loopback and on free ports."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

# Debian keeps them off the PATH, a folder a version.
POSTGRES_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
RGW_PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "ceph", "monmaptool")
START_SECONDS = 90
STOP_SECONDS = 20

_CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{v2}/0,v1:127.0.0.1:{v1}/0
ms bind ipv4 = true
ms mon client mode = crc
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
log file = {root}/log/$name.log
pid file = {root}/run/$name.pid
admin socket = {root}/run/$name.asok
run dir = {root}/run
crash dir = {root}/run
keyring = {root}/keyring
setuser match path =
[mon.a]
mon data = {root}/mon
[mgr.x]
mgr data = {root}/mgr
[osd.0]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
[client.admin]
rgw frontends = beast endpoint=127.0.0.1:{http}
rgw data = {root}/rgw
rgw dns name = localhost
"""


@dataclass(frozen=True)
class S3Server:
    """An address and two users: one owns the buckets, the other (Ceph's) has no rights at first."""

    endpoint: str
    access_key: str
    secret_key: str
    other_access_key: str = "other"
    other_secret_key: str = "othersecret"


@dataclass(frozen=True)
class Postgres:
    port: int
    password: str
    programs: Path
    user: str = "keeper"

    def address(self, database: str, driver: str) -> str:
        login = f"{self.user}:{quote(self.password, safe='')}"
        return f"postgresql+{driver}://{login}@127.0.0.1:{self.port}/{database}"

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs against the server, and return what it says."""
        where = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": "postgres",
        }
        done = subprocess.run(
            [self.programs / program, *arguments],
            env=os.environ | where,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rgw_is_installed() -> bool:
    return all(shutil.which(program) for program in RGW_PROGRAMS)


@contextlib.contextmanager
def rgw_server(root: Path) -> Iterator[S3Server]:
    """Run a one-node Ceph cluster in memory and its S3 gateway, with all it keeps in `root`."""
    for folder in ("mon", "mgr", "osd", "rgw", "run", "log"):
        (root / folder).mkdir(parents=True)
    ports = {name: free_port() for name in ("v2", "v1", "http")}
    conf = root / "ceph.conf"
    conf.write_text(_CEPH_CONF.format(root=root, fsid=uuid.uuid4(), **ports))
    server = S3Server(f"http://127.0.0.1:{ports['http']}", "test", "testsecret")
    try:
        _start_ceph(root, conf, ports)
        _await(server.endpoint)
        for key, secret in (
            (server.access_key, server.secret_key),
            (server.other_access_key, server.other_secret_key),
        ):
            _ceph(
                conf, "radosgw-admin", "user", "create", f"--uid={key}", f"--display-name={key}",
                f"--access-key={key}", f"--secret={secret}",
            )  # fmt: skip
        yield server
    finally:
        for name in ("client.admin", "osd.0", "mgr.x", "mon.a"):
            _stop(root / "run" / f"{name}.pid")


def _start_ceph(root: Path, conf: Path, ports: dict[str, int]) -> None:
    keyring, monmap = str(root / "keyring"), str(root / "monmap")
    _ceph(None, "ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.",
          "--cap", "mon", "allow *")  # fmt: skip
    _ceph(None, "ceph-authtool", keyring, "--gen-key", "-n", "client.admin", "--cap", "mon",
          "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")  # fmt: skip
    fsid = conf.read_text().split("fsid = ")[1].split()[0]
    addresses = f"[v2:127.0.0.1:{ports['v2']},v1:127.0.0.1:{ports['v1']}]"
    _ceph(None, "monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, monmap)
    _ceph(conf, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    _ceph(conf, "ceph-mon", "-i", "a")
    _ceph(conf, "ceph-mgr", "-i", "x")
    osd = str(uuid.uuid4())
    _ceph(conf, "ceph", "osd", "new", osd)
    _ceph(conf, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    _ceph(conf, "ceph-osd", "-i", "0")
    _ceph(conf, "radosgw", "-n", "client.admin")


def _ceph(conf: Path | None, program: str, *arguments: str) -> None:
    command = [program, *(["-c", str(conf)] if conf else []), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=START_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-600:]}")


def _await(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as answer:
            answer.close()
            return  # it answers
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def _stop(pid_file: Path) -> None:
    if not pid_file.exists() or not (text := pid_file.read_text().strip()):
        return
    pid, deadline = int(text), time.monotonic() + STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def prefect_server(root: Path) -> Iterator[str]:
    """Run a Prefect server that keeps its database in `root`, and lend its API's address."""
    port = free_port()
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(root),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with running([*command, "--port", str(port)], root / "server.log", environment):
        api = f"http://127.0.0.1:{port}/api"
        _await(f"{api}/health")
        yield api


@contextlib.contextmanager
def postgres_server(password: str) -> Iterator[Postgres]:
    """Run a PostgreSQL server that asks for a password, in a folder of its own."""
    # It refuses to run as root, and the user that it runs as cannot enter root's folders.
    user = "postgres" if os.geteuid() == 0 else None
    programs, port = POSTGRES_PROGRAMS[-1].parent, free_port()
    server = Postgres(port, password, programs)
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        root = Path(folder)
        (root / "password").write_text(password)
        for path in (root, root / "password"):
            shutil.chown(path, user or os.geteuid(), user or os.getegid())
        make = [programs / "initdb", "--pgdata", root / "data", "--username", server.user]
        make += ["--pwfile", root / "password", "--auth", "scram-sha-256", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, user=user, group=user, cwd=root)
        command = [str(programs / "postgres"), "-D", str(root / "data"), "-p", str(port)]
        command += ["-h", "127.0.0.1", "-k", str(root), "-c", "fsync=off"]
        with running(command, root / "log", user=user):
            _await_postgres(server)
            yield server


def _await_postgres(server: Postgres) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            server.run("psql", "--command", "select 1")
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


@contextlib.contextmanager
def running(
    command: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    user: str | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server of our own, and end it whatever happens."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            user=user,
            group=user,
            cwd=log.parent if user else None,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
