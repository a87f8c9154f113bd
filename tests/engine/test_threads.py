"""A model used from a second thread."""

import subprocess
import sys

SCRIPT = """
import sys, threading
import mlx.core as mx
from mlx_gemma4 import Sampling, generate, load

model, processor = load("demo")

def work():
    print(generate(model, processor, "What is 3 + 4?", sampling=Sampling(temperature=0)).text)
    mx.clear_streams()

thread = threading.Thread(target=work)
thread.start()
thread.join()
sys.exit(7)
"""


def test_a_thread_that_clears_its_streams_leaves_the_process_its_own_status() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (7, "3 + 4 = 7.\n")
