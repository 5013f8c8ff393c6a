"""The bytes behind a URL, from any byte on: http(s) by itself, a command of `pipe:`, all else through fsspec.

What a source raises tells what it is worth to try again: `Absent` and `Forbidden` never pass, an OSError or
HTTPException may.
"""

import os
import select
import shlex
import signal
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPMessage, InvalidURL
from queue import Empty, SimpleQueue
from typing import IO, Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from mm.errors import UserError

T = TypeVar("T")

CHUNK = 2**23  # bytes a request of fsspec asks for
EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "abfs": "az",
    "abfss": "az",
    "adl": "az",
}
NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "DefaultCredentialsError", "RefreshError", "ClientAuthenticationError",
}  # fmt: skip


class Absent(UserError):
    """There is nothing at the URL."""


class Forbidden(UserError):
    """The URL is not for us."""


class Passing(OSError):
    """A refusal that may pass; wait: seconds that the server asks for."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


@dataclass
class Transfer:
    """A URL, and how far we are with it."""

    url: str
    timeout: float  # seconds without a byte
    options: Mapping[str, Any] = field(default_factory=dict)
    have: int = 0  # bytes; a source sets it back to 0 where it must begin again
    total: int | None = None  # bytes that the server announced
    tag: str | None = None  # of the version that we have a part of

    @property
    def shown(self) -> str:
        return shown(self.url)


def shown(url: str) -> str:
    """A URL for messages: without the secrets that its query or its user part may hold."""
    if url.startswith("pipe:"):
        return url
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def source(url: str) -> Callable[[Transfer], Iterator[bytes]]:
    """How to read a URL: a generator of the bytes from `have` on, which sets `total` where it is known."""
    if url.startswith("pipe:"):
        return _pipe
    return _http if url.startswith(("http://", "https://")) else _fsspec


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            for name in ("Authorization", "Cookie"):  # the secret is for the host that was named
                new.remove_header(name)
        return new


def _opener() -> OpenerDirector:
    opener = OpenerDirector()  # not build_opener, which reads file: and ftp: too
    for handler in (
        ProxyHandler,
        HTTPHandler,
        HTTPSHandler,
        HTTPDefaultErrorHandler,
        _Redirects,
        HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _http(transfer: Transfer) -> Iterator[bytes]:
    headers = {"User-Agent": "mm", "Accept-Encoding": "identity", **transfer.options.get("headers", {})}
    if transfer.have:
        headers["Range"] = f"bytes={transfer.have}-"
        if transfer.tag:
            headers["If-Range"] = transfer.tag
    try:
        request = Request(quote(transfer.url, safe="%/:=&?~#+!$,;'@()*[]"), headers=headers)
        response = _opener().open(request, timeout=transfer.timeout)
    except HTTPError as error:
        with error:
            raise _refusal(error, transfer) from None
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{transfer.shown}: the server's certificate is not valid: {error.reason}"
            ) from None
        raise OSError(error.reason) from None
    except (InvalidURL, UnicodeError) as error:
        raise UserError(f"{transfer.shown} is not a URL: {error}") from None
    with response:
        length, total = response.headers.get("Content-Length"), None
        if response.status == 206:
            place, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if place.partition("-")[0] != str(transfer.have):
                raise OSError(f"asked for byte {transfer.have} on, the server sent {place!r}")
            total = int(whole) if whole.isdecimal() else transfer.total
        else:
            transfer.have = 0
            total = int(length) if length and length.isdecimal() else None
        if transfer.have and transfer.total is not None and total != transfer.total:
            transfer.have = 0
            raise OSError(f"the file changed while it was fetched: {transfer.total} bytes, now {total}")
        transfer.total = total
        tag = response.headers.get("ETag")
        transfer.tag = tag if tag and not tag.startswith("W/") else None
        yield b""  # the size is known: is there room?
        while data := response.read1(2**18):
            yield data


def _refusal(error: HTTPError, transfer: Transfer) -> Exception:
    what = f"{transfer.shown}: the server answered {error.code} ({error.reason})"
    if error.code in (401, 403, 407):
        return Forbidden(
            f"{what}; give a URL that may be read, or data.remote.options={{headers: {{Authorization: ...}}}}"
        )
    if error.code in (404, 410):
        return Absent(f"{what}: there is no such file; mend the name, or leave it out")
    if error.code == 416:
        transfer.have = 0
        return OSError("the server has less than was fetched already")
    if error.code in (408, 425, 429) or error.code >= 500:
        after = error.headers.get("Retry-After") or ""
        return Passing(
            f"the server answered {error.code} ({error.reason})", float(after) if after.isdecimal() else 0
        )
    return UserError(what)


def file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. UserError where a package is missing."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'mm[{extra}]'" if extra else str(error)
        raise UserError(
            f"{shown(url)}: reading {protocol}:// needs a package that is not installed: {fix}"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{shown(url)} cannot be read: {error}; see data.remote.options") from None


def _fsspec(transfer: Transfer) -> Iterator[bytes]:
    try:
        files, path = file_system(transfer.url, transfer.options)
        file = within(transfer.timeout, lambda: files.open(path, "rb", block_size=CHUNK, cache_type="none"))
        try:
            total = getattr(file, "size", None)
            if transfer.have and total != transfer.total:
                transfer.have = 0
            transfer.total = total
            yield b""
            file.seek(transfer.have)
            while data := within(transfer.timeout, lambda: file.read(CHUNK)):
                yield data
        finally:
            within(transfer.timeout, file.close)
    except Exception as error:  # each file system has its own
        raise translated(error, transfer.url) from error


def translated(error: Exception, url: str) -> Exception:
    """What an error of an fsspec file system means: Absent, Forbidden, UserError, else an OSError."""
    status = next(
        (s for name in ("status", "status_code", "code") if isinstance(s := getattr(error, name, None), int)),
        0,
    )
    about = f"{shown(url)}: {type(error).__name__}: {error}"
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileNotFoundError | IsADirectoryError) or status in (404, 410):
        return Absent(f"{about}: there is no such file; mend the name, or leave it out")
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in NO_CREDENTIALS:
        return Forbidden(
            f"{about}; log in, or name the rights: data.remote.options={{anon: true}} for public data"
        )
    return error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may hang, which is then left behind in its thread. TimeoutError."""
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer for {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _pipe(transfer: Transfer) -> Iterator[bytes]:
    """What a chain of commands prints; no shell reads it."""
    transfer.have, transfer.total = 0, None
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as said:
        try:
            for command in commands(transfer.url):
                before = running[-1].stdout if running else subprocess.DEVNULL
                try:
                    running.append(
                        subprocess.Popen(
                            command, stdin=before, stdout=subprocess.PIPE, stderr=said, process_group=0
                        )
                    )
                except OSError as error:
                    raise UserError(f"{transfer.url}: cannot run {command[0]!r}: {error.strerror}") from None
                if not isinstance(before, int) and before is not None:
                    before.close()  # it is the next one's now
            out = running[-1].stdout
            assert out is not None
            while True:
                if not select.select([out], [], [], transfer.timeout)[0]:
                    raise TimeoutError(f"no byte for {transfer.timeout:g} s")
                data = os.read(out.fileno(), 2**18)
                if not data:
                    break
                yield data
            for number, process in enumerate(running):
                status = process.wait(transfer.timeout)
                if status and not (status == -signal.SIGPIPE and number + 1 < len(running)):
                    said.seek(0)
                    words = said.read()[-2000:].decode(errors="replace").strip()
                    raise OSError(
                        f"{shlex.join(commands(transfer.url)[number])} ended with {status}: {words}"
                    )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"a command did not end for {transfer.timeout:g} s") from None
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if process.stdout:
                    process.stdout.close()


def commands(url: str) -> list[list[str]]:
    """The commands of `pipe:A ... | B ...`, split at the bars outside quotes."""
    parts, quote_, escaped = [""], "", False
    for sign in url.removeprefix("pipe:"):
        if sign == "|" and not quote_ and not escaped:
            parts.append("")
            continue
        if not escaped and sign in "'\"" and quote_ in ("", sign):
            quote_ = "" if quote_ else sign
        escaped = sign == "\\" and not escaped and quote_ != "'"
        parts[-1] += sign
    try:
        split = [shlex.split(part) for part in parts]
    except ValueError as error:
        raise UserError(f"{url} is not a command: {error}") from None
    if not all(split):
        raise UserError(f"{url}: expected pipe:COMMAND or pipe:COMMAND | COMMAND")
    return split
