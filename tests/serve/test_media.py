"""What a request may name: bytes of its own, and no more than the server was told."""

import base64
import http.server
import io
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

for library in ("pypdfium2", "pydantic"):
    pytest.importorskip(library, reason="needs the extra serve")

from PIL import Image, ImageDraw  # noqa: E402

from mlx_gemma4.errors import MediaError  # noqa: E402
from mlx_gemma4.serve import media  # noqa: E402
from mlx_gemma4.serve.ask import Refused  # noqa: E402
from mlx_gemma4.serve.media import Allowed, fetch, is_public, opened  # noqa: E402
from mlx_gemma4.weights.load import DEMO  # noqa: E402

SHAPES = DEMO / "samples" / "shapes.png"
ENCODED = base64.b64encode(SHAPES.read_bytes()).decode()


def with_part(part: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]


def source(part: dict[str, Any], allowed: Allowed = media.NOTHING) -> Any:
    found = opened(with_part(part), allowed)[0]["content"][0]
    return found[found["type"]]


def paper(pages: int) -> bytes:
    sheets = [Image.new("RGB", (300, 200), "white") for _ in range(pages)]
    ImageDraw.Draw(sheets[0]).ellipse((90, 50, 210, 150), fill="red")
    file = io.BytesIO()
    sheets[0].save(file, "PDF", save_all=True, append_images=sheets[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": str(SHAPES)},
        {"type": "image", "path": str(SHAPES)},
        {"type": "image_url", "image_url": {"url": f"file://{SHAPES}"}},
        {"type": "image_url", "image_url": f"{SHAPES}"},
        {"type": "audio", "audio": "/etc/passwd"},
        {"type": "video", "video": [ENCODED, str(SHAPES)], "fps": 1},
        {"type": "input_image", "image_url": "http://127.0.0.1/x.png"},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}},
        {"type": "pdf", "pdf": "/etc/passwd"},
        {"type": "image", "image": "~/x.png"},
    ],
)
def test_nothing_is_looked_for_unless_that_is_allowed(part: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"is not (read|fetched); expected a data: URL, or a server with --allow-"):
        opened(with_part(part), media.NOTHING)


def test_bytes_of_the_request_itself_are_taken() -> None:
    assert source({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}}).startswith("data:")
    assert source({"type": "image", "source": {"type": "base64", "data": ENCODED}}) == SHAPES.read_bytes()


def test_files_are_those_of_the_allowed_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    (folder / "shapes.png").write_bytes(SHAPES.read_bytes())
    (tmp_path / "secret.png").write_bytes(SHAPES.read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    allowed = Allowed(files=folder)
    for name in ("shapes.png", str(folder / "shapes.png"), f"file://{folder}/shapes.png", "../open/shapes.png"):
        assert source({"type": "image", "image": name}, allowed) == (folder / "shapes.png").resolve()
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "/dev/zero", ".", "none.png", "a\0b"):
        with pytest.raises(Refused, match="is no file of the folder that requests may read"):
            source({"type": "image", "image": name}, allowed)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "172.16.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1",
     "255.255.255.255"],
)  # fmt: skip
def test_private_addresses_are_known(address: str) -> None:
    assert not is_public(address)
    assert is_public("93.184.216.34") and is_public("2606:4700::1111")


class Hops(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/picture":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SHAPES.read_bytes())
            return
        if self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"cut")
            return
        self.send_response(302)
        hops = {"/one": "/picture", "/out": "http://localhost:1/", "/file": "file:///etc/passwd"}
        self.send_header("Location", hops.get(self.path, "/loop"))
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server whose address counts as public; no other of this machine does."""
    monkeypatch.setattr(media, "is_public", lambda address: address == "127.0.0.2")
    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Hops) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.2:{server.server_port}"
        server.shutdown()
        thread.join()


def test_each_hop_of_a_url_is_looked_at(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(f"{elsewhere}/one", "it") == SHAPES.read_bytes()
    for path, said in (("out", "is not a public one"), ("file", "expected http:// or"), ("loop", "leads on more than")):
        with pytest.raises(MediaError, match=said):
            fetch(f"{elsewhere}/{path}", "it")
    with pytest.raises(MediaError, match=r"^it cannot be fetched: the server hung up 6 bytes before the end$"):
        fetch(f"{elsewhere}/cut", "it")
    monkeypatch.setattr(media, "MOST_FETCHED", 100)
    with pytest.raises(MediaError, match="has more than"):
        fetch(f"{elsewhere}/picture", "it")


def test_a_paper_becomes_its_pages_pictures_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = opened(with_part({"type": "pdf", "pdf": paper(2)}), media.NOTHING)[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text", "image", "text", "text"]
    assert parts[1]["text"] == "[page 1 of 2]" and parts[0]["image"].size[0] > 900
    red = parts[0]["image"].getpixel(tuple(side // 2 for side in parts[0]["image"].size))
    assert red[0] > 200 and red[1] < 60
    monkeypatch.setattr(media, "MOST_PAGES", 1)
    with pytest.raises(Refused, match=r"messages\[0\].content\[0\] has 2 pages; expected at most 1"):
        opened(with_part({"type": "pdf", "pdf": paper(2)}), media.NOTHING)
    with pytest.raises(Refused, match="is no PDF that can be read"):
        opened(with_part({"type": "pdf", "pdf": b"%PDF-1.7 nothing"}), media.NOTHING)
