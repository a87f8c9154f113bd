import os
import subprocess
import sys
from pathlib import Path

AFTER = """
import os, sys
from mlx_gemma4 import generate, load
model, processor = load(sys.argv[1])
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    generate(model, processor, "hi", max_tokens=2)
except RuntimeError as error:
    print(error, flush=True)
    os._exit(3)
"""
BEFORE = """
import os, sys
from mlx_gemma4 import Engine, Session, generate, load
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
model, processor = load(sys.argv[1])
print(generate(model, processor, "hi", max_tokens=2).stats.generation_tokens, flush=True)
"""
THREAD = """
import sys
from threading import Thread
from mlx_gemma4 import load, stream_generate
model, processor = load(sys.argv[1])
stream = stream_generate(model, processor, "hi", max_tokens=20)
next(stream)
def read_on():
    try:
        next(stream)
    except RuntimeError as error:
        print(error, flush=True)
other = Thread(target=read_on)
other.start()
other.join()
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def test_a_fork_after_load_says_so_and_does_not_hang(tiny_folder: Path) -> None:
    done = python(AFTER, tiny_folder)
    assert done.returncode == 3, done.stderr
    assert "forked" in done.stdout and done.stdout.count("\n") == 1


def test_a_fork_before_load_loads_and_answers(tiny_folder: Path) -> None:
    """What is imported has not begun a thread of MLX's."""
    done = python(BEFORE, tiny_folder)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_stream_that_another_thread_reads_on_is_one_error(tiny_folder: Path) -> None:
    """MLX has no stream there, and the process ended with 134."""
    done = python(THREAD, tiny_folder)
    assert done.returncode == 0 and "read on by another thread; expected the one that began it" in done.stdout
