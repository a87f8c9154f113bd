"""From folders of all kinds to models: naming, shards, quantization, types, memory, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from PIL import Image
from stored import stored_model
from toy_checkpoint import TINY, Shape, write_checkpoint

from mlx_gemma4 import Prompt, Sampling, generate, load
from mlx_gemma4.decoding import batch
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.arrange import arrange
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.load import find_folder, open_checkpoint
from mlx_gemma4.weights.tensors import INDEX, list_tensors

Loaded = tuple[Model, Processor]

IDS = [2, 105, 300, 301, 107, 302, 303, 304, 106, 107, 105, 305]


def read_weights(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def mlx_name(name: str) -> str:
    """Google's name for a tensor -> the one that MLX conversions write."""
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def logits(model: Model, ids: list[int] = IDS) -> mx.array:
    return model.logits(Prompt(ids))


def shards(weights: dict[str, mx.array], folder: Path, count: int) -> dict[str, str]:
    """Write the weights in `count` files instead of one; the weight map."""
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in names if where[name] == file})
    return where


# --- naming and files --------------------------------------------------------------------------


def test_mlx_names_and_shards_give_the_same_logits(tiny: Loaded, folder: Path) -> None:
    weights = {mlx_name(name): value for name, value in read_weights(folder).items()}
    where = shards(weights, folder, 3)
    expected = logits(tiny[0])
    assert mx.array_equal(logits(load(folder)[0]), expected)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert mx.array_equal(logits(load(folder)[0]), expected)


def test_an_index_decides_which_files_are_read(tiny: Loaded, folder: Path) -> None:
    where = shards(read_weights(folder), folder, 2)
    (folder / "model-old.safetensors").write_bytes(b"no safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    assert mx.array_equal(logits(load(folder)[0]), logits(tiny[0]))


def test_per_layer_config_gives_the_same_config_and_logits(tiny: Loaded, folder: Path) -> None:
    def as_newer_transformers_saves_it(config: dict[str, Any]) -> None:
        text = config["text_config"]
        own = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text.pop("num_global_key_value_heads")}
        text["per_layer_config"] = {"05": own}

    edit_config(folder, as_newer_transformers_saves_it)
    model = load(folder)[0]
    assert model.config == tiny[0].config
    assert mx.array_equal(logits(model), logits(tiny[0]))


