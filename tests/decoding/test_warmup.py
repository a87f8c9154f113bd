import gc
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gemma4 import Sampling
from mlx_gemma4.decoding import warmup
from mlx_gemma4.decoding.round import State, first_state, launch, make_round, plain_round
from mlx_gemma4.decoding.sampling import Sampler
from mlx_gemma4.decoding.warmup import FIRST_ROUNDS, Warmup, kernel_folder
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt

IDS = [2, 5, 9, 14]


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch, compiled_rounds: None, tmp_path: Path) -> Path:
    """The real Warmup, with an empty folder for temporary files."""
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


def one_kernel() -> None:
    mx.eval(mx.compile(lambda x: mx.tanh(x * 3.25) + x)(mx.arange(9.0)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_rounds_give_what_compiled_ones_give(tiny: tuple[Model, Processor], temperature: float) -> None:
    model, _ = tiny
    sampler = Sampler(Sampling(temperature), model.config.generation, model.config.text.vocab_size)

    def tokens_by(make: object) -> list[list[int]]:
        caches = model.caches(64)
        for hidden in model.read(Prompt(token_ids=IDS), caches):  # noqa: B007
            pass
        state: State = first_state(model, sampler, IDS, hidden[:, -1:], 7)
        found = []
        for _ in range(6):
            tokens, state = launch(make(model, sampler.stages, 0), state, caches)  # type: ignore[operator]
            found.append(tokens.tolist())
        return found

    assert tokens_by(plain_round) == tokens_by(make_round)


def test_another_process_is_started_for_longer_replies_only(
    tiny: tuple[Model, Processor], unpatched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(Warmup, "start", lambda self, task: started.append(self))
    own = Warmup(tiny[0], "law")
    assert not any(own.is_done(one_kernel) for _ in range(FIRST_ROUNDS))
    assert not started
    own.is_done(one_kernel)
    assert started == [own]
    own.is_done(one_kernel)
    assert started == [own]  # it could not be started: no second trial


def test_a_large_model_stays_plain(
    tiny: tuple[Model, Processor], unpatched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Warmup, "start", lambda self, task: pytest.fail("started"))
    monkeypatch.setattr(warmup, "LARGEST", 0)
    own = Warmup(tiny[0], "law")
    assert not any(own.is_done(one_kernel) for _ in range(FIRST_ROUNDS + 2))


def test_on_a_gpu_and_without_a_compiler_there_is_nothing_to_wait_for(
    tiny: tuple[Model, Processor], unpatched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert Warmup(tiny[0], "law").is_done(one_kernel)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert Warmup(tiny[0], "law").is_done(one_kernel)


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="MLX compiles with g++ on Linux")
def test_what_another_process_has_built_is_found(tiny: tuple[Model, Processor], unpatched: Path) -> None:
    own = Warmup(tiny[0], "law")
    child = own.start(one_kernel)
    assert child is not None and child.wait(120) == 0
    folder = kernel_folder(unpatched)
    assert [file.suffix for file in folder.iterdir() if file.name != own.mark] == [".so"]
    assert [file.name for file in unpatched.iterdir()] == ["mlx"]  # what it needed itself is gone
    assert Warmup(tiny[0], "law").is_done(one_kernel)
    assert not Warmup(tiny[0], "another law").is_done(one_kernel)


def is_there(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_model_may_be_gone_before_the_other_process_ends(tiny: tuple[Model, Processor], unpatched: Path) -> None:
    """No warning, which is an error here, and no process whose end nobody has taken note of."""
    child = Warmup(tiny[0], "law").start(partial(time.sleep, 1))
    assert child is not None
    number = child.pid
    del child
    gc.collect()
    end = time.monotonic() + 60
    while is_there(number) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_there(number)
