"""A web server of files that can be told to misbehave, and processes that ask it."""

import http.server
import os
import re
import socket
import struct
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class ShardServer(http.server.ThreadingHTTPServer):
    """Serves a folder. `plan[name]` lists how the next requests for a file go; the last one stays."""

    daemon_threads, block_on_close = True, False
    request_queue_size = 64

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.plan, self.ranges = folder, dict[str, list[str]](), True
        self.asked: list[tuple[str, str | None, dict[str, str]]] = []  # name, Range, headers
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, ending: str = ".tar") -> Counter[str]:
        return Counter(name for name, _, _ in self.asked if name.endswith(ending))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ShardServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        name = self.path.partition("?")[0].lstrip("/")
        self.server.asked.append((name, self.headers.get("Range"), dict(self.headers)))
        plan = self.server.plan.get(name, ["ok"])
        mode, _, value = (plan.pop(0) if len(plan) > 1 else plan[0]).partition(":")
        file = self.server.folder / name
        if mode == "silent":
            self.server.over.wait(60)
            return
        if mode.isdecimal():
            self.send_response(int(mode))
            if value:
                self.send_header("Retry-After", value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if mode == "to":
            self.send_response(302)
            self.send_header("Location", value + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not file.is_file():
            self.send_error(404)
            return
        data, start = file.read_bytes(), 0
        tag = f'"{hash(data)}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.server.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        if mode == "short":  # and claims that this is all
            body = body[: int(value)]
        if mode not in ("open", "openshort"):
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", tag)
        self.end_headers()
        if mode == "drop":
            self.wfile.write(body[: int(value)])
            self.wfile.flush()
            time.sleep(0.02)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif mode in ("close", "openshort"):
            self.wfile.write(body[: int(value)])
        elif mode == "stall":
            self.wfile.write(body[: int(value)])
            self.wfile.flush()
            self.server.over.wait(60)
        elif mode == "slow":
            for i in range(0, len(body), -(-len(body) // 10)):
                self.wfile.write(body[i : i + -(-len(body) // 10)])
                self.wfile.flush()
                time.sleep(float(value) / 10)
        else:
            self.wfile.write(body)


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    server = ShardServer(folder)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


def forked(work: Callable[[], object]) -> int:
    """Process id of a child that does the work and ends with 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended(*children: int) -> list[int]:
    """Exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def stop(child: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, 9)
    ended(child)
