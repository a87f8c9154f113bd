"""Models from a hub: a fake one on 127.0.0.1 that speaks as huggingface.co does, without Xet."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from toy_checkpoint import write_drafter

from mlx_gemma4.weights.hub import PATTERNS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Serves a folder as the model someone/tiny."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.fails: dict[str, tuple[int, str]] = {}  # beginning of a path -> status and X-Error-Code
        self.slow: str | None = None  # the file that comes byte by byte
        self.short: str | None = None  # the file that comes by half
        self.fetched: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        for beginning, (status, code) in self.server.fails.items():
            if path.startswith(beginning):
                return self.send(b"{}", body, status, {"X-Error-Code": code} if code else {})
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main"):
            return self.send_json({"id": ID, "modelId": ID, "sha": COMMIT, "siblings": []}, body)
        if path == f"/api/models/{ID}/tree/{COMMIT}":
            return self.send_json([self.entry(file) for file in self.files()], body)
        found = re.fullmatch(rf"/{ID}/resolve/[^/]+/(.+)", path)
        if found and (self.server.folder / found[1]).is_file():
            return self.send_file(found[1], body)
        self.send(b"{}", body, 404, {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})

    def files(self) -> list[str]:
        found = (file for file in self.server.folder.rglob("*") if file.is_file())
        return sorted(file.relative_to(self.server.folder).as_posix() for file in found)

    def entry(self, name: str) -> dict[str, object]:
        data = (self.server.folder / name).read_bytes()
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": etag(data)[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": etag(data), "size": len(data), "pointerSize": 134}
        return entry

    def send_file(self, name: str, body: bool) -> None:
        data = (self.server.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(data)}"', "X-Linked-Size": str(len(data))}
        if body:
            self.server.fetched.append(name)
        if body and name == self.server.slow:
            self.send(b"", body, 200, headers, length=len(data))
            for byte in data[:600]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        else:
            self.send(data[: len(data) // 2] if body and name == self.server.short else data, body, 200, headers)

    def send_json(self, value: object, body: bool) -> None:
        self.send(json.dumps(value).encode(), body, 200, {"Content-Type": "application/json"})

    def send(self, data: bytes, body: bool, status: int, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path) -> Iterator[Hub]:
    with Hub(Path(shutil.copytree(tiny_folder, tmp_path / "served"))) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def environment(home: Path, url: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_HOME": str(home), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def words(model: str) -> list[str]:
    return [
        sys.executable, "-m", "mlx_gemma4.generate", "--model", model, "--drafter", "none", "--prompt", "a",
        "--temp", "0", "--max-tokens", "4",
    ]  # fmt: skip


def ask(home: Path, url: str, model: str = ID) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(model), env=environment(home, url), capture_output=True, text=True, timeout=60)


def check_refused(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert len(done.stderr) < 500


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def snapshot(home: Path) -> Path:
    return home / "hub" / "models--someone--tiny" / "snapshots" / COMMIT


def test_a_model_is_fetched_once_and_answers_without_a_network(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    extra = ["pytorch_model.bin", "README.md", "onnx/model.json", "original/model.safetensors", "original/config.json"]
    taken = ["drafter/config.json", "drafter/model.safetensors", "chat_template.jinja"]
    for name in extra + taken[:2]:
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_text(name)  # two files of one content would be fetched once
    first = ask(home, hub.url)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("\n") == 1  # no bar on a pipe
    local = ask(home, hub.url, str(tiny_folder))
    assert first.stdout == local.stdout
    kept = sorted(file.name for file in tiny_folder.iterdir())
    assert sorted(hub.fetched) == sorted([*kept, *taken[:2]])
    hub.fetched.clear()
    assert ask(home, hub.url).stdout == first.stdout
    assert hub.fetched == []
    offline = ask(home, f"http://127.0.0.1:{closed_port()}")
    assert (offline.returncode, offline.stdout, offline.stderr.count("\n")) == (0, first.stdout, 1)
    hub.fails["/api/"] = (500, "")
    assert ask(home, hub.url).stdout == first.stdout


def test_a_hub_id_that_does_not_exist_is_refused(hub: Hub, tmp_path: Path) -> None:
    expected = "'someone/none' is neither a folder here nor a repository on the hub; expected "
    check_refused(ask(tmp_path / "home", hub.url, "someone/none"), 2, expected)
    hub.fails["/api/models/someone/secret"] = (401, "RepoNotFound")  # what huggingface.co says to strangers
    check_refused(ask(tmp_path / "home", hub.url, "someone/secret"), 2, "'someone/secret' is neither", "hf auth login")
    check_refused(ask(tmp_path / "home", hub.url, "some one/x"), 2, "'some one/x' is neither a folder here nor ")


def test_a_gated_model_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.fails[f"/{ID}/resolve/"] = (403, "GatedRepo")
    check_refused(ask(tmp_path / "home", hub.url), 2, f"{ID} is gated; accept its licence", "`hf auth login`")


def test_a_hub_that_refuses_is_no_network_failure(hub: Hub, tmp_path: Path) -> None:
    hub.fails["/api/models/"] = (403, "")
    check_refused(ask(tmp_path / "home", hub.url), 2, f"the hub refuses {ID}: 403 Forbidden", "hf auth login")


def test_what_is_not_there_needs_no_login(hub: Hub, tmp_path: Path) -> None:
    hub.fails[f"/{ID}/resolve/"] = (404, "EntryNotFound")
    done = ask(tmp_path / "home", hub.url)
    check_refused(done, 2, f"the hub refuses {ID}: 404", "expected a repository that is whole")
    assert "login" not in done.stderr


def test_a_file_that_came_short_is_a_failure(hub: Hub, tmp_path: Path) -> None:
    hub.short = "model.safetensors"
    done = ask(tmp_path / "home", hub.url)
    check_refused(done, 1, f"{ID} is not (wholly) on this machine", "Consistency check failed: file should be of size")
    assert "force_download" not in done.stderr
    hub.short = None
    assert ask(tmp_path / "home", hub.url).returncode == 0


def test_a_hub_that_cannot_be_reached_is_a_failure(tmp_path: Path) -> None:
    check_refused(
        ask(tmp_path / "home", f"http://127.0.0.1:{closed_port()}"), 1,
        f"{ID} is not (wholly) on this machine and the hub cannot be reached: ", "refused",
    )  # fmt: skip


def test_without_the_hub_the_default_model_points_to_the_demo(tmp_path: Path) -> None:
    done = ask(tmp_path / "home", f"http://127.0.0.1:{closed_port()}", "mlx-community/gemma-4-12B-it-4bit")
    check_refused(
        done, 1, "the hub cannot be reached: ", "; the model demo, which is in this package, needs no network"
    )


def test_the_offline_mode_of_the_user_is_named(tmp_path: Path) -> None:
    env = environment(tmp_path / "home", "http://127.0.0.1:1") | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words(ID), env=env, capture_output=True, text=True, timeout=60)
    check_refused(done, 1, "HF_HUB_OFFLINE")


def test_a_hub_that_fails_is_a_failure(hub: Hub, tmp_path: Path) -> None:
    hub.fails["/api/models/"] = (500, "")
    check_refused(ask(tmp_path / "home", hub.url), 1, "the hub cannot be reached: ", "500")


def test_a_login_page_instead_of_the_hub_is_a_failure(tmp_path: Path) -> None:
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Welcome to our network</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Portal) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}).start()
        done = ask(tmp_path / "home", f"http://127.0.0.1:{running.server_port}")
        running.shutdown()
    check_refused(done, 1, "the hub cannot be reached: ", "login page")


def test_an_interrupted_download_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    hub.slow = "model.safetensors"
    running = subprocess.Popen(
        words(ID), env=environment(home, hub.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while "model.safetensors" not in hub.fetched and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    pressed = time.monotonic()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert time.monotonic() - pressed < 10  # the file would take 30 s
    assert (running.returncode, out, err.strip()) == (130, "", "")
    assert not (snapshot(home) / "model.safetensors").exists()
    check_refused(ask(home, f"http://127.0.0.1:{closed_port()}"), 1, f"{ID} is not (wholly) on this machine")
    hub.slow = None
    assert ask(home, hub.url).returncode == 0


def test_a_missing_shard_in_the_cache_is_named(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (hub.folder / "model.safetensors").rename(hub.folder / "model-00001-of-00002.safetensors")
    message = "lacks model-00002-of-00002.safetensors, 1 of 2 weight files missing"
    check_refused(ask(home, hub.url), 2, message)


def test_patterns_take_the_root_and_the_drafter_only() -> None:
    assert all(pattern.removeprefix("drafter/").count("/") == 0 for pattern in PATTERNS)
    assert not any(pattern.startswith("*") for pattern in PATTERNS)


# --- mlx_gemma4.fit ----------------------------------------------------------------------------


def fit(model: object, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mlx_gemma4.fit", str(model), *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


def test_a_repository_is_measured_by_its_files_headers(hub: Hub, tmp_path: Path) -> None:
    write_drafter(hub.folder / "drafter")
    home = tmp_path / "home"
    found = fit(ID, environment(home, hub.url))
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == fit(hub.folder, environment(home, hub.url)).stdout.replace(str(hub.folder), ID)
    assert "drafter" in found.stdout
    assert not list(snapshot(home).rglob("*.safetensors"))
    assert sorted(hub.fetched) == [
        "config.json", "drafter/config.json", "drafter/model.safetensors", "generation_config.json",
        "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    alone = fit(ID, environment(home, hub.url), "--drafter", "none")
    assert alone.returncode == 0 and "drafter" not in alone.stdout


def test_a_downloaded_repository_is_measured_without_network(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    subprocess.run(words(ID), capture_output=True, timeout=60, env=environment(home, hub.url))
    found = fit(ID, environment(home, "http://127.0.0.1:9"), "--drafter", "none")
    assert found.returncode == 0, found.stderr


def test_a_repository_that_cannot_be_measured_is_one_line(hub: Hub, tmp_path: Path) -> None:
    own = environment(tmp_path / "home", hub.url)
    (hub.folder / "model.safetensors").write_bytes(b"12345678901234567890")
    for change, status, message in (
        (lambda: None, 2, "model.safetensors of someone/tiny is no safetensors file"),
        ((hub.folder / "model.safetensors").unlink, 2, "someone/tiny has no model.safetensors"),
        (
            lambda: hub.fails.update({f"/{ID}/resolve/main/model": (500, "")}),
            1,
            "model.safetensors of someone/tiny is ",
        ),
    ):
        change()
        found = fit(ID, own, "--drafter", "none")
        assert (found.returncode, found.stdout) == (status, ""), found.stderr
        assert found.stderr.startswith("error: ") and message in found.stderr and found.stderr.count("\n") == 1
