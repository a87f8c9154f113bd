"""The drafter: its proposals against transformers', the checkpoints it is refused or found in."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from rounds import GREEDY, Rounds, make_sampler, reference_drafts, reference_round
from stored import stored_model
from toy_checkpoint import OTHER, TINY, Shape, tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, generate, load
from mlx_gemma4.config import ModelConfig
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.arrange import arrange
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights import hub as hub_module
from mlx_gemma4.weights.hub import partners
from mlx_gemma4.weights.load import find_drafter, open_checkpoint

Loaded = tuple[Model, Processor]

GOLDEN = Path(__file__).parents[1].joinpath("data") / "golden_drafts.npz"
IDS = [2, 150, 160, 170, 180, 190, 200, 150]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Not planted: what they propose comes from all that they see."""
    root = tmp_path_factory.mktemp("drafters")
    return {
        name: write_drafter(root / name, shape, seed)
        for name, shape, seed in (("tiny", TINY, 0), ("other", OTHER, 1))
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, other_folder: Path) -> dict[str, Path]:
    return {"tiny": tiny_folder, "other": other_folder}


@pytest.fixture
def drafter(drafters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(drafters["tiny"], tmp_path / "drafter"))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


# --- proposals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["tiny", "other"])
def test_proposals_are_those_of_transformers_at_every_position(
    folders: dict[str, Path], drafters: dict[str, Path], golden: dict[str, np.ndarray], checkpoint: str
) -> None:
    model, _ = load(folders[checkpoint], drafter=drafters[checkpoint])
    ids, expected = golden[f"{checkpoint}/token_ids"].tolist(), golden[f"{checkpoint}/proposals"]
    assert len(ids) > 3 * model.config.text.attention["sliding_attention"].window
    assert len({tuple(row) for row in expected.tolist()}) > len(expected) / 2  # they depend on what is seen
    found = np.array([model.draft(Prompt(ids[: n + 1]), 3) for n in range(1, len(ids))])
    assert np.array_equal(np.where(expected < 0, -1, found), expected)


def test_the_reference_of_the_other_tests_proposes_the_same(planted: Loaded) -> None:
    for length in range(2, 60, 5):
        prompt = Prompt(np.random.default_rng(length).integers(110, 500, length).tolist())
        assert reference_drafts(planted[0], prompt, 3) == planted[0].draft(prompt, 3)


def test_what_cannot_be_drafted_or_read_is_refused(planted: Loaded) -> None:
    model, _ = planted
    with pytest.raises(ValueError, match=r"^the length of the draft is 0; expected a whole number, 1 or more$"):
        model.draft(Prompt(IDS), 0)
    beyond = Prompt([*IDS, 10**6])
    for call in (lambda: model.draft(beyond, 1), lambda: model.logits(beyond)):
        with pytest.raises(ValueError, match=r"^the prompt has the token id 1000000; the vocabulary has \d+$"):
            call()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_there_are_as_many_proposals_as_asked_for(planted: Loaded, length: int) -> None:
    assert planted[0].draft(Prompt(IDS), length) == planted[0].draft(Prompt(IDS), 7)[:length]


