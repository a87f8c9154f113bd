"""Checkpoints that are not as published: heads of their own, mixed types, strangers' files. Right, or one line."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from stored import stored_model
from toy_checkpoint import TINY, config, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, Sampling, generate, load
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.load import open_checkpoint, parameters
from mlx_gemma4.weights.tensors import INDEX

IDS = [2, 105, 300, 301, 107, 302, 303, 304, 106, 107, 105, 305]
Weights = dict[str, mx.array]
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def weights_of(folder: Path) -> Weights:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    mx.eval(found)
    return found


def write(folder: Path, weights: Weights, name: str = "model.safetensors") -> None:
    (folder / name).unlink(missing_ok=True)
    mx.save_safetensors(str(folder / name), weights, {"format": "pt"})


def edit_weights(folder: Path, **changes: Any) -> None:
    """By the end of a name: another array, or what makes one of the one that is there; None takes it away."""
    weights = weights_of(folder)
    for end, change in changes.items():
        name = next(name for name in weights if name.endswith(end.replace("__", ".")))
        value = change(weights[name]) if callable(change) else change
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    write(folder, weights)


def edit_json(file: Path, **changes: Any) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    for key, value in changes.items():
        holder = raw["text_config"] if key in raw.get("text_config", {}) and key not in raw else raw
        holder[key] = value
    file.write_text(json.dumps(raw))


def logits(model: Model) -> mx.array:
    return model.logits(Prompt(IDS))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, drafter=None)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


# --- a head of its own -------------------------------------------------------------------------


def head_matrix() -> mx.array:
    return mx.array(np.random.default_rng(5).standard_normal((TINY.vocab, TINY.hidden)).astype(np.float32) * 0.1)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_gives_the_logits(folder: Path, name: str, tied: bool) -> None:
    head = head_matrix()
    write(folder, weights_of(folder) | {name: head})
    edit_json(folder / "config.json", tie_word_embeddings=tied)
    model = load(folder)[0]
    hidden = mx.concatenate(list(model.read(Prompt(IDS), model.caches(len(IDS)))), axis=1)
    expected = mx.tanh(hidden @ head.T / 30) * 30
    assert mx.allclose(logits(model), expected, atol=1e-4)
    assert not model.config.text.tie_word_embeddings


def test_a_copy_of_the_embedding_is_no_head_of_its_own(tiny_folder: Path, folder: Path) -> None:
    weights = weights_of(folder)
    write(folder, weights | {"lm_head.weight": mx.array(weights[EMBEDDING])})
    edit_json(folder / "config.json", tie_word_embeddings=False)
    whole, plain = open_checkpoint(folder, None), open_checkpoint(tiny_folder, None)
    assert whole.config.text.tie_word_embeddings and whole.footprint == plain.footprint
    assert mx.array_equal(logits(load(folder)[0]), logits(load(tiny_folder)[0]))


def test_an_untied_head_that_is_not_there_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert refusal(folder) == "tie_word_embeddings is False and there is no lm_head.weight; expected it, or True"


def test_drafts_and_plain_replies_agree_with_a_head_of_its_own(folder: Path) -> None:
    write(folder, weights_of(folder) | {"lm_head.weight": head_matrix()})
    write_drafter(folder / "drafter")
    model, processor = load(folder)
    replies = [
        generate(model, processor, Prompt(IDS), max_tokens=12, sampling=Sampling(temperature=0), draft_length=length)
        for length in (0, 2)
    ]
    assert replies[0].token_ids == replies[1].token_ids
    assert len(model.draft(Prompt(IDS), 2)) == 2


def test_a_drafters_own_head_takes_the_place_of_its_embedding(folder: Path) -> None:
    own = write_drafter(folder / "drafter")
    head = mx.array(np.random.default_rng(6).standard_normal((TINY.vocab, TINY.hidden // 2)).astype(np.float32))
    write(own, weights_of(own) | {"lm_head.weight": head})
    edit_json(own / "config.json", tie_word_embeddings=False)
    drafter = load(folder)[0].drafter
    assert drafter is not None and mx.array_equal(drafter.embed_tokens.weight, head)


# --- one computing type ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bfloat16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, with a drafter."""
    folder = write_checkpoint(tmp_path_factory.mktemp("types") / "model", dtype=mx.bfloat16)
    write_drafter(folder / "drafter", dtype=mx.bfloat16)
    return folder


