"""An S3 server on a bad day: a proxy before one that refuses, dawdles, changes and cuts answers."""

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.servers import S3Server

ONE_IN = 10
SLOW_SECONDS = 0.5
SECONDS = 60
# What concerns one connection alone, and what is written anew here.
OWN_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class FaultyS3:
    """The address of the proxy, and how often it did what."""

    server: S3Server
    done: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def faulty(behind: S3Server) -> Iterator[FaultyS3]:
    """Put a proxy on loopback before `behind`; each of its faults befalls one request in ten."""
    chance, lock = random.Random(0), threading.Lock()
    done: Counter[str] = Counter()

    def fate() -> str:
        with lock:
            drawn = chance.randrange(ONE_IN)
            return {0: "503", 1: "slow", 2: "wrong", 3: "cut"}.get(drawn, "fine")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = fate()
            if fault == "503":
                status, headers, content = 503, [], b""
            else:
                status, headers, content = self.forward(body)
            # The content of objects alone: lists and replies have no hash to be known by.
            is_content = self.command == "GET" and status < 300 and "?" not in self.path
            if fault == "wrong" and is_content and content:
                at = chance.randrange(len(content))
                content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
            elif fault in ("wrong", "cut") and not (is_content and content):
                fault = "fine"
            if fault == "slow":
                time.sleep(SLOW_SECONDS)
            with lock:
                done[fault] += 1
            self.reply(status, headers, content, cut=fault == "cut")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            where = urlsplit(behind.endpoint)
            there = http.client.HTTPConnection(str(where.hostname), where.port, timeout=SECONDS)
            try:
                # With the Host that the client has signed.
                there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        there.putheader(name, value)
                there.endheaders(body)
                answer = there.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                there.close()

        def reply(
            self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool
        ) -> None:
            self.send_response_only(status)
            length = str(len(content))
            for name, value in headers:
                if name.lower() not in OWN_HEADERS:
                    self.send_header(name, value)
                if self.command == "HEAD" and name.lower() == "content-length":
                    length = value
            self.send_header("Content-Length", length)
            self.end_headers()
            if cut:
                content, self.close_connection = content[: len(content) // 2], True
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass  # nothing on the terminal of the tests

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
        try:
            yield FaultyS3(S3Server(endpoint, behind.access_key, behind.secret_key), done)
        finally:
            proxy.shutdown()