def test_suppressed_tokens_are_never_proposed(planted: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = planted
    before = model.draft(Prompt(IDS), 3)
    monkeypatch.setattr(model, "config", with_suppressed(model, before))
    assert not set(model.draft(Prompt(IDS), 3)) & set(before)


def with_suppressed(model: Model, tokens: list[int]) -> ModelConfig:
    config = model.config
    suppressed = (*config.generation.suppress_tokens, *tokens)
    return replace(config, generation=replace(config.generation, suppress_tokens=suppressed))


def test_drafting_needs_a_drafter_and_two_tokens(tiny: Loaded, planted: Loaded) -> None:
    with pytest.raises(ValueError, match=r"^the model has no drafter; expected one"):
        tiny[0].draft(Prompt(IDS), 3)
    with pytest.raises(ValueError, match=r"^the prompt has 1 token; expected at least 2"):
        planted[0].draft(Prompt(IDS[:1]), 3)
    assert len(planted[0].draft(Prompt(IDS[:2]), 3)) == 3


# --- where it comes from -----------------------------------------------------------------------


def test_the_subfolder_is_found_and_can_be_turned_off(planted_folder: Path, tiny_folder: Path) -> None:
    assert load(planted_folder)[0].drafter is not None
    assert load(planted_folder, drafter=None)[0].drafter is None
    assert load(tiny_folder)[0].drafter is None


@pytest.mark.parametrize("name", [str, Path])
def test_a_folder_that_is_named_goes_before_the_subfolder(
    planted_folder: Path, drafters: dict[str, Path], name: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mlx_gemma4"):
        named = load(planted_folder, drafter=name(drafters["tiny"]))[0]
    assert caplog.messages == [f"drafter: {drafters['tiny']}"]
    assert not mx.array_equal(
        named.drafter.embed_tokens.weight, load(planted_folder)[0].drafter.embed_tokens.weight
    )  # fmt: skip


def test_a_drafter_that_is_named_must_be_there(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder; expected a model folder or a hub id"):
        load(tiny_folder, drafter=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tiny_folder, drafter=tmp_path / "empty")


# --- what does not fit -------------------------------------------------------------------------


def text(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["text_config"].update(changes)


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "hidden": (lambda config: config.update(backbone_hidden_size=96), "backbone_hidden_size is 96; expected 64"),
    "vocabulary": (text(vocab_size=640), "vocab_size is 640; expected 512"),
    "sliding heads": (text(head_dim=32), "shape of sliding_attention is .*head_dim=32.*; expected .*head_dim=16"),
    "full heads": (text(global_head_dim=16), "shape of full_attention is .*head_dim=16.*; expected .*head_dim=32"),
    "key heads": (text(num_key_value_heads=1), "shape of sliding_attention is "),
    "window": (text(sliding_window=24), "shape of sliding_attention is .*window=24.*; expected .*window=16"),
}
OTHER_KINDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a target": (lambda config: config.update(model_type="gemma4_unified"), "model_type is 'gemma4_unified'; expected"),
    "nothing": (lambda config: config.pop("model_type"), "model_type is None; expected a drafter"),
    "ordered": (lambda config: config.update(use_ordered_embeddings=True), "use_ordered_embeddings is True; supported"),
    "own keys": (text(num_kv_shared_layers=2), "num_kv_shared_layers is 2; supported is all 4"),
    "no number of layers": (text(num_hidden_layers="é\n\x1b[31m"), r"is 4; supported is all 'é\\n"),
    "no width": (lambda config: config.pop("backbone_hidden_size"), "has no 'backbone_hidden_size'"),
    "no text": (lambda config: config.pop("text_config"), "has no 'text_config'"),
}


@pytest.mark.parametrize("what", [*MISFITS, *OTHER_KINDS])
def test_a_drafter_that_does_not_fit_is_refused_before_anything_is_loaded(
    tiny_folder: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    edit, message = (MISFITS | OTHER_KINDS)[what]
    edit_config(drafter, edit)
    monkeypatch.setattr(mx, "load", lambda *_: pytest.fail("tensors were loaded"))
    with pytest.raises(CheckpointError, match=message) as refused:
        load(tiny_folder, drafter=drafter)
    assert "\n" not in str(refused.value)
    assert ("the drafter does not fit the model" in str(refused.value)) == (what in MISFITS)


def test_a_target_is_no_drafter(tiny_folder: Path, other_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'gemma4_unified'; expected a drafter"):
        load(tiny_folder, drafter=other_folder)


def test_a_drafter_whose_tensors_are_wrong_is_refused(tiny_folder: Path, drafter: Path) -> None:
    file = str(drafter / "model.safetensors")
    weights = mx.load(file)
    assert isinstance(weights, dict)
    mx.eval(weights)
    some = {name: value for name, value in weights.items() if name != "post_projection.weight"}
    mx.save_safetensors(file, some)
    with pytest.raises(CheckpointError, match=r"lacks 1 of .* tensors, first drafter\.post_projection\.weight"):
        load(tiny_folder, drafter=drafter)
    mx.save_safetensors(file, weights | {"model.norm.weight": mx.ones((5,))})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[5\]; expected \[32\]"):
        load(tiny_folder, drafter=drafter)


# --- types and quantization --------------------------------------------------------------------


def save_quantized(folder: Path, drafter: nn.Module, group_size: int, bits: int) -> None:
    nn.quantize(drafter, group_size, bits)
    weights = dict(tree_flatten(drafter.parameters()))
    names = {path: path if "projection" in path.split(".")[0] else f"model.{path}" for path in weights}
    mx.save_safetensors(str(folder / "model.safetensors"), {names[path]: value for path, value in weights.items()})
    edit_config(folder, lambda config: config.update(quantization={"group_size": group_size, "bits": bits}))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_drafter_proposes_what_was_saved(tiny_folder: Path, drafter: Path, bits: int) -> None:
    saved = stored_model(tiny_folder, drafter)
    save_quantized(drafter, saved.drafter, 32, bits)
    arrange(saved)
    model = load(tiny_folder, drafter=drafter)[0]
    assert type(model.language_model.embed_tokens) is nn.Embedding  # the target's stays as it was
    for module in (model.drafter.embed_tokens, model.drafter.pre_projection, model.drafter.layers[3].self_attn.q_proj):
        assert (module.bits, module.group_size) == (bits, 32)
    for length in range(2, 40, 6):
        prompt = Prompt(np.random.default_rng(length).integers(110, 500, length).tolist())
        assert model.draft(prompt, 3) == saved.draft(prompt, 3)


@pytest.mark.parametrize("of_target", [mx.float32, mx.bfloat16], ids=str)
def test_a_bf16_drafter_drafts_and_nothing_is_upcast(tmp_path: Path, of_target: mx.Dtype) -> None:
    folder = write_checkpoint(tmp_path / "model", TINY, 1, of_target, plant=2.2)
    write_drafter(folder / "drafter", TINY, 1, tensors(TINY, 1, 2.2), planted=True, dtype=mx.bfloat16)
    model, _ = load(folder)
    assert {array.dtype for _, array in tree_flatten(model.drafter.parameters())} == {of_target}  # one type for all
    rounds = Rounds(model, make_sampler(model, GREEDY), Prompt(IDS[:4]))
    for _ in range(2):
        before = rounds.grown
        tokens = rounds.run(2)
        if of_target == mx.float32:  # on a CPU bf16 is slow
            assert tokens == reference_round(model, before, model.draft(before, 2))
    assert rounds.state["hidden"].dtype == of_target
    assert {array.dtype for arrays in rounds.caches.arrays for array in arrays} == {of_target}


def test_a_drafter_counts_as_memory_of_the_checkpoint(planted_folder: Path, tiny_folder: Path) -> None:
    target = open_checkpoint(planted_folder, None).nbytes
    model = stored_model(planted_folder)
    drafter = sum(array.nbytes for _, array in tree_flatten(model.drafter.parameters()))
    both = open_checkpoint(planted_folder, find_drafter(planted_folder, planted_folder, "auto"))
    assert both.nbytes == target + drafter


# --- a hub's partners --------------------------------------------------------------------------

# 4-bit groups are of 64 columns
WIDE = Shape(hidden=128, mlp=128)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(scope="module")
def wide_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drafter(tmp_path_factory.mktemp("wide_drafter"), WIDE)


Serve = Callable[..., list[str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """serve({hub id: folder}) makes a hub of these; it gives the list of what will be asked for."""

    def served(models: dict[str, Path], failure: Exception | None = None) -> list[str]:
        asked: list[str] = []

        def download(hub_id: str, patterns: list[str]) -> Path:
            asked.append(hub_id)
            if hub_id not in models:
                raise failure or CheckpointError(f"{hub_id!r} is no repository on the hub")
            return models[hub_id]

        monkeypatch.setattr(hub_module, "download", download)
        return asked

    return served


@pytest.mark.parametrize(
    ("hub_id", "expected"),
    [
        ("google/gemma-4-12B-it", ["google/gemma-4-12B-it-assistant"]),
        ("google/gemma-4-12B-it-qat-q4_0-unquantized", ["google/gemma-4-12B-it-qat-q4_0-unquantized-assistant"]),
        (
            "mlx-community/gemma-4-12B-it-4bit",
            [
                "mlx-community/gemma-4-12B-it-assistant-4bit",
                "mlx-community/gemma-4-12B-it-assistant",
                "google/gemma-4-12B-it-assistant",
            ],
        ),
        (
            "mlx-community/gemma-4-12B-it-qat-4bit",
            [
                "mlx-community/gemma-4-12B-it-qat-assistant-4bit",
                "mlx-community/gemma-4-12B-it-qat-assistant",
                "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant",
            ],
        ),
        (
            "lmstudio-community/gemma-4-12B-it-MLX-8bit",
            [
                "lmstudio-community/gemma-4-12B-it-assistant-MLX-8bit",
                "lmstudio-community/gemma-4-12B-it-assistant",
                "google/gemma-4-12B-it-assistant",
            ],
        ),
        ("someone/a-model-of-mine", []),
        ("google/gemma-4-12B", []),
    ],
)
def test_partners_are_the_owners_own_then_googles(hub_id: str, expected: list[str]) -> None:
    assert partners(hub_id) == expected


@pytest.mark.parametrize("hub_id", ["google/gemma-4-12B-it", "mlx-community/gemma-4-12B-it-4bit"])
def test_a_partner_in_full_precision_is_quantized_to_4_bits_and_named(
    wide_folder: Path, wide_drafter: Path, serve: Serve, caplog: pytest.LogCaptureFixture, hub_id: str
) -> None:
    asked = serve({hub_id: wide_folder, "google/gemma-4-12B-it-assistant": wide_drafter})
    with caplog.at_level(logging.INFO, "mlx_gemma4"):
        model, processor = load(hub_id)
    assert asked == [hub_id, *partners(hub_id)]
    assert caplog.messages == ["drafter: google/gemma-4-12B-it-assistant, quantized to 4 bits"]
    drafter = model.drafter
    for module in (
        drafter.embed_tokens,
        drafter.pre_projection,
        drafter.post_projection,
        *drafter.layers[0].mlp.inputs.joined,
    ):
        assert module.bits == 4
    assert type(model.language_model.embed_tokens) is nn.Embedding
    by_hand = stored_model(wide_folder, wide_drafter)
    nn.quantize(by_hand.drafter, 64, 4)
    arrange(by_hand)
    assert model.draft(Prompt(IDS), 3) == by_hand.draft(Prompt(IDS), 3)
    assert (
        generate(model, processor, Prompt(IDS), max_tokens=5, sampling=GREEDY, draft_length=2).stats.drafted_tokens > 0
    )


def test_a_partner_that_is_quantized_stays_as_it_is(
    wide_folder: Path, wide_drafter: Path, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(wide_drafter, tmp_path / "q"))
    save_quantized(folder, stored_model(wide_folder, wide_drafter).drafter, 32, 8)
    name = "mlx-community/gemma-4-12B-it-assistant-4bit"
    asked = serve({"mlx-community/gemma-4-12B-it-4bit": wide_folder, name: folder})
    with caplog.at_level(logging.INFO, "mlx_gemma4"):
        model, _ = load("mlx-community/gemma-4-12B-it-4bit")
    assert asked[1:] == [name]
    assert caplog.messages == [f"drafter: {name}"]
    assert (model.drafter.embed_tokens.bits, model.drafter.embed_tokens.group_size) == (8, 32)


def test_drafters_of_folders_and_drafters_that_are_named_keep_their_precision(
    wide_folder: Path, wide_drafter: Path, serve: Serve
) -> None:
    serve({"a/b": wide_drafter})
    assert type(load(wide_folder, drafter="a/b")[0].drafter.embed_tokens) is nn.Embedding
    assert type(load(wide_folder, drafter=wide_drafter)[0].drafter.embed_tokens) is nn.Embedding


def test_a_partner_of_another_kind_is_none(
    wide_folder: Path, wide_drafter: Path, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a repository of GGUF files no file is fetched."""
    serve({"me/gemma-4-12B-it": wide_folder, "me/gemma-4-12B-it-assistant": tmp_path,
           "google/gemma-4-12B-it-assistant": wide_drafter})  # fmt: skip
    with caplog.at_level(logging.INFO, "mlx_gemma4"):
        load("me/gemma-4-12B-it")
    assert caplog.messages == ["drafter: google/gemma-4-12B-it-assistant, quantized to 4 bits"]


@pytest.mark.parametrize("failure", [CheckpointError("gone"), ConnectionError("no network")], ids=str)
def test_without_a_partner_it_says_so_and_decodes_plainly(
    wide_folder: Path, serve: Serve, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    asked = serve({"google/gemma-4-12B-it": wide_folder}, failure)
    model, processor = load("google/gemma-4-12B-it")
    assert caplog.messages == ["no drafter was found for google/gemma-4-12B-it: it decodes plainly, more slowly"]
    assert asked == ["google/gemma-4-12B-it", "google/gemma-4-12B-it-assistant"]
    reply = generate(model, processor, Prompt(IDS), max_tokens=4, sampling=GREEDY)
    assert (reply.stats.drafted_tokens, reply.stats.tokens_per_round) == (0, 1)


def test_no_partner_is_looked_for_where_none_is_wanted(planted_folder: Path, tiny_folder: Path, serve: Serve) -> None:
    asked = serve({"google/gemma-4-12B-it": tiny_folder, "mlx-community/gemma-4-12B-it-4bit": planted_folder})
    assert load("google/gemma-4-12B-it", drafter=None)[0].drafter is None
    assert load("mlx-community/gemma-4-12B-it-4bit")[0].drafter is not None  # the subfolder goes before it
    assert load(tiny_folder)[0].drafter is None
    assert asked == ["google/gemma-4-12B-it", "mlx-community/gemma-4-12B-it-4bit"]


def test_a_partner_that_does_not_fit_is_an_error(tiny_folder: Path, wide_drafter: Path, serve: Serve) -> None:
    serve({"google/gemma-4-12B-it": tiny_folder, "google/gemma-4-12B-it-assistant": wide_drafter})
    with pytest.raises(CheckpointError, match=r"the drafter does not fit the model: its backbone_hidden_size is 128"):
        load("google/gemma-4-12B-it")
