"""Who may reach the page, and what of it: this machine alone, and the few paths that the page itself needs.

Gradio brings more than that: files by their path, a proxy for URLs, an API. None of it is reachable.
"""

import json
import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mm.errors import UserError

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 20
LARGEST_QUESTION = 2**20  # bytes of what is typed
REACHABLE = re.compile(
    r"/(|config/?|theme\.css|manifest\.json|favicon\.ico|robots\.txt"
    r"|(static|assets|svelte)/[\w./@+-]+"
    r"|gradio_api/(theme\.css|info/?|app_id/?|user/?|startup-events|upload|upload_progress|heartbeat/\w+"
    r"|queue/(join|data)/?|cancel|reset/?))"
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@contextmanager
def free_socket(port: int | None) -> Iterator[socket.socket]:
    """A socket that listens on this machine's own address. UserError where the port is taken, or all are."""
    for one in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, one))
            listening.listen(128)
        except OSError as error:
            listening.close()
            why = error.strerror
            continue
        with listening:
            if port is None and one != FIRST_PORT:
                print(f"port {FIRST_PORT} is taken; the next free one is {one}", flush=True)
            yield listening
        return
    raise UserError(
        f"the ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are all taken; give another one, as port=9000"
        if port is None
        else f"port={port}: {why}; give another one, or none for the next that is free"
    )


@contextmanager
def temporary_files() -> Iterator[Path]:
    """A folder for what is uploaded, gone at the end; and what keeps Gradio from the network."""
    with tempfile.TemporaryDirectory(prefix="mm-explore-") as folder:
        os.environ |= {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_SSR_MODE": "False",
            "GRADIO_MCP_SERVER": "False",
            "DISABLE_TELEMETRY": "1",
        }
        yield Path(folder)


def serve(page: "Blocks", listening: socket.socket, folder: Path, max_upload_mb: int) -> None:
    """Serve the page until Ctrl-C, which is raised as KeyboardInterrupt; so is a request to end from outside."""
    import uvicorn

    def ends(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ends)
    port = listening.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            Guard(application(page, port, max_upload_mb), port, folder, max_upload_mb),
            log_level="error",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=1,
        )
    )
    print(f"open http://{HOST}:{port} in a browser on this machine; Ctrl-C ends it", flush=True)
    server.run(sockets=[listening])


def application(page: "Blocks", port: int, max_upload_mb: int) -> Any:
    """Gradio's server of the page, with no file of the disk but those uploaded to it, and no font from elsewhere."""
    import gradio as gr
    from fastapi import FastAPI

    from eval.exploring.show import CSS

    page.has_launched = True  # else Gradio does not look where the files lie that it is asked to read
    plain = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    theme = gr.themes.Default(font=plain, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        page,
        path="",
        server_name=HOST,
        server_port=port,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=f"{max_upload_mb}mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=CSS,
    )


class Guard:
    """Lets through what the page itself asks for, from a browser that has it open under this machine's own name.

    Another name that leads here would be a site's that rebinds its own (DNS rebinding), another origin a page's that
    sends forms to whatever listens.
    """

    def __init__(self, app: Any, port: int, folder: Path, max_upload_mb: int) -> None:
        """folder: where uploads lie."""
        self.app = app
        self.folder = folder.resolve()
        self.hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        self.largest = max_upload_mb * 10**6 * 2  # a file that is a little too large gets Gradio's own answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if trouble := self._trouble(scope):
            await _say(send, *trouble)
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        if scope["path"].rstrip("/").endswith("/queue/join"):
            body = await _body(receive)
            if body is None or _names_elsewhere(body, self.folder):
                await _say(send, 400, "the question is too long, or names a file that was not uploaded")
                return
            receive = _again(body, receive)
        await self.app(scope, receive, send_guarded)

    def _trouble(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if headers.get("host") not in self.hosts:
            return 421, f"this page is at http://{HOST} alone"
        origin = headers.get("origin")
        if origin is not None and origin.removeprefix("http://") not in self.hosts:
            return 403, "asked from another page"
        if not REACHABLE.fullmatch(scope["path"]) or ".." in scope["path"]:
            return 404, "there is no such page"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.largest:
            return 413, "the file is too large"
        return None


async def _say(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": text}).encode()})


async def _body(receive: Any) -> bytes | None:
    """All of a request; None of one that is too long."""
    parts, more, size = [], True, 0
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > LARGEST_QUESTION:
            return None
    return b"".join(parts)


def _again(body: bytes, receive: Any) -> Any:
    """What gives a request's body again, and then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Any:
        return waiting.pop() if waiting else await receive()

    return given


def _names_elsewhere(body: bytes, folder: Path) -> bool:
    """Whether a question names a file that is not in the folder of uploads, or is no JSON. Gradio fetches URLs; and
    where its own launch() was not called, it reads every file of this machine."""
    try:
        found = [json.loads(body)]
        while found:
            one = found.pop()
            if isinstance(one, dict):
                # resolved: no link and no .. leads out
                if one.get("path") is not None and not Path(one["path"]).resolve().is_relative_to(folder):
                    return True
                found += one.values()
            elif isinstance(one, list):
                found += one
    except (ValueError, TypeError, OSError, RecursionError):  # a path may be anything, and hold anything
        return True
    return False
