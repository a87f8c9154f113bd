"""On a CPU: rounds run plain until their fused kernels are there, which another process builds meanwhile.

MLX compiles each of some 70 kernels with g++, a second each, and the process waits. So a process beside this one runs
the same rounds once, in a folder of its own and with MLX's header compiled ahead, which makes a kernel five times as
fast; then it puts the libraries where MLX looks for them. Nothing of this happens on a GPU.
"""

import copyreg
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import mlx
import mlx.core as mx

from mlx_gemma4 import __version__
from mlx_gemma4.config import COMPUTING
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.load import parameters

FIRST_ROUNDS = 16  # shorter replies do without
LARGEST = 1e9  # bytes of weights: the rounds of a larger model take so long that kernels would gain less than a percent
NICENESS = 5

# In a process that has not even the package's path; it ends by itself, also after the one that started it.
CHILD = "import sys, pickle; own = sys.stdin.buffer; sys.path[:] = pickle.load(own); pickle.load(own)()"


def kernel_folder(temporary: Path) -> Path:
    """Where MLX keeps what it compiled, and looks for it."""
    return temporary / "mlx" / version("mlx") / "cpu"


def named_dtype(name: str) -> mx.Dtype:
    return COMPUTING[name]


class Warmup:
    """Of the rounds of one model with one law of choice: whether they have their kernels."""

    def __init__(self, model: Model, law: object):
        self.rounds = 0
        self.child: subprocess.Popen[bytes] | None = None
        self.done = mx.default_device().type != mx.cpu or shutil.which("g++") is None  # without, MLX fuses nothing
        if self.done:
            return
        arrays = parameters(model)
        shapes = [(path, array.shape, array.dtype) for path, array in arrays.items()]
        described = repr((__version__, model.config, shapes, law)).encode()
        self.mark = f"rounds-{hashlib.blake2b(described, digest_size=16).hexdigest()}"
        self.small = sum(array.nbytes for array in arrays.values()) <= LARGEST
        self.done = self.small and (kernel_folder(Path(tempfile.gettempdir())) / self.mark).exists()

    def is_done(self, task: Callable[[], None]) -> bool:
        """Asked before each round. After some the other process is started.

        task: runs these rounds, compiled; it is pickled, and not kept, for it holds the model that keeps this.
        """
        if self.done or not self.small:
            return self.done
        self.rounds += 1
        if self.child is not None:
            self.done = self.child.poll() == 0
        elif self.rounds > FIRST_ROUNDS:
            self.child = self.start(task)
            self.small = self.child is not None
        return self.done

    def start(self, task: Callable[[], None]) -> subprocess.Popen[bytes] | None:
        copyreg.pickle(mx.Dtype, lambda dtype: (named_dtype, (str(dtype).removeprefix("mlx.core."),)))
        try:
            with tempfile.TemporaryFile() as file:
                pickle.dump(sys.path, file)
                pickle.dump(partial(build, task, self.mark), file)
                file.seek(0)
                child = subprocess.Popen(
                    [sys.executable, "-c", CHILD], stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
        except OSError:  # no room, no right, no memory: plain rounds are right too
            return None
        Thread(target=child.wait, daemon=True).start()  # its end is taken note of though the model be gone by then
        return child


def build(task: Callable[[], None], mark: str) -> None:
    """What the other process does."""
    os.nice(NICENESS)
    shared = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="mlx_gemma4-") as own:
        folder, target = kernel_folder(Path(own)), kernel_folder(shared)
        folder.mkdir(parents=True)
        target.mkdir(parents=True, exist_ok=True)
        for library in target.glob("lib*.so"):
            shutil.copy(library, folder)
        known = {file.name for file in folder.iterdir()}
        os.environ["TMPDIR"] = own
        compile_header(folder)
        task()
        for library in folder.glob("lib*.so"):
            if library.name not in known:
                library.replace(target / library.name)  # whole at once, for a process that looks for it now
        (target / mark).touch()


def compile_header(folder: Path) -> None:
    """Compile what all kernels include; g++ finds it beside them, and takes it if it fits."""
    name, include = "mlx/backend/cpu/compiled_preamble.h", Path(next(iter(mlx.__path__))) / "include"
    result = folder / f"{name}.gch"
    result.parent.mkdir(parents=True)
    options = ["-std=c++17", "-O3", "-Wall", "-fPIC", "-shared", f"-I{include}"]  # as MLX's own
    subprocess.run(["g++", *options, "-x", "c++-header", str(include / name), "-o", str(result)], check=False)
