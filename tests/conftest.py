"""Checkpoints that many tests share, written once a run."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from machines import SPLIT
from toy_checkpoint import OTHER, TINY, Shape, tensors, write_checkpoint, write_drafter

from mlx_gemma4 import load
from mlx_gemma4.decoding.warmup import Warmup
from mlx_gemma4.model import matrix
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor


def pytest_configure() -> None:
    """Signals do what they do in a terminal, though a job in the background (&, nohup) inherits them ignored; and no
    example of hypothesis is too slow."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")  # a test asserts no time, on a busy one neither


@contextmanager
def joining() -> Iterator[None]:
    """While this lasts matrices are joined as on a GPU: a CPU leaves those of float32 apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "joins_float32", lambda: True)
        yield


@pytest.fixture(autouse=True)
def compiled_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no plain rounds, no other process."""
    monkeypatch.setattr(Warmup, "is_done", lambda self, task: True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("other"), OTHER, seed=1)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> tuple[Model, Processor]:
    return load(tiny_folder)


@pytest.fixture(scope="session")
def other(other_folder: Path) -> tuple[Model, Processor]:
    return load(other_folder)


# Large enough that arrays count which a prediction of memory knows, and not the bytes of a scalar here and there.
WIDE = Shape(hidden=256, mlp=1024, heads=8, kv_heads=4, head_dim=64, global_head_dim=128, window=128, vocab=65536)


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, with a drafter."""
    folder = write_checkpoint(tmp_path_factory.mktemp("wide"), WIDE)
    write_drafter(folder / "drafter", WIDE)
    return folder


def write_planted(folder: Path, shape: Shape, seed: int, plant: float) -> Path:
    """A model and, in its folder, a drafter that agrees with it often but not always."""
    write_checkpoint(folder, shape, seed, plant=plant)
    write_drafter(folder / "drafter", shape, seed, tensors(shape, seed, plant), planted=True)
    return folder


@pytest.fixture(scope="session")
def split_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_checkpoint(tmp_path_factory.mktemp("split") / "model", SPLIT)
    write_drafter(made / "drafter", SPLIT, planted=True, target_weights=tensors(SPLIT, 0))
    return made


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted"), TINY, seed=1, plant=2.2)


@pytest.fixture(scope="session")
def planted_other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted_other"), OTHER, seed=1, plant=1.5)


@pytest.fixture(scope="session")
def planted(planted_folder: Path) -> tuple[Model, Processor]:
    return load(planted_folder)


@pytest.fixture
def endless(planted: tuple[Model, Processor], monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Processor]:
    """That never says a stop token."""
    model, processor = planted
    generation = replace(model.config.generation, eos_token_ids=())
    monkeypatch.setattr(model, "config", replace(model.config, generation=generation))
    return model, processor


@pytest.fixture(scope="session")
def planted_other(planted_other_folder: Path) -> tuple[Model, Processor]:
    return load(planted_other_folder)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """A command's name and `main` to what runs it in this process: exit status, standard output, standard error."""

    def command(name: str, main: Callable[[], int]) -> Run:
        def run(*args: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
            status = main()
            return status, *capsys.readouterr()

        return run

    return command