@pytest.fixture
def copied(bfloat16_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bfloat16_folder, tmp_path / "bf16"))


def types(model: Model) -> set[mx.Dtype]:
    return {array.dtype for array in parameters(model).values()}


def test_float32_norms_do_not_make_a_bfloat16_checkpoint_float32(copied: Path) -> None:
    weights = {
        name: value.astype(mx.float32) if "norm" in name or "scalar" in name else value
        for name, value in weights_of(copied).items()
    }
    write(copied, weights)
    checkpoint = open_checkpoint(copied, None)
    assert checkpoint.config.dtype == mx.bfloat16 and checkpoint.footprint.item_bytes == 2
    model = load(copied)[0]
    assert types(model) == {mx.bfloat16}
    caches = model.caches(len(IDS))
    assert {part.dtype for part in model.read(Prompt(IDS), caches)} == {mx.bfloat16}
    assert {array.dtype for own in caches.arrays for array in own} == {mx.bfloat16}
    assert checkpoint.footprint.weights == sum(
        array.nbytes for path, array in parameters(model).items() if not path.startswith("drafter.")
    )


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_all_that_floats_has_the_type_that_is_asked_for(bfloat16_folder: Path, name: str) -> None:
    model = load(bfloat16_folder, dtype=name)[0]
    assert types(model) == {getattr(mx, name)} and model.drafter is not None
    assert mx.isfinite(logits(model)).all()


def test_a_type_that_is_none_is_refused(bfloat16_folder: Path) -> None:
    for wrong in ("int8", "bf16", ""):
        with pytest.raises(ValueError, match=rf"^dtype is {wrong!r}; expected one of bfloat16, float16, float32$"):
            load(bfloat16_folder, dtype=wrong)


def converted(source: Path, folder: Path, bits: int = 4, mode: str = "affine") -> Path:
    """Quantized as MLX's own converters do, with group size 32."""
    model = stored_model(source, None, mx.bfloat16)
    nn.quantize(model, 32, bits, mode=mode)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "drafter"))
    names = {
        path.replace("language_model.", "language_model.model.", 1): own for path, own in parameters(model).items()
    }
    write(folder, names)
    edit_json(folder / "config.json", quantization={"group_size": 32, "bits": bits, "mode": mode})
    return folder


def test_scales_follow_and_packed_weights_stay(bfloat16_folder: Path, tmp_path: Path) -> None:
    affine = converted(bfloat16_folder, tmp_path / "affine")
    assert open_checkpoint(affine, None).config.dtype == mx.bfloat16
    assert types(load(affine, dtype="float16")[0]) == {mx.float16, mx.uint32}
    micro = converted(bfloat16_folder, tmp_path / "mxfp4", mode="mxfp4")
    assert open_checkpoint(micro, None).config.dtype == mx.bfloat16
    assert types(load(micro, dtype="float16")[0]) == {mx.float16, mx.uint32, mx.uint8}


def test_float32_scales_are_the_type_of_their_checkpoint(bfloat16_folder: Path, tmp_path: Path) -> None:
    folder = converted(bfloat16_folder, tmp_path / "affine")
    weights = weights_of(folder)
    write(folder, {name: own.astype(mx.float32) if name.endswith(("scales", "biases")) else own
                   for name, own in weights.items()})  # fmt: skip
    assert open_checkpoint(folder, None).config.dtype == mx.float32


@pytest.fixture
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "applegpu_g13s"})
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: 2**34)


