import os
import subprocess
import sys
from pathlib import Path

CODE = """
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


def test_a_fork_after_load_says_so_and_does_not_hang(tiny_folder: Path) -> None:
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(tiny_folder)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "forked" in done.stdout and done.stdout.count("\n") == 1
