"""Paths, URLs and data: URLs → bytes."""

import base64
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma4.errors import FetchError, MediaError
from mlx_gemma4.media import source
from mlx_gemma4.media.source import describe, local_path, needs_extra, open_source, read_source


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        bodies = {"/a.bin": b"content", "/a%20%C3%A9.bin": b"spaced", "/empty": b"", "/short": b"cut"}
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.bin")
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302, "")
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with suppress(OSError):  # the reader has left
                for _ in range(100):
                    self.wfile.write(b"x")
                    sleep(0.02)
        elif self.path == "/agent":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.headers["User-Agent"].encode())
        elif self.path in bodies:
            self.send_response(200)
            self.send_header("Content-Length", "9" if self.path == "/short" else str(len(bodies[self.path])))
            self.end_headers()
            self.wfile.write(bodies[self.path])
        else:
            self.send_error(int(self.path[1:]) if self.path[1:].isdecimal() else 404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_paths_of_all_forms_give_the_files_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a é#.bin"
    file.write_bytes(b"content")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    encoded = f"file://{tmp_path}/a%20%C3%A9%23.bin"
    for place in (file, str(file), "a é#.bin", "~/a é#.bin", Path("~/a é#.bin"), file.as_uri(), encoded):
        assert read_source(place, "image") == b"content"
    assert read_source("file://localhost" + encoded.removeprefix("file://"), "image") == b"content"


def test_bytes_pass_through() -> None:
    assert read_source(b"content", "image") == b"content"


@given(st.binary(min_size=1), st.sampled_from(["", "image/png", "text/plain;charset=utf-8"]))
def test_data_urls_give_back_what_was_put_in(data: bytes, kind: str) -> None:
    assert read_source(f"data:{kind};base64,{base64.b64encode(data).decode()}", "image") == data
    assert read_source(f"DATA:{kind}," + "".join(f"%{byte:02X}" for byte in data), "image") == data


def test_base64_may_be_wrapped_and_percent_encoded() -> None:
    assert read_source("data:;base64,Y29u\n dGVu\r\ndA%3D%3D", "image") == b"content"


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:;base64,****", "data:;base64,YQ", "data:;base64,é"])
def test_a_bad_data_url_is_an_error(url: str) -> None:
    with pytest.raises(MediaError, match=r"^image 'data:.*' (has no comma|is not valid base64)"):
        read_source(url, "image")


def test_urls_are_fetched(server: str) -> None:
    assert read_source(f"{server}/a.bin", "audio") == b"content"
    assert read_source(f"{server}/moved", "audio") == b"content"
    assert read_source(f"{server}/a é.bin", "audio") == b"spaced"
    assert read_source(f"{server.upper()}/agent", "audio") == b"mlx_gemma4"


def test_a_url_of_no_file_says_why(server: str) -> None:
    with pytest.raises(
        MediaError, match=r"^audio 'http.*/b\.wav' cannot be fetched: the server answered 404 Not Found$"
    ) as caught:
        read_source(f"{server}/b.wav", "audio")
    assert not isinstance(caught.value, FetchError)
    with pytest.raises(MediaError, match=r"is empty \(0 bytes\)$"):
        read_source(f"{server}/empty", "audio")


def test_a_failing_network_or_server_is_told_from_a_wrong_url(server: str) -> None:
    with pytest.raises(FetchError, match=r"cannot be fetched: the server hung up 6 bytes before the end$"):
        read_source(f"{server}/short", "audio")
    with pytest.raises(FetchError, match=r"^image 'http://127.0.0.1:1/' cannot be fetched: Connection refused$"):
        read_source("http://127.0.0.1:1/", "image")
    for status in (500, 503, 429):
        with pytest.raises(FetchError, match=f"the server answered {status} "):
            read_source(f"{server}/{status}", "image")


def test_a_server_that_drips_is_left(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FETCH_SECONDS", 0.1)
    with pytest.raises(FetchError, match=r"/drip' cannot be fetched: it comes too slowly$"):
        read_source(f"{server}/drip", "video")


def test_what_is_too_large_is_not_read_to_its_end(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOST_BYTES", 3)
    for path in ("a.bin", "agent"):  # of a known length, and not
        with pytest.raises(MediaError, match=r" has more than 0 MB; expected less$"):
            read_source(f"{server}/{path}", "video")


def test_a_device_is_refused_before_it_is_read() -> None:
    for what in ("image", "audio", "video"):
        with pytest.raises(MediaError, match=r"'/dev/zero' is a device; expected a file$"):
            open_source("/dev/zero", what)


def test_a_loop_of_redirects_is_said_in_a_whole_sentence(server: str) -> None:
    with pytest.raises(MediaError, match=r"the server answered 302 .* would lead to an infinite loop\.$"):
        read_source(f"{server}/loop", "image")


@pytest.mark.parametrize("url", ["http://", "https:///a", "http://127.0.0.1:port/", "http://[::1/"])
def test_what_is_no_url_is_an_error(url: str) -> None:
    with pytest.raises(MediaError, match=r"^video 'https?://.*' cannot be fetched: ") as caught:
        read_source(url, "video")
    assert not isinstance(caught.value, FetchError)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    cases = {
        str(tmp_path / "x.png"): r"x\.png' does not exist$",
        str(tmp_path): r"' is a folder; expected a file$",
        str(tmp_path / "empty.png"): r"empty\.png' is empty \(0 bytes\)$",
        str(tmp_path / "empty.png" / "x.png"): r"cannot be read: Not a directory$",
        "a\0b": r"^image 'a\\x00b' cannot be read: ",
        "x" * 5000: r"…' cannot be read: File name too long$",
        "~nobody-of-this-name/x.png": r"^image '~nobody-of-this-name/x.png' cannot be read: ",
        "file://elsewhere/x.png": r"the URL names the host 'elsewhere'; expected file:///…$",
        "s3://bucket/x.png": r"has the scheme 's3'; expected a path or a file, http, https or data URL$",
        "": r"^the source of the image is empty; expected a path, a URL, bytes or a PIL image$",
    }
    for place, message in cases.items():
        with pytest.raises(MediaError, match=message) as caught:
            read_source(place, "image")
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match=r"^image of 0 bytes is empty"):
        read_source(b"", "image")


def test_another_type_is_an_error() -> None:
    with pytest.raises(
        MediaError, match=r"^the source of the audio is of type int; expected a path, a URL, bytes or a t"
    ):
        read_source(5, "audio")  # type: ignore[arg-type]


def test_only_urls_to_fetch_have_no_local_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    assert local_path(str(tmp_path / "a.png"), "image") == tmp_path / "a.png"
    assert [local_path(url, "image") for url in ("http://a/b", "HTTPS://a/b", "data:,a")] == [None, None, None]


def test_long_data_urls_are_shortened_in_messages() -> None:
    named = describe("data:image/png;base64," + "A" * 9999, "image")
    assert named == "image 'data:image/png;base64," + "A" * 18 + "…'"


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert str(needs_extra("audio 'a.m4a'", "PyAV", "afconvert")) == (
        "audio 'a.m4a' needs PyAV: pip install \"mlx_gemma4[video]\""
    )
    monkeypatch.setattr("sys.platform", "darwin")
    assert str(needs_extra("audio 'a.m4a'", "PyAV", "afconvert")).endswith("; or convert it: afconvert")
    assert "convert" not in str(needs_extra("video 'a.mp4'", "PyAV", None))
