"""One model on several machines gives what one gives; here they are processes."""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import started
from toy_checkpoint import OTHER, Shape, tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, PromptStore, Sampling, generate, load
from mlx_gemma4.config import FULL, SLIDING, read_config
from mlx_gemma4.model.cache import sliding_slots
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.split import SPLITS, borders, layer_shares, shares
from mlx_gemma4.planner import Speeds, token_seconds
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.load import DEMO, find_drafter, look_through, parameters, part, shares_of
from mlx_gemma4.weights.sharing import work_of
from mlx_gemma4.weights.tensors import list_tensors

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX was built without its ring")

SHAPE = Shape(hidden=64, mlp=192, heads=6, kv_heads=3, head_dim=16, global_head_dim=32, window=16, vocab=500)
TWICE = replace(SHAPE, periods=2)  # so that the first of two machines that share layers has a full one
IDS = [2, *(110 + 7 * number % 300 for number in range(60))]
QUESTION = [{"role": "user", "content": [
    {"type": "text", "text": "abc"}, {"type": "image", "image": DEMO / "samples/number.jpg"},
    {"type": "audio", "audio": DEMO / "samples/beeps.wav"},
]}]  # fmt: skip
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
from mlx_gemma4 import load
from mlx_gemma4.weights import load as loading
from test_split import answers, counted
group = mx.distributed.init(strict=True, backend="ring")
folder, out, split, memories = sys.argv[1:]
memory = int(memories.split(",")[group.rank()]) * 2**30
loading.memory_limit = lambda: memory
model, processor = load(folder, group=group, split=split)
logits, replies = answers(model, processor)
np.savez(f"{out}/{group.rank()}.npz", **logits, **replies, **counted(model, processor))
"""
CHOOSING = """
import logging
import sys
import mlx.core as mx
from mlx_gemma4 import load
logging.basicConfig(level=logging.INFO, format="%(message)s")
group = mx.distributed.init(strict=True, backend="ring")
model, _ = load(sys.argv[1], group=group)
print(len(model.config.text.layer_types))
"""
WAITING = """
import sys
import mlx.core as mx
from mlx_gemma4 import load
group = mx.distributed.init(strict=True, backend="ring")
model, _ = load(sys.argv[1], group=group, split="tensors")
print("loaded", flush=True)
if group.rank() == 1:
    import time; time.sleep(600)
mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
"""


def answers(model: Any, processor: Any) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    prompts = {"long": Prompt(IDS), "media": processor(QUESTION, image_budget=70)}

    def reply(prompt: Prompt, **way: Any) -> Any:
        return generate(model, processor, prompt, max_tokens=8, repetition_detection="off", **way)

    replies = {name: reply(prompts["long"], **way).token_ids for name, way in WAYS.items()}
    replies["media"] = reply(prompts["media"], **WAYS["seeded"]).token_ids
    store = PromptStore()
    for turn in (IDS[:40], IDS):
        replies["stored"] = reply(Prompt(turn), store=store, **WAYS["drafted"]).token_ids
    formed = reply(prompts["long"], response_format={"type": "json_object"}, logprobs=2, **WAYS["drafted"])
    replies["formed"] = [best for token in formed.logprobs for best in token["top"]]
    replies["draft"] = model.draft(prompts["long"], 3)
    return {f"{kind}_logits": np.array(model.logits(prompt)) for kind, prompt in prompts.items()}, replies


def counted(model: Model, processor: Processor) -> dict[str, Any]:
    """Exchanges and their bytes in a round, plain and drafted, and bytes held."""
    found: dict[str, Any] = {"held": sum(array.nbytes for array in parameters(model).values())}
    found["caches"] = sum(array.nbytes for arrays in model.caches(1024).arrays for array in arrays)
    sent: list[int] = []
    exchanges = {name: getattr(mx.distributed, name) for name in ("all_sum", "all_gather")}
    for name, exchange in exchanges.items():

        def noted(x: mx.array, exchange: Any = exchange, **where: Any) -> mx.array:
            sent.append(x.nbytes)
            return exchange(x, **where)

        setattr(mx.distributed, name, noted)
    for name, way in (("plain", WAYS["greedy"]), ("drafted", WAYS["drafted"])):
        sent.clear()
        generate(model, processor, Prompt(IDS), max_tokens=6, repetition_detection="off", **way)
        in_rounds = sent[sent.index(4) + 1 :]  # behind the first token
        rounds = in_rounds.count(8)  # each ends in a decision: how many are accepted, and a token
        found[f"{name}_round"] = len(in_rounds) / rounds, sum(in_rounds) / rounds
    for name, exchange in exchanges.items():
        setattr(mx.distributed, name, exchange)
    return found


def written(folder: Path, shape: Shape) -> Path:
    write_drafter(folder / "drafter", shape, planted=True, target_weights=tensors(shape, 0))
    return write_checkpoint(folder, shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("split") / "model", SHAPE)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("twice") / "model", TWICE)


@pytest.mark.parametrize(
    ("split", "memories", "shape"),
    [("tensors", (16, 16), SHAPE), ("tensors", (24, 16, 16), SHAPE), ("layers", (24, 16), TWICE),
     ("layers", (24, 16, 16), SHAPE)],
)  # fmt: skip
def test_machines_give_together_what_one_gives(
    folder: Path, twice: Path, split: str, memories: Sequence[int], shape: Shape, tmp_path: Path
) -> None:
    folder = twice if shape == TWICE else folder
    logits, replies = answers(*load(folder))
    own = ",".join(map(str, memories))
    machines = started(MACHINE, len(memories), tmp_path / "hosts.json", folder, tmp_path, split, own)
    ends = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * len(memories), ends
    for rank in range(len(memories)):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, expected in logits.items():
            assert np.abs(found[name] - expected).max() < 1e-5 * np.abs(expected).max()
        assert {name: found[name].tolist() for name in replies} == replies
    check_counts([np.load(tmp_path / f"{rank}.npz") for rank in range(len(memories))], folder, split, memories, shape)


def check_counts(found: list[Any], folder: Path, split: str, memories: Sequence[int], shape: Shape) -> None:
    """A round exchanges no more, and a machine holds no more, than the way of splitting asks for."""
    machines, rows = len(found), -(-shape.vocab // len(found))
    hidden, layers = shape.hidden * 4, 6 * shape.periods
    for own in found:
        for name, length in (("plain", 1), ("drafted", 4)):
            decided = ((length > 1) * 3 + 2) * 4  # proposals; how many are accepted, and a token
            if split == "tensors":
                expected = 2 * layers + 2 + (length > 1), length * (2 * layers * hidden + rows * 4) + decided
            else:
                expected = machines - 1 + 1 + (length > 1), length * (machines - 1) * hidden + decided
            assert tuple(own[f"{name}_round"]) == expected, name
    checkpoint = look_through(folder, find_drafter(folder, folder, "auto"), list_tensors)
    shares = shares_of(checkpoint, mx.distributed.init(), [own * 2**30 for own in memories], split)
    sizes = {path: tensor.nbytes for path, tensor in checkpoint.tensors.items()}
    table = sizes["language_model.embed_tokens.weight"]
    twice = table  # what the split asks that more than one holds
    if split == "tensors":
        last = f"layers.{layers - 2}.self_attn"
        everywhere = re.compile(rf"drafter|.*embed|.*layers\.(5|11)\.self_attn\.k_proj|.*{last}\.[kv]_proj")
        twice = (machines - 1) * sum(nbytes for path, nbytes in sizes.items() if everywhere.match(path))
    assert sum(own["held"] for own in found) == pytest.approx(sum(sizes.values()) + twice, rel=0.03)
    for own, share in zip(found, shares, strict=True):  # as `fit` says of each
        footprint = part(checkpoint, share).footprint
        assert own["held"] == pytest.approx(footprint.weights + footprint.drafter, rel=0.001)
        caches = footprint.row_bytes(SLIDING) * sliding_slots(shape.window) + footprint.row_bytes(FULL) * 1024
        assert own["caches"] == caches


def test_the_link_is_timed_and_the_split_that_is_chosen_is_said(folder: Path, tmp_path: Path) -> None:
    machines = started(CHOOSING, 2, tmp_path / "hosts.json", folder)
    (out, said), (other, quiet) = [machine.communicate(timeout=120) for machine in machines]
    line = re.search(
        r"^split by (tensors|layers): at most [\d.]+ by tensors, [\d.]+ by layers tokens/s; .*$", said, re.M
    )
    assert line and "split by" not in quiet
    assert (int(out), int(other)) == (6, 6) if line[1] == "tensors" else int(out) + int(other) == 6


@pytest.mark.parametrize(("latency", "faster"), [(1e-5, "tensors"), (1e-2, "layers")])
def test_a_slow_link_asks_for_layers(folder: Path, group: mx.distributed.Group, latency: float, faster: str) -> None:
    checkpoint = look_through(folder, None, list_tensors)
    works = {
        split: work_of(checkpoint.tensors, shares_of(checkpoint, group, [1, 1], split), checkpoint.config.text, 4)
        for split in SPLITS
    }
    speeds = Speeds([1e9, 1e9], latency, 1e9)
    assert min(works, key=lambda split: token_seconds(works[split], speeds)) == faster
    by_hand = sum(works["layers"].read) / 1e9 + 2 * latency + (SHAPE.hidden * 4 + 8) / 1e9
    assert token_seconds(works["layers"], speeds) == pytest.approx(by_hand)


def test_layers_go_where_there_is_room(twice: Path, group: mx.distributed.Group) -> None:
    text = read_config(twice).text  # twelve layers, the sixth and the last of them full
    for memories, expected in (
        ([16, 16], [(0, 6), (6, 12)]),
        ([24, 8], [(0, 9), (9, 12)]),
        ([100, 1], [(0, 10), (10, 12)]),  # the drafter reads the last of both kinds
        ([1, 1, 1], [(0, 4), (4, 8), (8, 12)]),
    ):
        found = layer_shares(text, group, memories, [10] * 12, (0, 0))
        assert [own.layers for own in found] == expected
    assert [own.layers for own in layer_shares(text, group, [16, 16], [10] * 12, (0, 40))] == [(0, 8), (8, 12)]
    with pytest.raises(ValueError, match="12 machines share a model of 12 layers; expected fewer"):
        layer_shares(text, group, [16] * 12, [10] * 12, (0, 0))


@pytest.mark.parametrize("split", ["rows", "", 3])
def test_a_split_that_does_not_exist_is_refused(folder: Path, split: Any) -> None:
    with pytest.raises(ValueError, match=r"split is .*; expected tensors or layers"):
        load(folder, split=split)


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