def test_a_hub_snapshot_of_links_is_a_folder_like_any_other(tiny: Loaded, tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert mx.array_equal(logits(load(tmp_path)[0]), logits(tiny[0]))


# --- quantization ------------------------------------------------------------------------------


Settings = dict[str, Any]  # group_size, bits, mode


def quantized(source: Path, folder: Path, choose: Callable[[str], Settings | None], default: Settings) -> Model:
    """Quantize a checkpoint as MLX's own converters do, write it, and return the model that was written, arranged."""
    model = stored_model(source)
    overrides: dict[str, Any] = {}

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            return False
        name = path.replace("language_model.", "language_model.model.", 1)
        own = choose(path)
        if own != default:
            overrides[name] = own or False
        return own or False

    nn.quantize(model, class_predicate=predicate)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    flat = dict(tree_flatten(model.parameters()))
    weights = {path.replace("language_model.", "language_model.model.", 1): value for path, value in flat.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    edit_config(folder, lambda config: config.update(quantization=default | overrides))
    arrange(model)
    return model


MODES = [
    {"group_size": 32, "bits": 4, "mode": "affine"},
    {"group_size": 32, "bits": 8, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
]


@pytest.mark.parametrize("settings", MODES, ids=lambda settings: f"{settings['mode']}-{settings['bits']}")
def test_a_quantized_checkpoint_gives_the_logits_of_what_was_saved(
    tiny_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    saved = quantized(tiny_folder, tmp_path / "q", lambda path: None if "vision" in path else settings, settings)
    model, processor = load(tmp_path / "q")
    assert isinstance(model.language_model.embed_tokens, nn.QuantizedEmbedding)
    assert model.language_model.layers[5].mlp.down_proj.mode == settings["mode"]
    assert model.language_model.layers[5].mlp.down_proj.bits == settings["bits"]
    assert type(model.vision_embedder.patch_dense) is nn.Linear
    assert type(model.embed_vision.embedding_projection) is nn.Linear
    image = Image.fromarray(np.arange(100 * 100 * 3, dtype=np.uint8).reshape(100, 100, 3))
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what"}]}
    prompt = processor([message], image_budget=70)
    assert mx.array_equal(model.logits(prompt), saved.logits(prompt))
    assert not mx.array_equal(model.logits(prompt), load(tiny_folder)[0].logits(prompt))


def test_modules_may_have_bits_and_modes_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    four = {"group_size": 32, "bits": 4, "mode": "affine"}
    special = {
        "language_model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
        "language_model.layers.5.self_attn.q_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "vision_embedder.patch_dense": None,
    }
    saved = quantized(tiny_folder, tmp_path / "q", lambda path: special.get(path, four), four)
    stored, model = stored_model(tmp_path / "q"), load(tmp_path / "q")[0]
    first, last = stored.language_model.layers[0], stored.language_model.layers[5]
    assert (first.mlp.down_proj.bits, first.mlp.up_proj.bits) == (8, 4)
    assert (last.self_attn.q_proj.mode, last.self_attn.o_proj.mode) == ("mxfp4", "affine")
    assert type(model.vision_embedder.patch_dense) is nn.Linear
    assert mx.array_equal(logits(model), logits(saved))


def test_a_quantization_that_mlx_does_not_know_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    settings = MODES[0]
    quantized(tiny_folder, tmp_path / "q", lambda path: settings, settings)
    wrong = {"mode": "fp3", "bits": 9, "group_size": 7}
    for key, value in wrong.items():
        edit_config(tmp_path / "q", lambda config, own={key: value}: config.update(quantization=settings | own))
        with pytest.raises(CheckpointError, match="quantization"):
            load(tmp_path / "q")
    edit_config(tmp_path / "q", lambda config: config.update(quantization=settings | {"bits": 8}))
    with pytest.raises(CheckpointError, match=r"weight has shape \[512, 8\]; expected \[512, 16\]"):
        load(tmp_path / "q")
    edit_config(tmp_path / "q", lambda config: config.pop("quantization"))
    with pytest.raises(CheckpointError, match=r"is quantized, but config\.json has no quantization"):
        load(tmp_path / "q")


# --- types -------------------------------------------------------------------------------------


def mixed_prompt(processor: Processor) -> Prompt:
    image = Image.fromarray(np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3))
    sound = (np.sin(np.arange(4000) / 9), 16000)
    content = [{"type": "image", "image": image}, {"type": "audio", "audio": sound}, {"type": "text", "text": "and"}]
    return processor([{"role": "user", "content": content}], image_budget=70)


def types(arrays: list[mx.array]) -> set[mx.Dtype]:
    return {array.dtype for array in arrays}


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bf16") / "model", dtype=mx.bfloat16)


@pytest.mark.parametrize("bits", [None, 4])
def test_nothing_of_a_bf16_checkpoint_is_upcast(
    bf16_folder: Path, tmp_path: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bf16_folder
    if bits:
        settings = {"group_size": 32, "bits": bits, "mode": "affine"}
        quantized(bf16_folder, folder := tmp_path / "q", lambda path: None if "vision" in path else settings, settings)
    model, processor = load(folder)
    assert types([array for _, array in tree_flatten(model.parameters())]) == (
        {mx.bfloat16, mx.uint32} if bits else {mx.bfloat16}
    )
    prompt = mixed_prompt(processor)
    assert {run.kind for run in prompt.media} == {"image", "audio"}
    caches = model.caches(len(prompt) + 8)
    assert types(list(model.read(prompt, caches, chunk=16))) == {mx.bfloat16}
    assert types([array for arrays in caches.arrays for array in arrays]) == {mx.bfloat16}
    assert logits(model).dtype == mx.float32

    seen: list[mx.Dtype] = []
    launch = batch.launch

    def watched(round_: Any, state: Any, caches: Any) -> Any:
        result = launch(round_, state, caches)
        seen.extend(array.dtype for arrays in caches.arrays for array in arrays)
        return result

    monkeypatch.setattr(batch, "launch", watched)
    reply = generate(model, processor, Prompt(IDS), max_tokens=4, sampling=Sampling(temperature=0), draft_length=0)
    assert len(reply.token_ids) >= 2
    assert set(seen) == {mx.bfloat16}


def test_bf16_logits_are_near_those_of_float32(bf16_folder: Path, tiny: Loaded) -> None:
    expected = logits(tiny[0])
    assert mx.abs(logits(load(bf16_folder)[0]) - expected).max() < 3e-2 * mx.abs(expected).max()


# --- memory ------------------------------------------------------------------------------------


def test_loading_peaks_at_the_weights_and_one_more_tensor(tmp_path: Path) -> None:
    shape = Shape(hidden=512, mlp=2048, heads=8, kv_heads=4, head_dim=64, global_head_dim=128, vocab=8192)
    folder = write_checkpoint(tmp_path / "large", shape, dtype=mx.bfloat16)
    tensors = list_tensors(folder).values()
    total, largest = sum(tensor.nbytes for tensor in tensors), max(tensor.nbytes for tensor in tensors)
    assert total > 30e6
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load(folder)
    slack = 100_000  # pages of small tensors
    assert mx.get_peak_memory() - before <= total + largest + slack
    assert mx.get_active_memory() - before <= total + slack  # and nothing is left lying about
    assert len(loaded) == 2


def test_looking_through_a_folder_loads_nothing(tiny_folder: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    checkpoint = open_checkpoint(tiny_folder, None)
    assert mx.get_peak_memory() - before < 0.05 * checkpoint.nbytes
    stored = sum(array.nbytes for array in read_weights(tiny_folder).values())
    assert checkpoint.nbytes == stored


def test_too_little_memory_is_said_before_loading(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: 3_000_000)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with pytest.raises(MemoryError, match=r"^the model needs 0"):
        load(tiny_folder)
    assert mx.get_peak_memory() - before < 300_000


# --- what is refused ---------------------------------------------------------------------------


def test_missing_modalities_are_left_out(folder: Path) -> None:
    weights = read_weights(folder)
    kept = {name: value for name, value in weights.items() if "vision" not in name and "audio" not in name}
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    model, processor = load(folder)
    assert (model.config.vision, model.config.audio) == (None, None)
    assert mx.array_equal(logits(model), model.logits(processor_free(IDS)))
    with pytest.raises(ValueError, match=r"^this checkpoint takes no image; it takes text$"):
        processor([{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}]}])


def processor_free(ids: list[int]) -> Prompt:
    return Prompt(token_ids=ids)


def test_tensors_without_a_place_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = read_weights(folder)
    few = {name: mx.zeros((2,)) for name in ("model.extra", "model.language_model.layers.5.self_attn.v_proj.weight")}
    mx.save_safetensors(str(folder / "model-2.safetensors"), few)
    load(folder)
    assert caplog.messages[-1].startswith("the model has no place for 2 tensors, left out: model.extra, model.")
    many = {f"model.vision_tower.{i}": mx.zeros((2,)) for i in range(500)}
    mx.save_safetensors(str(folder / "model-2.safetensors"), many)
    load(folder)
    assert re.search(r"no place for 500 tensors, .* and 496 more$", caplog.messages[-1])
    assert len(caplog.messages[-1]) < 1000
    assert len(weights) == len(list_tensors(folder)) - 500


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name/x", "x" * 300 + "/y", "/no/such/folder", "a/b/c", "gemma"])
def test_what_is_neither_folder_nor_hub_id_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a model folder"):
        find_folder(name)


def test_the_tiny_shape_is_read_from_its_config(tiny: Loaded) -> None:
    assert tiny[0].config.text.hidden_size == TINY.hidden
