"""One model on several machines gives what one gives; here they are processes."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import started
from toy_checkpoint import OTHER, Shape, tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, Sampling, generate, load
from mlx_gemma4.config import read_config
from mlx_gemma4.model.split import borders, shares

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX was built without its ring")

SHAPE = Shape(hidden=64, mlp=192, heads=6, kv_heads=3, head_dim=16, global_head_dim=32, window=16, vocab=500)
IDS = [2, *(110 + 7 * number % 300 for number in range(60))]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"draft_length": 0, "sampling": Sampling(temperature=0)},
    "drafted": {"draft_length": 3, "sampling": Sampling(temperature=0)},
    "auto": {"sampling": Sampling(temperature=0)},
    "seeded": {"draft_length": 2, "sampling": Sampling(temperature=1.0, seed=5)},
}
MACHINE = """
import sys
import mlx.core as mx
import numpy as np
from mlx_gemma4 import Prompt, load
from test_split import answers
group = mx.distributed.init(strict=True, backend="ring")
model, processor = load(sys.argv[1], group=group)
logits, tokens = answers(model, processor)
np.savez(f"{sys.argv[2]}/{group.rank()}.npz", logits=logits, layers=len(model.config.text.layer_types), **tokens)
"""
WAITING = """
import sys
import mlx.core as mx
from mlx_gemma4 import load
group = mx.distributed.init(strict=True, backend="ring")
model, _ = load(sys.argv[1], group=group)
print("loaded", flush=True)
if group.rank() == 1:
    import time; time.sleep(600)
mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
"""


def answers(model: Any, processor: Any) -> tuple[np.ndarray, dict[str, list[int]]]:
    prompt = Prompt(IDS)
    replies = {
        name: generate(model, processor, prompt, max_tokens=8, repetition_detection="off", **way).token_ids
        for name, way in WAYS.items()
    }
    return np.array(model.logits(prompt)), replies


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_checkpoint(tmp_path_factory.mktemp("split") / "model", SHAPE)
    write_drafter(made / "drafter", SHAPE, planted=True, target_weights=tensors(SHAPE, 0))
    return made


@pytest.mark.parametrize("count", [2, 3])
def test_machines_give_together_what_one_gives(folder: Path, count: int, tmp_path: Path) -> None:
    logits, tokens = answers(*load(folder))
    machines = started(MACHINE, count, tmp_path / "hosts.json", folder, tmp_path)
    ends = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * count, ends
    for rank in range(count):
        found = np.load(tmp_path / f"{rank}.npz")
        assert np.abs(found["logits"] - logits).max() < 1e-5 * np.abs(logits).max()
        assert {name: found[name].tolist() for name in WAYS} == tokens


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_that_is_gone_ends_the_others(folder: Path, number: int, tmp_path: Path) -> None:
    first, second = started(WAITING, 2, tmp_path / "hosts.json", folder)
    try:
        for machine in (first, second):
            assert machine.stdout is not None and machine.stdout.readline() == "loaded\n"
        time.sleep(0.5)
        second.send_signal(number)
        _, error = first.communicate(timeout=60)
        assert first.returncode == 1
        assert error.strip().splitlines()[-1].startswith("error: machine 127.0.0.1 is gone")
    finally:
        for machine in (first, second):
            machine.kill()
            machine.communicate()


@pytest.fixture
def group() -> Iterator[mx.distributed.Group]:
    yield mx.distributed.init()


@given(st.integers(1, 40), st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
def test_parts_are_as_the_weights_and_none_is_empty(count: int, weights: list[int]) -> None:
    if len(weights) > count:
        return
    ends = borders(count, weights)
    parts = np.diff(ends)
    assert ends[0] == 0 and ends[-1] == count and (parts >= 1).all()
    for more, own in zip(weights, parts, strict=True):  # who may hold more holds no less, and equal ones alike
        assert all(own >= part - (more == less) for less, part in zip(weights, parts, strict=True) if more >= less)


def test_unequal_memories_get_whole_heads_and_groups(folder: Path, group: mx.distributed.Group) -> None:
    text = read_config(folder).text
    found = shares(text, group, [24, 16], 64)
    assert [own.heads for own in found] == [(0, 2), (2, 3)]
    assert [own.columns for own in found] == [(0, 128), (128, 192)]


@pytest.mark.parametrize(("shape", "machines"), [(SHAPE, 4), (OTHER, 2)])
def test_a_model_that_cannot_be_shared_so_is_refused(
    tmp_path: Path, group: mx.distributed.Group, shape: Shape, machines: int
) -> None:
    text = read_config(write_checkpoint(tmp_path, shape)).text
    with pytest.raises(ValueError, match="key/value heads; expected"):
        shares(text, group, [16] * machines, 1)
