"""The bytes behind a path, a URL or a data: URL, and how messages name it."""

import base64
import binascii
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import CDLL
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from mlx_gemma4.errors import FetchError, MediaError, one_line, shown, unbroken

if TYPE_CHECKING:
    from http.client import HTTPResponse

TIMEOUT = 60  # seconds a server may stay silent
FETCH_SECONDS = 1800  # that all it sends may take: 4 GB at 2.4 MB/s
TRY_AGAIN = (408, 425, 429)  # of the answers 4xx, those that do not blame the request (RFC 9110, 8470, 6585)
OTHER_SOURCES = {
    "image": "a PIL image",
    "audio": "a tuple (samples, sampling rate)",
    "video": 'a list of images with "fps" beside it',
}
MOST_BYTES = 4 << 30  # of what has no length: a pipe, a server's answer
SHOWN_CHARACTERS = 200  # of a path or URL in a message
SHOWN_OF_DATA_URL = 40  # its type and a few characters


def read_source(source: str | Path | bytes, what: str) -> bytes:
    """The bytes of a local file (path, `~` or file:// URL), of an http(s):// URL or of a data: URL; never empty.

    `bytes` pass through. `what` ("image", "audio" or "video") names the part in messages. MediaError if there is
    no such file, if it is a folder or empty, if the server has no such file, and for a bad URL; its subclass FetchError
    if the network or the server fails.
    """
    if isinstance(source, bytes):
        data = source
    elif (path := local_path(source, what)) is not None:
        data = read_file(path, describe(source, what))
    elif str(source)[:5].lower() == "data:":
        data = decode_data_url(str(source), describe(source, what))
    else:
        data = download(str(source), describe(source, what))
    if not data:
        raise MediaError(f"{describe(source, what)} is empty (0 bytes)")
    return data


def open_source(source: str | Path | bytes, what: str) -> BinaryIO:
    """What `read_source` reads, as a file to seek in; one that lies here is not read into memory, it may be large."""
    path = None if isinstance(source, bytes) else local_path(source, what)
    if path is None or not path.is_file():  # in a pipe nobody can go back
        return BytesIO(read_source(source, what))
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(describe(source, what), error) from None


def local_path(source: str | Path, what: str) -> Path | None:
    """The file that a path or a file:// URL names, or None for a URL to fetch; MediaError if there is no such file."""
    if not isinstance(source, str | Path) or source == "":
        kind = "empty" if isinstance(source, str) else f"of type {type(source).__name__}"
        raise MediaError(f"the source of the {what} is {kind}; expected a path, a URL, bytes or {OTHER_SOURCES[what]}")
    name = describe(source, what)
    scheme = url_scheme(source) if isinstance(source, str) else None
    if scheme in ("http", "https", "data"):
        return None
    if scheme not in (None, "file"):
        raise MediaError(f"{name} has the scheme {shown(scheme)}; expected a path or a file, http, https or data URL")
    try:
        path = Path(file_url_path(source) if scheme == "file" else source).expanduser()
        size = path.stat().st_size
    except FileNotFoundError:
        raise MediaError(f"{name} does not exist") from None
    except (OSError, ValueError, RuntimeError) as error:  # also a null byte; a `~user` who does not exist
        raise unreadable(name, error) from None
    if path.is_dir():
        raise MediaError(f"{name} is a folder; expected a file")
    if path.is_char_device():  # it may never end
        raise MediaError(f"{name} is a device; expected a file")
    if size == 0 and path.is_file():  # the size of a pipe says nothing
        raise MediaError(f"{name} is empty (0 bytes)")
    return path


def url_scheme(source: str) -> str | None:
    """The lower-case scheme of a URL, None for a path."""
    found = re.match(r"(data)(?=:)|([a-z][a-z0-9+.-]*)(?=://)", source, re.IGNORECASE)
    return found[0].lower() if found else None


def file_url_path(url: str | Path) -> str:
    parts = urlsplit(str(url))
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"the URL names the host {shown(parts.netloc)}; expected file:///…")
    return unquote(parts.path)


