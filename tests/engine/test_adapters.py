"""Of several adapters each row has its own, and gives what it gives where that adapter is the only one."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from adapters import random_adapter
from rounds import GREEDY
from toy_checkpoint import TINY

from mlx_gemma4 import Engine, Prompt, PromptStore, Session, collect, generate, load
from mlx_gemma4.agent.agent import Agent
from mlx_gemma4.engine.request import adapter_named
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.matrix import Adapted
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.adapter import write_adapter

Loaded = tuple[Model, Processor]
ASKED = [Prompt([2, *(110 + (place * 7 + length) % 300 for place in range(length))]) for length in (150, 40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("adapters") / name for name in ("one", "two")}
    for rank, (name, folder) in enumerate(found.items(), 2):
        adapter = random_adapter(TINY, rank=rank, dora=name == "two", seed=rank)
        write_adapter(folder, adapter, "dora" if name == "two" else "lora", rank, 0.4, -1)
    return found


def endless(folder: Path, adapter: Any) -> Loaded:
    model, processor = load(folder, adapter=adapter)
    model.config = replace(model.config, generation=replace(model.config.generation, eos_token_ids=()))
    return model, processor


@pytest.fixture(scope="module")
def several(planted_folder: Path, folders: dict[str, Path]) -> Iterator[Loaded]:
    yield endless(planted_folder, folders)


@pytest.fixture(scope="module")
def alone(planted_folder: Path, folders: dict[str, Path]) -> dict[tuple[str | None, int], list[int]]:
    """What each adapter says to each prompt, loaded alone."""
    found = {}
    for name in (None, *folders):
        loaded = endless(planted_folder, name and folders[name])
        for place, asked in enumerate(ASKED):
            reply = generate(*loaded, asked, max_tokens=20, sampling=GREEDY, draft_length=2)
            found[name, place] = reply.token_ids
    assert len({tuple(own) for own in found.values()}) == len(found)
    return found


@pytest.mark.parametrize("drafts", [0, 2])
def test_rows_of_one_batch_have_their_own(several: Loaded, alone: dict[Any, list[int]], drafts: int) -> None:
    with Engine(*several, max_batch=4) as engine:
        streams = {
            (name, place): engine.submit(
                ASKED[place], max_tokens=20, sampling=GREEDY, draft_length=drafts, adapter=name
            )
            for name, place in alone
        }
        assert {key: collect(stream).token_ids for key, stream in streams.items()} == alone


def test_what_was_read_with_one_is_found_with_that_one_alone(several: Loaded, alone: dict[Any, list[int]]) -> None:
    with Engine(*several, max_batch=4, store=PromptStore()) as engine:
        for name in (None, "one", "two"):
            first = collect(engine.submit(ASKED[0], max_tokens=20, sampling=GREEDY, adapter=name))
            assert (first.token_ids, first.stats.cached_tokens) == (alone[name, 0], 0)
        for name in ("two", None, "one"):
            longer = Prompt([*ASKED[0].token_ids, *alone[name, 0], 150, 151])
            again = collect(engine.submit(longer, max_tokens=9, sampling=GREEDY, adapter=name))
            fresh = generate(*several, longer, max_tokens=9, sampling=GREEDY, adapter=name)
            assert again.token_ids == fresh.token_ids
            assert again.stats.cached_tokens >= 128  # whole pages at least


def test_without_an_adapter_nothing_of_them_is_computed(
    several: Loaded, alone: dict[Any, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[mx.array | None] = []
    plain = Adapted.__call__
    monkeypatch.setattr(
        Adapted, "__call__", lambda self, x, adapters=None: given.append(adapters) or plain(self, x, adapters)
    )
    reply = generate(*several, ASKED[1], max_tokens=20, sampling=GREEDY, draft_length=1)
    assert reply.token_ids == alone[None, 1]
    assert given and all(own is None for own in given)
    assert generate(*several, ASKED[1], max_tokens=20, sampling=GREEDY, adapter="one").token_ids == alone["one", 1]
    assert any(own is not None for own in given)


def test_a_session_keeps_its_adapter(several: Loaded, planted: Loaded, tmp_path: Path) -> None:
    expected = {name: generate(*several, "hello", max_tokens=12, sampling=GREEDY, adapter=name).token_ids
                for name in (None, "one", "two")}  # fmt: skip
    for name, ids in expected.items():
        session = Session(*several, adapter=name)
        assert session.send("hello", max_tokens=12, sampling=GREEDY).token_ids == ids
    assert Agent(*several, adapter="one").send("hello", max_tokens=12, sampling=GREEDY).token_ids == expected["one"]
    session.save(tmp_path)
    again = Session.load(tmp_path, *several)
    assert again.settings.adapter == again.fork().settings.adapter == "two"
    reply = again.send("again", max_tokens=12, sampling=GREEDY)
    assert reply.stats is not None and reply.stats.cached_tokens > 0
    assert reply.token_ids == session.send("again", max_tokens=12, sampling=GREEDY).token_ids
    about = json.loads((tmp_path / "session.json").read_text())
    (tmp_path / "session.json").write_text(json.dumps(about | {"settings": about["settings"] | {"adapter": "three"}}))
    with pytest.raises(ValueError, match="holds a session with the adapter 'three'; expected one, two"):
        Session.load(tmp_path, *several)
    with pytest.raises(ValueError, match="adapter is 'three'; expected None, or one of one, two"):
        Session(*several, adapter="three")
    with pytest.raises(ValueError, match="adapter is 'one'; expected None: no adapter was loaded by name"):
        Agent(*planted, adapter="one")


def test_a_name_that_is_none_is_refused(several: Loaded, planted: Loaded, planted_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter is 'three'; expected None, or one of one, two"):
        generate(*several, "hello", adapter="three")
    with pytest.raises(ValueError, match="adapter is 'one'; expected None: no adapter was loaded by name"):
        generate(*planted, "hello", adapter="one")
    with Engine(*several) as engine, pytest.raises(ValueError, match="adapter is 3; expected None, or"):
        engine.submit("hello", adapter=3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="adapter has 'base'"):
        load(planted_folder, adapter={"base": tmp_path})
    assert adapter_named("any", (), "gemma") is adapter_named("gemma", ("one",), "gemma") is None
    with pytest.raises(ValueError, match="model is 'tow'; expected gemma, or an adapter's name: one, two"):
        adapter_named("tow", ("one", "two"), "gemma")
