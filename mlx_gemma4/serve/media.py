"""What media a request may name: bytes of its own; files of one folder and URLs only if the server was told so."""

import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address
from math import sqrt
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import pypdfium2
import truststore

from mlx_gemma4.errors import MediaError, one_line, shown
from mlx_gemma4.media.source import decode_data_url, describe, file_url_path, received, url_scheme
from mlx_gemma4.prompt.messages import KIND_OF, MEDIA, Part, check_part
from mlx_gemma4.serve.ask import Refused

MOST_FETCHED = 256 * 2**20  # bytes behind one URL
MOST_HOPS = 5
SECONDS = 60  # for one URL, all hops of it
MOST_PAGES = 50  # of a PDF: as an image each takes 8 MB until it is read
PAGE_PIXELS = 700_000  # a little more than the 280 tokens of an image show
MOST_PAGE_TEXT = 20_000  # characters

NAT64 = IPv6Network("64:ff9b::/96")
pdfium = Lock()  # which is one thread's at a time


@dataclass(frozen=True)
class Allowed:
    """files: the folder of which requests may name files. urls: whether they may name http:// and https:// ones."""

    files: Path | None = None
    urls: bool = False


NOTHING = Allowed()


def opened(messages: list[dict[str, Any]], allowed: Allowed) -> list[dict[str, Any]]:
    """Messages whose media can be read without harm, the pages of PDFs in their places.

    Refused or ValueError for what may not be read, and for parts that are wrong.
    """
    return [opened_message(message, f"messages[{index}]", allowed) for index, message in enumerate(messages)]


def opened_message(message: Any, where: str, allowed: Allowed) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for number, part in enumerate(content):
        place, kind = f"{where}.content[{number}]", part.get("type") if isinstance(part, dict) else None
        if kind == "pdf":
            parts += pages(part.get("pdf"), place, allowed)
        elif isinstance(kind, str) and KIND_OF.get(kind) in MEDIA:
            own = check_part(part, place)
            parts.append(own | {own["type"]: harmless(own[own["type"]], own["type"], allowed)})
        else:
            parts.append(part)
    return message | {"content": parts}


def harmless(source: Any, kind: str, allowed: Allowed) -> Any:
    """The source, or what lies behind it: nothing that would still be looked for."""
    if isinstance(source, list):  # the images of a video
        return [harmless(image, "image", allowed) for image in source]
    if isinstance(source, (bytes, tuple)):  # a tuple is our own: JSON has none
        return source
    if isinstance(source, str) and source[:5].lower() == "data:":
        return source
    if not isinstance(source, str):
        raise MediaError(f"the source of the {kind} is of type {type(source).__name__}; expected a data: URL")
    name, scheme = describe(source, kind), url_scheme(source)
    if scheme in ("http", "https"):
        if not allowed.urls:
            raise Refused(f"{name} is not fetched; expected a data: URL, or a server with --allow-urls")
        return fetch(source, name)
    if allowed.files is None:
        raise Refused(f"{name} is not read; expected a data: URL, or a server with --allow-files")
    return file_in(allowed.files, source, name)


def file_in(folder: Path, source: str, name: str) -> Path:
    root = folder.resolve()
    try:
        path = (root / (file_url_path(source) if url_scheme(source) == "file" else source)).resolve()
        found = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError):
        found = False
    if not found:  # one answer for all, which says nothing of what lies elsewhere
        raise Refused(f"{name} is no file of the folder that requests may read")
    return path


# --- URLs --------------------------------------------------------------------------------------


def fetch(url: str, name: str) -> bytes:
    """What lies behind a URL; no hop of it leads to a private address."""
    deadline = time.monotonic() + SECONDS
    try:
        for _ in range(MOST_HOPS):
            parts = urlsplit(quote(url, safe="!#$%&'()*+,/:;=?@[]~"))
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise MediaError(f"{name} leads to {shown(url)}; expected http:// or https://")
            secure = parts.scheme == "https"
            connection = (Secure if secure else Plain)(parts.hostname, parts.port or (443 if secure else 80))
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"User-Agent": "mlx_gemma4"})
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = urljoin(url, location)
                    continue
                if response.status != 200:
                    raise MediaError(f"{name} cannot be fetched: the server answered {response.status}")
                return received(response, name, MOST_FETCHED, deadline)
            finally:
                connection.close()
    except MediaError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MediaError(f"{name} cannot be fetched: {one_line(error)}") from None
    raise MediaError(f"{name} cannot be fetched: it leads on more than {MOST_HOPS} times")


def public_socket(host: str, port: int) -> socket.socket:
    """A connection to the very address that was looked at: a name may mean another one the next time."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not all(is_public(address) for address in addresses):
        raise ValueError(f"the host {shown(host)} is not a public one")
    return socket.create_connection((addresses[0], port), timeout=SECONDS / 4)


def is_public(address: str) -> bool:
    own = ip_address(address.partition("%")[0])
    if isinstance(own, IPv6Address):
        inner = own.ipv4_mapped or own.sixtofour or (own.teredo or (None,))[0]
        if inner is not None:
            own = inner
        elif own in NAT64:
            return False
    return own.is_global and not own.is_multicast


class Plain(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = public_socket(self.host, self.port)


class Secure(http.client.HTTPSConnection):
    def connect(self) -> None:
        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.sock = context.wrap_socket(public_socket(self.host, self.port), server_hostname=self.host)


# --- PDFs --------------------------------------------------------------------------------------


def pages(source: Any, where: str, allowed: Allowed) -> list[Part]:
    """A PDF as an image of each page and the text that it holds."""
    source = harmless(source, "pdf", allowed)
    if isinstance(source, str):
        source = decode_data_url(source, f"{where}, a PDF,")
    data = source.read_bytes() if isinstance(source, Path) else source
    parts: list[Part] = []
    with pdfium:
        try:
            with pypdfium2.PdfDocument(data) as document:
                if len(document) > MOST_PAGES:
                    raise Refused(f"{where} has {len(document)} pages; expected at most {MOST_PAGES}")
                for number in range(len(document)):
                    page = document[number]
                    width, height = page.get_size()
                    scale = sqrt(PAGE_PIXELS / max(width * height, 1))
                    image = page.render(scale=min(scale, 4)).to_pil().convert("RGB")
                    text = page.get_textpage().get_text_bounded()[:MOST_PAGE_TEXT].strip()
                    caption = f"[page {number + 1} of {len(document)}]" + (f"\n{text}" if text else "")
                    parts += [{"type": "image", "image": image}, {"type": "text", "text": caption}]
        except pypdfium2.PdfiumError as error:
            raise Refused(f"{where} is no PDF that can be read: {one_line(error)}") from None
    return parts
