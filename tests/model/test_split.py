"""One model on several machines gives what one gives; here they are processes."""

import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters import random_adapter
from hypothesis import given
from hypothesis import strategies as st
from machines import started
from toy_checkpoint import OTHER, Shape, tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, PromptStore, Sampling, generate, load
from mlx_gemma4.config import read_config
from mlx_gemma4.model.split import SPLITS, borders, layer_shares, shares
from mlx_gemma4.weights import load as loading
from mlx_gemma4.weights.adapter import write_adapter
from mlx_gemma4.weights.link import Link, even_latency, time_link, time_reading, token_seconds
from mlx_gemma4.weights.load import DEMO, Headers, choose, find_drafter, read_headers, shared_checkpoints
from mlx_gemma4.weights.peers import together
from mlx_gemma4.weights.sharing import LAYER
from mlx_gemma4.weights.tensors import EMBEDDING, list_tensors

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX was built without its ring")

SHAPE = Shape(hidden=64, mlp=192, heads=6, kv_heads=3, head_dim=16, global_head_dim=32, window=16, vocab=500)
TWICE = replace(SHAPE, periods=2)  # so that of two machines that share layers the first has a full one too
FOUR = replace(SHAPE, mlp=256, heads=8, kv_heads=4)
LAYERS = 6
ADAPTERS = ("one", "two")
IDS = [2, *(110 + 7 * number % 300 for number in range(60))]
QUESTION = [{"role": "user", "content": [
    {"type": "text", "text": "abc"}, {"type": "image", "image": DEMO / "samples/number.jpg"},
    {"type": "audio", "audio": DEMO / "samples/beeps.wav"},
]}]  # fmt: skip
FILM = [{"role": "user", "content": [
    {"type": "text", "text": "abc"}, {"type": "video", "video": DEMO / "samples/film.mp4"}
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
from mlx_gemma4.weights.load import parameters
from test_split import answers, exchanged
group = mx.distributed.init(strict=True, backend="ring")
folder, out, split, memories = sys.argv[1:]
memory = int(memories.split(",")[group.rank()]) * 2**30
loading.memory_limit = lambda: memory
model, processor = load(folder, group=group, split=split)
held = sum(array.nbytes for array in parameters(model).values()), mx.get_active_memory()
logits, replies = answers(model, processor)
np.savez(f"{out}/{group.rank()}.npz", **logits, **replies, held=held, **exchanged(model, processor))
"""
ADAPTED = """
import sys
import mlx.core as mx
import numpy as np
from test_split import adapted_answers
group = mx.distributed.init(strict=True, backend="ring")
folder, out, split, adapters = sys.argv[1:]
np.savez(f"{out}/{group.rank()}.npz", **adapted_answers(folder, adapters, group=group, split=split))
"""
HALVED = """
import sys
import mlx.core as mx
import numpy as np
from test_split import halved_answers
group = mx.distributed.init(strict=True, backend="ring")
folder, out, split = sys.argv[1:]
np.savez(f"{out}/{group.rank()}.npz", **halved_answers(folder, group=group, split=split))
"""
ALONE = """
from mlx_gemma4.weights import peers
peers.GATHERING = 2
peers.launched()
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
    prompts = {"long": Prompt(IDS), "media": processor(QUESTION, image_budget=70), "film": processor(FILM)}

    def reply(prompt: Prompt, **way: Any) -> Any:
        return generate(model, processor, prompt, max_tokens=6, repetition_detection="off", **way)

    replies = {name: reply(prompts["long"], **way).token_ids for name, way in WAYS.items()}
    replies |= {name: reply(prompts[name], **WAYS["drafted"]).token_ids for name in ("media", "film")}
    store = PromptStore()
    for turn in (IDS[:40], IDS):
        replies["stored"] = reply(Prompt(turn), store=store, **WAYS["drafted"]).token_ids
    told = reply(prompts["long"], logprobs=2, **WAYS["drafted"])
    replies["told"] = [best for token in told.logprobs for best in token["top"]]
    replies["form"] = reply(prompts["long"], response_format={"type": "json_object"}, **WAYS["drafted"]).token_ids
    replies["draft"] = model.draft(prompts["long"], 3)
    return {f"{kind}_logits": np.array(model.logits(prompt)) for kind, prompt in prompts.items()}, replies


def adapted_answers(folder: Path | str, adapters: Path | str, **where: Any) -> dict[str, np.ndarray]:
    """Of the logits with one adapter, and replies with each of two by name."""
    model, processor = load(folder, adapter=Path(adapters) / "one", **where)
    media = processor(QUESTION, image_budget=70)
    found = {"logits": np.array(model.logits(media))}
    model, processor = load(folder, adapter={name: Path(adapters) / name for name in ADAPTERS}, **where)
    for name in (None, *ADAPTERS):
        way = {"adapter": name, "max_tokens": 6, "repetition_detection": "off", "logprobs": 0} | WAYS["drafted"]
        replies = [generate(model, processor, prompt, **way) for prompt in (media, Prompt(IDS))]
        found[f"{name}_ids"] = np.array([reply.token_ids for reply in replies])
        found[str(name)] = np.array([[token["logprob"] for token in reply.logprobs] for reply in replies])
    return found


def halved_answers(folder: Path | str, dtype: str = "float16", **where: Any) -> dict[str, np.ndarray]:
    """Logits of a text and of media, and a reply with drafts."""
    model, processor = load(folder, dtype=dtype, **where)
    media = processor(QUESTION, image_budget=70)
    found = {name: np.array(model.logits(prompt)) for name, prompt in (("text", Prompt(IDS)), ("media", media))}
    reply = generate(model, processor, media, max_tokens=6, repetition_detection="off", **WAYS["drafted"])
    return found | {"ids": np.array(reply.token_ids)}


def exchanged(model: Any, processor: Any) -> dict[str, np.ndarray]:
    """How many exchanges a round takes, and of how many bytes from this machine."""
    sums, gathers, sizes, found = mx.distributed.all_sum, mx.distributed.all_gather, [], {}

    def counted(function: Any) -> Any:
        def own(x: mx.array, **rest: Any) -> mx.array:
            sizes.append(x.nbytes)
            return function(x, **rest)

        return own

    mx.distributed.all_sum, mx.distributed.all_gather = counted(sums), counted(gathers)
    for name in ("greedy", "drafted"):
        sizes.clear()
        generate(model, processor, Prompt(IDS), max_tokens=6, repetition_detection="off", **WAYS[name])
        rounds = sizes[sizes.index(4) + 1 :]  # behind the first token
        # not as many as a reply tells of: some are launched ahead. Each ends in how many are accepted, and a token
        found[f"round_{name}"] = np.array([len(rounds), sum(rounds)]) / rounds.count(8)
    mx.distributed.all_sum, mx.distributed.all_gather = sums, gathers
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("split") / "model", SHAPE)


def written(folder: Path, shape: Shape) -> Path:
    write_drafter(folder / "drafter", shape, planted=True, target_weights=tensors(shape, 0))
    return write_checkpoint(folder, shape)


def headers_of(folder: Path, adapter: Path | None = None) -> Headers:
    return read_headers(folder, find_drafter(folder, folder, "auto"), list_tensors, None, None, adapter, False)


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    return answers(*load(folder))


@pytest.mark.parametrize(
    ("split", "memories", "shape"),
    [("tensors", (16, 16), SHAPE), ("tensors", (24, 16, 16), SHAPE), ("layers", (16, 16), SHAPE),
     ("layers", (24, 16, 16), SHAPE), ("layers", (16, 16), TWICE), ("tensors", (16, 16, 16, 16), FOUR),
     ("layers", (16, 24, 16, 16), FOUR)],
)  # fmt: skip
def test_machines_give_together_what_one_gives(
    folder: Path, alone: tuple[dict[str, np.ndarray], dict[str, list[int]]], split: str, memories: Sequence[int],
    shape: Shape, tmp_path: Path,
) -> None:  # fmt: skip
    if shape != SHAPE:
        folder = written(tmp_path / "model", shape)
        alone = answers(*load(folder))
    own = ",".join(map(str, memories))
    machines = started(MACHINE, len(memories), tmp_path / "hosts.json", folder, tmp_path, split, own)
    ends = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * len(memories), ends
    logits, replies = alone
    headers = headers_of(folder)
    for rank in range(len(memories)):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, expected in logits.items():
            assert np.abs(found[name] - expected).max() < 1e-5 * np.abs(expected).max()
        assert {name: found[name].tolist() for name in replies} == replies
        check_exchanges(split, len(memories), found)
        planned = shared_checkpoints(headers, memories, rank, split)[split].footprint
        held, active = found["held"]
        assert held == planned.weights + planned.drafter and active == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("split", SPLITS)
def test_machines_share_adapters_too(folder: Path, split: str, tmp_path: Path) -> None:
    for rank, name in enumerate(ADAPTERS, 2):
        write_adapter(tmp_path / name, random_adapter(SHAPE, rank=rank, seed=rank), "lora", rank, 0.4, -1)
    machines = started(ADAPTED, 2, tmp_path / "hosts.json", folder, tmp_path, split, tmp_path)
    ends = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    expected = adapted_answers(folder, tmp_path)
    assert np.abs(np.diff([expected[name] for name in ("None", *ADAPTERS)], axis=0)).max(axis=2).min() > 0.01
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, own in expected.items():
            assert np.abs(found[name] - own).max() <= 1e-5 * np.abs(own).max() * (not name.endswith("_ids"))


# What is times how much: of products, of a residual stream and of attention's results beyond float16.
LARGE = {
    "as it is": {},
    "products": {"mlp.gate_proj.weight": 300.0, "mlp.up_proj.weight": 300.0},
    "residual": {"post_feedforward_layernorm.weight": 3e4},
    "attention": {"self_attn.o_proj.weight": 1e4},
    "final norm": {"language_model.norm.weight": 3e4},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("large", LARGE)
def test_float16_has_room_on_several_machines_too(folder: Path, split: str, large: str, tmp_path: Path) -> None:
    """Nearer to float32 than bfloat16 is on one, with the tokens that one gives."""
    made = Path(shutil.copytree(folder, tmp_path / "model"))
    arrays = mx.load(str(made / "model.safetensors"))
    for name in arrays:
        for ending, factor in LARGE[large].items():
            arrays[name] = arrays[name] * factor if name.endswith(ending) else arrays[name]
    mx.save_safetensors(str(made / "model.safetensors"), arrays)
    machines = started(HALVED, 2, tmp_path / "hosts.json", made, tmp_path, split)
    ends = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    exact, coarse = (halved_answers(made, dtype) for dtype in ("float32", "bfloat16"))
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    for name in ("text", "media"):
        assert np.array_equal(first[name], second[name])
        assert np.square(first[name] - exact[name]).mean() < 0.2 * np.square(coarse[name] - exact[name]).mean()
    assert first["ids"].tolist() == second["ids"].tolist() == halved_answers(made)["ids"].tolist()


def test_rows_of_no_whole_length_take_no_dora(folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, random_adapter(SHAPE, rank=2, dora=True), "dora", 2, 0.4, -1)
    headers = headers_of(folder, tmp_path)
    with pytest.raises(ValueError, match="the adapter is DoRA's, and no machine has whole rows of"):
        shared_checkpoints(headers, (16, 16), 0, "tensors")
    assert shared_checkpoints(headers, (16, 16), 0, None).keys() == {"layers"}


def check_exchanges(split: str, machines: int, found: Any) -> None:
    """At most two sums a layer, a gather of logits, and what was decided; or a hidden state from each to the next."""
    for name, drafts in (("greedy", 0), ("drafted", 3)):
        rows, decided = drafts + 1, 2 * 4
        hidden, logits = rows * SHAPE.hidden * 4, rows * -(-SHAPE.vocab // machines) * 4
        count, nbytes = (2 * LAYERS + 1, 2 * LAYERS * hidden + logits)
        if split == "layers":
            count, nbytes = machines - 1, (machines - 1) * hidden
        assert found[f"round_{name}"].tolist() == [count + 1 + (drafts > 0), nbytes + decided + 4 * drafts]


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


def test_a_machine_whose_peers_never_come_ends(tmp_path: Path) -> None:
    first, second = started(ALONE, 2, tmp_path / "hosts.json")
    second.kill()
    second.communicate()
    _, error = first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    expected = "error: not all machines came within 2 s; expected those of the hostfile, by mlx.launch"
    assert error.strip().splitlines()[-1] == expected


def test_an_address_is_one_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts.json").write_text(json.dumps([["10.0.0.1:5000"], ["10.0.0.1:5000"]]))
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    with pytest.raises(ValueError, match=r"^the hostfile has 10\.0\.0\.1:5000 twice; expected an address for each"):
        together()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read: "), ("{bad", "cannot be read: "), ("[]", "is no hostfile"), ("[[]]", "is no hostfile"),
     ('["10.0.0.1:5000"]', "is no hostfile"), ('[["10.0.0.1"]]', "is no hostfile"),
     ('[{"ssh": "one"}]', "is no hostfile")],
)  # fmt: skip
def test_a_hostfile_that_says_no_machines_is_told(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX divides by the number of machines, and the process ends by a signal."""
    file = tmp_path / "hosts.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(file))
    with pytest.raises(ValueError, match=message):
        together()


@given(st.integers(1, 40), st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
def test_parts_are_as_the_weights_and_none_is_empty(count: int, weights: list[int]) -> None:
    if len(weights) > count:
        return
    ends = borders(count, weights)
    parts = np.diff(ends)
    assert ends[0] == 0 and ends[-1] == count and (parts >= 1).all()
    for more, own in zip(weights, parts, strict=True):  # who may hold more holds no less, and equal ones alike
        assert all(own >= part - (more == less) for less, part in zip(weights, parts, strict=True) if more >= less)


def test_unequal_memories_get_whole_heads_and_groups(folder: Path) -> None:
    text = read_config(folder).text
    found = shares(text, [24, 16], 64)
    assert [own.heads for own in found] == [(0, 2), (2, 3)]
    assert [own.columns for own in found] == [(0, 128), (128, 192)]


@pytest.mark.parametrize(("shape", "machines"), [(SHAPE, 4), (OTHER, 2)])
def test_a_model_that_cannot_be_shared_so_is_refused(tmp_path: Path, shape: Shape, machines: int) -> None:
    text = read_config(write_checkpoint(tmp_path, shape)).text
    with pytest.raises(ValueError, match="key/value heads; expected"):
        shares(text, [16] * machines, 1)


@pytest.mark.parametrize("split", SPLITS)
def test_machines_hold_their_share_and_little_more(folder: Path, split: str) -> None:
    headers, memories = headers_of(folder), (24, 16)
    parts = [shared_checkpoints(headers, memories, rank, split)[split].footprint for rank in range(2)]
    sizes = {path: tensor.nbytes for path, tensor in headers.tensors.items()}
    twice = {
        "tensors": lambda path: "layers.5.self_attn.k_proj" in path or not LAYER.fullmatch(path),
        "layers": lambda path: path.startswith(EMBEDDING),
    }[split]
    expected = sum(sizes.values()) + sum(nbytes for path, nbytes in sizes.items() if twice(path))
    assert sum(own.weights + own.drafter for own in parts) == pytest.approx(expected, rel=0.03)


def test_layers_are_shared_by_memory_and_the_last_machine_has_what_the_drafter_reads(folder: Path) -> None:
    text = read_config(folder).text
    found = layer_shares(text, [1, 1, 1], [10] * LAYERS, (5, 5))
    assert [own.layers for own in found] == [(0, 2), (2, 4), (4, 6)]
    assert [own.layers for own in layer_shares(text, [8, 1], [10] * LAYERS, (5, 5))] == [(0, 4), (4, 6)]
    assert [own.layers for own in layer_shares(text, [1, 8], [10] * LAYERS, (5, 5))] == [(0, 1), (1, 6)]
    with pytest.raises(ValueError, match="6 machines share a model of 6 layers; expected fewer"):
        layer_shares(text, [1] * 6, [10] * LAYERS, (5, 5))


@pytest.mark.parametrize(("latency", "rate", "split"), [(1e-9, 1e12, "tensors"), (1.0, 1e12, "layers")])
def test_the_link_decides_on_the_split_and_one_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, latency: float, rate: float,
    split: str,
) -> None:  # fmt: skip
    by_layers: list[Any] = []
    monkeypatch.setattr(loading, "time_link", lambda group: Link(latency, rate))
    monkeypatch.setattr(loading, "time_reading", lambda dtype: 1e9)
    monkeypatch.setattr(loading, "read_a_token", lambda tensors, share, machines: 10**6 * (1 + (share in by_layers)))
    headers, group = headers_of(folder), mx.distributed.init()
    found = shared_checkpoints(headers, (16, 16), 1, None)
    assert list(found) == list(SPLITS)
    by_layers.append(found["layers"].share)
    reading = {name: [[1.0, 3.0], [2.0, 2.0]][name == "layers"] for name in SPLITS}
    text = headers.config.text
    even = even_latency(text, *reading.values())
    assert token_seconds("tensors", text, 4, reading["tensors"], Link(even, 1e30)) == pytest.approx(
        token_seconds("layers", text, 4, reading["layers"], Link(even, 1e30))
    )
    with caplog.at_level("INFO"):
        assert choose(headers.config, found, group) == split
    assert f"share the model by {split}: " in caplog.text and caplog.text.count("\n") == 1


def test_a_link_is_timed() -> None:
    found = time_link(mx.distributed.init())
    assert found.latency > 0 and found.rate > 0 and time_reading(mx.float32) > 0


def test_a_split_is_one_of_two_and_of_several_machines(folder: Path) -> None:
    with pytest.raises(ValueError, match="split is 'rows'; expected tensors or layers"):
        load(folder, split="rows")
    with pytest.raises(ValueError, match="split is 'layers' on one machine; expected several"):
        load(folder, split="layers")