def read_file(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return read_all(file, name)
    except OSError as error:
        raise unreadable(name, error) from None


def read_all(file: BinaryIO, name: str) -> bytes:
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise too_large(name, MOST_BYTES)
    return data


def too_large(name: str, most: int) -> MediaError:
    return MediaError(f"{name} has more than {most >> 20} MB; expected less")


def decode_data_url(url: str, name: str) -> bytes:
    """The bytes in data:[type][;base64],… (RFC 2397)."""
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError(f"{name} has no comma; expected data:[type][;base64],…")
    try:
        data = unquote_to_bytes(body)
    except UnicodeEncodeError:  # half a surrogate pair
        raise MediaError(f"{name} is not valid text; expected data:[type][;base64],…") from None
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{name} is not valid base64: {error}") from None


def download(url: str, name: str) -> bytes:
    # imported here: they take longer than all else this file and Pillow import (25 to 45 ms), and few sources are URLs
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    import truststore  # the system's own certificates: Python from python.org has none on macOS

    deadline = time.monotonic() + FETCH_SECONDS
    try:
        address = quote(url, safe="!#$%&'()*+,/:;=?@[]~")  # spaces and other letters than ASCII, as browsers take them
        request = urllib.request.Request(address, headers={"User-Agent": "mlx_gemma4"})
        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as response:
            return received(response, name, MOST_BYTES, deadline)
    except urllib.error.HTTPError as error:
        error.close()  # it is also the response
        kind = FetchError if error.code >= 500 or error.code in TRY_AGAIN else MediaError
        reason, _, _ = error.reason.partition("\n")  # of a loop of redirects it has more, which ends in a colon
        answer = f"{error.code} {unbroken(reason)}"
        raise kind(f"{name} cannot be fetched: the server answered {answer}") from None
    except MediaError:
        raise
    except (http.client.InvalidURL, ValueError) as error:
        raise MediaError(f"{name} cannot be fetched: {one_line(error)}") from None
    except urllib.error.URLError as error:
        kind = FetchError if isinstance(error.reason, OSError) else MediaError  # a str: not a URL after all
        reason = one_line(error.reason) if isinstance(error.reason, Exception) else unbroken(error.reason)
        raise kind(f"{name} cannot be fetched: {reason}") from None
    except (OSError, http.client.HTTPException) as error:  # cut off or silent
        raise FetchError(f"{name} cannot be fetched: {one_line(error)}") from None


def received(response: "HTTPResponse", name: str, most: int, deadline: float) -> bytes:
    """The whole body. OSError or HTTPException if it is cut off or not there by then (`time.monotonic`), MediaError
    if it has more than `most` bytes."""
    body = BytesIO()
    if (response.length or 0) > most:
        raise too_large(name, most)
    while block := response.read1(1 << 16):
        if body.tell() + len(block) > most:
            raise too_large(name, most)
        if time.monotonic() > deadline:
            raise TimeoutError("it comes too slowly")
        body.write(block)
    if response.length:
        raise ConnectionError(f"the server hung up {response.length} bytes before the end")
    return body.getvalue()


def describe(source: str | Path | bytes, what: str) -> str:
    """How messages name a part: image 'x.png'."""
    if isinstance(source, bytes):
        return f"{what} of {len(source)} bytes"
    if not isinstance(source, str | Path):
        return f"{what} of type {type(source).__name__}"
    text = str(source)
    limit = SHOWN_OF_DATA_URL if text[:5].lower() == "data:" else SHOWN_CHARACTERS
    return f"{what} {text if len(text) <= limit else text[:limit] + '…'!r}"


def unreadable(name: str, error: Exception) -> MediaError:
    """The MediaError for what a decoder or the file system says."""
    return MediaError(f"{name} cannot be read: {one_line(error)}")


@contextmanager
def media_errors(name: str) -> Iterator[None]:
    """MediaError for all that is raised meanwhile: on damaged files Pillow, pillow_heif, soundfile and PyAV raise
    whatever their code trips over."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise unreadable(name, error) from None


def needs_extra(name: str, library: str, mac_command: str | None) -> MediaError:
    """The MediaError for a part that needs a library of the extra `video`; on macOS with the way around, if any."""
    around = f"; or convert it: {mac_command}" if mac_command and sys.platform == "darwin" else ""
    return MediaError(f'{name} needs {library}: pip install "mlx_gemma4[video]"{around}')


streams = Lock()  # the process's, of which one user at a time may lead some nowhere


@contextmanager
def unheard(*numbers: int) -> Iterator[None]:
    """What libraries print to these file descriptors meanwhile is lost.

    So is what other threads write there, so nothing else belongs in here.
    """
    with streams:
        libc, saved = CDLL(None), dict[int, int]()
        libc.fflush(None)  # what waits in C's buffers is not theirs
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for number in numbers:
                with suppress(OSError):  # closed
                    saved[number] = os.dup(number)
                    os.dup2(nowhere, number)
            os.close(nowhere)
            yield
        finally:
            libc.fflush(None)
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
