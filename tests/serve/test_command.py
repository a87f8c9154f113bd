"""The command as a process: how it begins, what it does when nobody asks, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")

STORY = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "max_tokens": 100}


def start(*options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "mlx_gemma4.serve", "--model", "demo", "--port", "0", *map(str, options)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def connected(process: "subprocess.Popen[str]", data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port_of(process)), timeout=60)
    connection.sendall(data)
    return connection


PORTS: dict[int, int] = {}


def port_of(process: "subprocess.Popen[str]") -> int:
    if process.pid not in PORTS:
        assert process.stderr is not None
        line = next(line for line in process.stderr if " serves " in line)
        PORTS[process.pid] = int(line.split()[0].rpartition(":")[2])
    return PORTS[process.pid]


def received(connection: socket.socket) -> str:
    found = b""
    while block := connection.recv(2**16):
        found += block
    return found.decode()


def test_a_signal_lets_what_runs_finish_and_holds_on_to_nothing_else() -> None:
    with start() as process:
        half = [connected(process, b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"), connected(process, b"")]
        body = json.dumps(STORY).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        with connected(process, head % len(body) + body) as connection:
            first = connection.recv(100)
            process.send_signal(signal.SIGTERM)
            assert received(connection).rstrip().endswith("data: [DONE]\n\n\r\n0") and b" 200 " in first
        assert process.wait(10) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
        for own in half:
            own.close()


def test_an_unfinished_body_does_not_hold_the_end_up() -> None:
    with start() as process:
        data = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
        with connected(process, data):
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_nothing_is_computed_when_nobody_asks() -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("counts ticks in /proc")
    with start() as process:
        with connected(process, b"GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n"):
            time.sleep(3)  # until the weights are there

        def ticks() -> int:
            return sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rsplit(")")[-1].split()[11:13]))

        before = ticks()
        time.sleep(2)
        assert ticks() - before <= 0.01 * 2 * os.sysconf("SC_CLK_TCK")
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "expected --api-key or --api-key-file"),
        (["--port", "70000"], "port is 70000; expected a number from 0 to 65535"),
        (["--max-batch", "99"], "max_batch is 99; expected a whole number from 1 to 16"),
        (["--max-queue", "-1"], "max_queue is -1; expected"),
        (["--unload-after", "0"], "unload_after is 0.0; expected seconds, above 0"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key-file", "/dev/null"], "the keys '/dev/null' cannot be read: it is a device; expected a file"),
        (["--allow-files", "/dev/null"], "--allow-files is '/dev/null'; expected a folder"),
        (["--model", "/nowhere"], "is no folder"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], said: str, in_process: object) -> None:
    from mlx_gemma4.serve import command

    status, out, error = in_process("mlx_gemma4.serve", command.main)("--model", "demo", *options)  # type: ignore[operator]
    assert status == 2 and not out and said in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_found_before_weights_are_loaded(in_process: object) -> None:
    from mlx_gemma4.serve import command

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run = in_process("mlx_gemma4.serve", command.main)  # type: ignore[operator]
        status, _, error = run("--model", "demo", "--port", port)
    assert status == 1 and f"cannot listen on 127.0.0.1:{port}" in error