@pytest.mark.usefixtures("emulating")
def test_float16_stands_in_for_an_emulated_bfloat16(
    bfloat16_folder: Path, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlx_gemma4")
    assert open_checkpoint(bfloat16_folder, None).config.dtype == mx.float16
    assert [record.message for record in caplog.records] == [
        "computes in float16: this GPU emulates the checkpoint's bfloat16"
    ]
    assert open_checkpoint(bfloat16_folder, None, mx.bfloat16).config.dtype == mx.bfloat16
    assert open_checkpoint(tiny_folder, None).config.dtype == mx.float32
    folder = converted(bfloat16_folder, tmp_path / "q")
    assert open_checkpoint(folder, None).config.dtype == mx.float16
    edit_weights(folder, layers__0__mlp__up_proj__scales=lambda scales: scales * 1e-6)
    caplog.clear()
    assert open_checkpoint(folder, None).config.dtype == mx.bfloat16
    assert len(caplog.records) == 1 and "up_proj.scales" in caplog.records[0].message


@pytest.mark.usefixtures("emulating")
def test_a_single_number_without_a_place_is_left_out(copied: Path) -> None:
    write(copied, weights_of(copied) | {"model.vision_tower.input_max": mx.array(1.5, mx.bfloat16)})
    assert open_checkpoint(copied, None).config.dtype == mx.float16


@pytest.mark.parametrize(("name", "expected"), [
    ("applegpu_g13g", True), ("applegpu_g13d", True), ("applegpu_g14s", True), ("applegpu_g15s", False),
    ("applegpu_g16g", False), ("applegpu_g17s", False), ("x86_64", False), ("sm_90", False),
])  # fmt: skip
def test_the_chips_that_emulate_bfloat16(
    bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: bool
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": name})
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: 2**34)
    assert (open_checkpoint(bfloat16_folder, None).config.dtype == mx.float16) is expected


def test_what_float16_has_no_room_for(copied: Path) -> None:
    edit_weights(copied, layers__2__post_attention_layernorm__weight=lambda own: own * 1e5)
    found, expected = (logits(load(copied, dtype=dtype)[0]) for dtype in ("float16", "float32"))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # all in a unit that has room
    edit_weights(copied, layers__2__mlp__up_proj__weight=lambda own: own * 1e6)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds \S+, beyond float16; expected bfloat16"):
        load(copied, dtype="float16")


# --- quantization ------------------------------------------------------------------------------


def test_a_mode_that_does_not_fit_the_stored_types_is_refused(bfloat16_folder: Path, tmp_path: Path) -> None:
    affine = converted(bfloat16_folder, tmp_path / "affine")
    edit_json(affine / "config.json", quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"})
    assert "scales' is stored as BF16 and config.json says mode mxfp4; expected U8" in refusal(affine)
    micro = converted(bfloat16_folder, tmp_path / "micro", mode="mxfp4")
    edit_json(micro / "config.json", quantization={"group_size": 32, "bits": 4})
    assert "scales' is stored as U8 and config.json says mode affine; expected BF16, F16 or F32" in refusal(micro)


def test_entries_without_a_mode_are_affine(bfloat16_folder: Path, tmp_path: Path) -> None:
    folder = converted(bfloat16_folder, tmp_path / "affine")
    expected = logits(load(folder)[0])
    names = {name.removesuffix(".scales") for name in weights_of(folder) if name.endswith(".scales")}
    own: dict[str, Any] = {name: {"group_size": 32, "bits": 4} for name in names}
    edit_json(folder / "config.json", quantization={"group_size": 32, "bits": 8, "mode": "mxfp8"} | own)
    assert mx.array_equal(logits(load(folder)[0]), expected)


# --- strangers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", "module.", "some.wrapper."])
def test_an_unknown_prefix_is_named(folder: Path, prefix: str) -> None:
    write(folder, {prefix + name: value for name, value in weights_of(folder).items()})
    assert f"its names have '{prefix}" in refusal(folder)


@pytest.mark.parametrize(("part", "whose"), [
    ("qweight", "GPTQ's or AWQ's"), ("weight_packed", "compressed-tensors'"), ("weight_scale", "fp8's"),
    ("lora_A.weight", "a LoRA adapter's"),
])  # fmt: skip
def test_tensors_of_other_libraries_are_named(folder: Path, part: str, whose: str) -> None:
    write(folder, {name.replace("proj.weight", f"proj.{part}"): own for name, own in weights_of(folder).items()})
    assert whose in refusal(folder)


def shard(folder: Path, count: int, keep: bool = True) -> None:
    names = sorted(weights := weights_of(folder))
    for number in range(count):
        own = {name: weights[name] for name in names[number::count]}
        write(folder, own, f"model-{number + 1:05}-of-{count:05}.safetensors")
    if not keep:
        (folder / "model.safetensors").unlink()


Damage = Callable[[Path], Any]
REFUSED: list[tuple[str, Damage]] = [
    ("two sets of weights", lambda folder: shard(folder, 2)),
    ("two sets of weights", lambda folder: (shard(folder, 2), shard(folder, 3, keep=False))),
    ("is in model", lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-old.safetensors")),
    ("lacks model-00002-of-00003", lambda folder: (
        shard(folder, 3, keep=False), (folder / "model-00002-of-00003.safetensors").unlink())),
    ("names of one tensor", lambda folder: write(folder, weights_of(folder) | {
        "language_model.model.norm.weight": mx.ones((TINY.hidden,))})),
    ("norm.weight is stored as I32; expected BF16 or F16 or F32", lambda folder: edit_weights(
        folder, language_model__norm__weight=lambda own: own.astype(mx.int32))),
    ("q_proj.weight is stored as U8", lambda folder: edit_weights(
        folder, layers__1__self_attn__q_proj__weight=lambda own: own.astype(mx.uint8))),
    ("names '../model.safetensors'", lambda folder: edit_json(
        folder / INDEX, weight_map={"a": "../model.safetensors"})),
    ("names '/etc/passwd'", lambda folder: edit_json(folder / INDEX, weight_map={"a": "/etc/passwd"})),
    ("names 'a\\x00b'", lambda folder: edit_json(folder / INDEX, weight_map={"a": "a\x00b"})),
    ("names 5", lambda folder: edit_json(folder / INDEX, weight_map={"a": 5})),
    ("suppress_tokens has all 512 tokens", lambda folder: edit_json(
        folder / "generation_config.json", suppress_tokens=list(range(512)))),
    ("head_dim is 2147483647", lambda folder: edit_json(folder / "config.json", head_dim=2**31 - 1)),
    ("hidden_size is 2147483647", lambda folder: edit_json(folder / "config.json", hidden_size=2**31 - 1)),
    ("vocab_size is 2147483647", lambda folder: edit_json(folder / "config.json", vocab_size=2**31 - 1)),
    ("sampling_rate of feature_extractor", lambda folder: edit_json(
        folder / "processor_config.json", feature_extractor={"sampling_rate": 2**31 - 1})),
    ("max_soft_tokens of image_processor", lambda folder: edit_json(
        folder / "processor_config.json", image_processor={"max_soft_tokens": 2**31 - 1})),
    ("config.json is not valid JSON", lambda folder: (folder / "config.json").write_text('{"a": ' + "9" * 5000 + "}")),
    ("generation_config.json is not valid JSON", lambda folder: (folder / "generation_config.json").write_text(
        '{"top_k": ' + "9" * 5000 + "}")),
    ("hidden_size is 2**13287…", lambda folder: edit_json(folder / "config.json", hidden_size=int("9" * 4000))),
    *((f"{name} is a folder", lambda folder, name=name: as_folder(folder / name)) for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "processor_config.json", INDEX)),
    ("model.safetensors", lambda folder: as_folder(folder / "model.safetensors")),
    ("tokenizer.json is not a tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}")),
    ("lacks its own unknown token", lambda folder: edit_tokenizer(folder, unk_token="<nowhere>")),
    ("holds a Unigram; expected Gemma 4's tokenizer, a BPE", lambda folder: edit_json(
        folder / "tokenizer.json", model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]})),
    ("is not a tokenizer", lambda folder: edit_json(
        folder / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
    ("expected valid Unicode", lambda folder: edit_json(folder / "tokenizer_config.json", bos_token="\ud800")),
    ("has no token 'üüü", lambda folder: edit_json(folder / "tokenizer_config.json", bos_token="ü" * 5000)),
    ("holds no valid chat template", lambda folder: (folder / "chat_template.jinja").write_text("{% if %}")),
]  # fmt: skip


def as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(("message", "damage"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_is_wrong_with_a_checkpoint_is_one_line(folder: Path, message: str, damage: Damage) -> None:
    damage(folder)
    assert message in refusal(folder)


def test_a_template_of_a_trainers_is_rendered_as_it_stands(folder: Path) -> None:
    turn = "{% generation %}{{ m.content }}|{% set x = 1 %}{% endgeneration %}"
    own = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    (folder / "chat_template.jinja").write_text(own)
    processor = load(folder)[1]
    assert processor([{"role": "user", "content": "a"}]).token_ids == [2, *processor.control.encode("a|")]


# --- stops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [None, 106, [1, 106], [50], []])
def test_the_published_stop_tokens_are_always_among_the_stops(folder: Path, stops: Any) -> None:
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=stops)
    model, processor = load(folder)
    assert set(model.config.generation.eos_token_ids) == {1, 106, 50}
    edit_json(folder / "generation_config.json", eos_token_id=[7, 106])
    assert set(load(folder)[1].config.generation.eos_token_ids) == {7, 1, 106, 50}
    assert config(TINY)["eos_token_id"] == [1, 106] and model.config == processor.config
