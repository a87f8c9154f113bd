"""An adapted model computes what its matrices with the adapter's products added to them do; or says what is wrong."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters import (
    ALL,
    EVEN,
    LAYERS,
    MEDIA,
    Weights,
    added_by_hand,
    converted,
    distance,
    logits,
    matrices,
    prompts,
    random_adapter,
    with_matrices,
)
from conftest import joining
from mlx.utils import tree_flatten
from toy_checkpoint import write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, load
from mlx_gemma4.convert.job import open_target
from mlx_gemma4.convert.recipes import Recipe, named_recipe, uniform_recipe
from mlx_gemma4.engine.reading import fingerprint_of
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.adapter import CONFIG, WEIGHTS, read_weights, write_adapter, write_peft
from mlx_gemma4.weights.load import open_checkpoint
from mlx_gemma4.weights.tensors import Rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "gemma", EVEN)
    write_drafter(folder / "drafter", EVEN)
    return folder


def whole(tensor: Rows) -> mx.array:
    return tensor.rows(0, tensor.shape[0])


def values_of(folder: Path) -> Weights:
    """The matrices that a checkpoint, quantized or not, stands for."""
    stored = open_target(folder).tensors
    return {path: np.array(whole(stored[f"{path}.weight"])) for path in matrices(EVEN)}


CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "dora": {"dora": True},
    "queries and values": {"chosen": ("self_attn.q_proj", "self_attn.v_proj")},  # k_proj, between them, is not
    "values alone, dora": {"chosen": ("self_attn.v_proj",), "dora": True},
    "the last two layers": {"chosen": ALL, "layers": 2, "rank": 1},
    "the mlp's second": {"chosen": ("mlp.up_proj",)},
    "full layers' keys and outputs": {"chosen": ("self_attn.k_proj", "self_attn.o_proj"), "layers": 1},
    "media": {"chosen": MEDIA},
}
RECIPES: dict[str, Recipe | None] = {
    "float32": None,
    "4 bits": uniform_recipe(4, 32, None),
    "groups of 64": uniform_recipe(8, 64, None),
    "mixed": named_recipe("mixed"),
    "mxfp4": uniform_recipe(None, None, "mxfp4"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_those_of_the_matrices_with_the_products_added(source: Path, tmp_path: Path, recipe: str) -> None:
    own = RECIPES[recipe]
    base = source if own is None else converted(tmp_path / "base", source, own)
    values = values_of(base)
    bare = logits(base, None)
    for number, (name, choice) in enumerate(CHOICES.items()):
        if number > 2 and recipe not in ("float32", "4 bits"):
            break
        adapter = random_adapter(EVEN, **choice)
        kind = "dora" if choice.get("dora") else "lora"
        write_adapter(tmp_path / name, adapter, kind, choice.get("rank", 3), 2.0, choice.get("layers", -1))
        by_hand = with_matrices(tmp_path / f"whole {number}", source, added_by_hand(values, adapter, 2.0))
        if own is not None:  # the embedding, too, is quantized
            copy_embeddings(by_hand, base)
        expected = logits(by_hand, None)
        assert distance(logits(base, adapter=tmp_path / name), expected) < 2e-4, name
        assert distance(bare, expected) > 0.05, name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_of_several_each_computes_what_it_does_alone(source: Path, tmp_path: Path, dtype: str) -> None:
    """Of other ranks, kinds and matrices, and where one has nothing; in float16 as near to float32 as alone."""
    base = converted(tmp_path / "base", source, RECIPES["4 bits"]) if dtype == "float32" else source
    few = {"chosen": ("self_attn.q_proj", "mlp.down_proj"), "layers": 2}
    choices: dict[str, dict[str, Any]] = {
        "all": {"rank": 3},
        "few": few | {"rank": 5},
        "dora": {"rank": 2, "dora": True},
    }
    for seed, (name, choice) in enumerate(choices.items()):
        kind = "dora" if name == "dora" else "lora"
        adapter = random_adapter(EVEN, seed=seed, **choice)
        write_adapter(tmp_path / name, adapter, kind, choice["rank"], 2.0, choice.get("layers", -1))
    folders = {name: tmp_path / name for name in choices}
    model, _ = load(base, None, adapter=folders, dtype=dtype)
    for number, name in enumerate([None, *folders]):
        found = [by_adapter(model, prompt, number) for prompt in prompts()]
        alone, exact = (logits(base, None, adapter=name and folders[name], dtype=own) for own in (dtype, "float32"))
        assert distance(found, exact) < 1.5 * distance(alone, exact) + 1e-4, name


def by_adapter(model: Model, prompt: Prompt, number: int) -> np.ndarray:
    read = mx.concatenate([*model.read(prompt, model.caches(len(prompt)), adapter=number)], axis=1)
    return np.array(model.language_model.head(read))[0]


def copy_embeddings(by_hand: Path, base: Path) -> None:
    stored, weights = open_target(base), mx.load(str(by_hand / "model.safetensors"))
    for path in ("language_model.embed_tokens.weight", "vision_embedder.patch_dense.weight"):
        weights[f"model.{path}"] = whole(stored.tensors[path])
    mx.save_safetensors(str(by_hand / "model.safetensors"), weights)


# --- formats -----------------------------------------------------------------------------------


def test_mlx_lm_reads_what_is_written_and_its_own_is_read(source: Path, tmp_path: Path) -> None:
    """mlx-lm's loader on its own class of this model's decoder."""
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    gemma4 = pytest.importorskip("mlx_lm.models.gemma4")
    own = json.loads((source / "config.json").read_text())
    settings = {"text_config": own["text_config"], "vocab_size": EVEN.vocab}
    theirs = gemma4.Model(gemma4.ModelArgs.from_dict(settings))
    for choice, layers in ((ALL, -1), (("self_attn.q_proj", "mlp.down_proj"), 2)):
        adapter = random_adapter(EVEN, choice, layers=LAYERS if layers < 0 else layers)
        folder = tmp_path / str(layers)
        write_adapter(folder, adapter, "lora", 3, 2.0, layers, {"iters": 5})
        utils.load_adapters(theirs, str(folder))
        found = dict(tree_flatten(theirs.trainable_parameters()))
        names = {name.replace("language_model.", "language_model.model."): value for name, value in adapter.items()}
        assert all(mx.array_equal(found[name], value) for name, value in names.items())
        # and as its trainer saves them
        mx.save_safetensors(str(folder / WEIGHTS), {name: found[name] for name in names})
        again = read_weights(folder / WEIGHTS)
        assert again.keys() == adapter.keys()
        assert all(mx.array_equal(again[path], value) for path, value in adapter.items())
        load(source, adapter=folder)
        theirs = gemma4.Model(gemma4.ModelArgs.from_dict(settings))


PREFIXES = ["base_model.model.model.language_model.", "base_model.model.model.", "model.language_model.", "model."]


def peft_folder(folder: Path, adapter: Mapping[str, mx.array], config: dict[str, Any], prefix: str, form: str) -> Path:
    """As PEFT writes the decoder's, with names of one kind."""
    folder.mkdir()
    parts = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
    named = {}
    for path, value in adapter.items():
        matrix, _, part = path.rpartition(".")
        named[prefix + matrix.removeprefix("language_model.") + form.format(parts[part])] = mx.contiguous(value.T)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), named)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "bias": "none"} | config))
    return folder


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", [".{}.weight", ".{}.default.weight", ".weight.{}"])
def test_peft_s_names_and_scales_are_understood(source: Path, tmp_path: Path, prefix: str, form: str) -> None:
    adapter = random_adapter(EVEN, ("self_attn.q_proj", "mlp.up_proj"), layers=2)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [4, 5]}
    write_adapter(tmp_path / "mlx", adapter, "lora", 3, 2.0, 2)
    folder = peft_folder(tmp_path / "peft", adapter, config, prefix, form)
    assert same(source, folder, tmp_path / "mlx")


def same(source: Path, one: Path, other: Path) -> bool:
    """Whether two folders hold the same adapter."""
    found = [open_checkpoint(source, None, adapter=folder).tensors for folder in (one, other)]
    paths = {path for path in found[0] if ".lora_" in path or path.endswith(".gain")}
    return bool(paths) and all(mx.allclose(found[0][path].read(), found[1][path].read(), 1e-6) for path in paths)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 3, "lora_alpha": 3.0, "use_rslora": True}, 3**0.5),
        ({"r": 8, "lora_alpha": 12, "rank_pattern": {"q_proj": 3}}, 4.0),
        ({"r": 3, "lora_alpha": 1, "alpha_pattern": {r"layers\.[45]\.self_attn\.q_proj": 15}}, 5.0),
        ({"r": 3, "lora_alpha": 6, "init_lora_weights": "gaussian", "lora_dropout": 0.1, "future": None}, 2.0),
        ({"r": 3, "lora_alpha": 6, "target_modules": r".*\.q_proj"}, 2.0),
    ],
)
def test_peft_s_scale_is_alpha_by_rank_or_its_root_by_pattern(
    source: Path, tmp_path: Path, config: dict[str, Any], scale: float
) -> None:
    adapter = random_adapter(EVEN, ("self_attn.q_proj",), layers=2)
    write_adapter(tmp_path / "mlx", adapter, "lora", 3, scale, 2)
    targets = {"target_modules": ["layers.4.self_attn.q_proj", "layers.5.self_attn.q_proj"]}
    folder = peft_folder(tmp_path / "peft", adapter, targets | config, PREFIXES[0], ".{}.weight")
    assert same(source, folder, tmp_path / "mlx")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_written_for_peft_is_the_same_adapter(source: Path, tmp_path: Path, kind: str) -> None:
    adapter = random_adapter(EVEN, dora=kind == "dora")
    write_adapter(tmp_path / "mlx", adapter, kind, 3, 2.0, -1)
    write_peft(tmp_path / "peft", adapter, kind, 3, 2.0, "google/gemma-4-12B-it")
    assert same(source, tmp_path / "peft", tmp_path / "mlx")


def test_media_s_matrices_have_transformers_names_for_peft(source: Path, tmp_path: Path) -> None:
    adapter = random_adapter(EVEN, MEDIA)
    for part, shape in (("lora_a", (48 * 48 * 3, 3)), ("lora_b", (3, EVEN.hidden))):
        adapter[f"vision_embedder.patch_dense.{part}"] = mx.random.normal(shape)
    write_adapter(tmp_path / "mlx", adapter, "lora", 3, 2.0, -1)
    write_peft(tmp_path / "peft", adapter, "lora", 3, 2.0, None)
    names = [
        "model.embed_audio.embedding_projection",
        "model.embed_vision.multimodal_embedder.embedding_projection",
        "model.embed_vision.patch_dense",
    ]
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert config["target_modules"] == names
    assert {name.partition(".lora_")[0] for name in mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))} == {
        f"base_model.model.{name}" for name in names
    }
    assert same(source, tmp_path / "peft", tmp_path / "mlx")
    config["target_modules"] += ["mlp.up_proj"]
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    refused(source, tmp_path / "peft", "has nothing for 6 of the 9 matrices")


# --- what is wrong -----------------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, mx.array]], None]
Q5 = "language_model.model.layers.5.self_attn.q_proj"


def settings_of(**changes: Any) -> Edit:
    return lambda config, weights: config.update(changes)


def parameters_of(**changes: Any) -> Edit:
    return lambda config, weights: config["lora_parameters"].update(changes)


def renamed(old: str, new: str) -> Edit:
    return lambda config, weights: weights.update({name.replace(old, new): weights.pop(name) for name in [*weights]})


def with_tensor(name: str, *shape: int, dtype: mx.Dtype = mx.float32) -> Edit:
    return lambda config, weights: weights.update({name: mx.zeros(shape, dtype)})


WRONG: dict[str, tuple[Edit, str]] = {
    "trained in full": (settings_of(fine_tune_type="full"), "fine_tune_type is 'full'"),
    "no parameters": (settings_of(lora_parameters=None), "lora_parameters is None"),
    "no scale": (lambda config, _: config["lora_parameters"].pop("scale"), "scale is None"),
    "rank 0": (parameters_of(rank=0), "rank is 0"),
    "another rank": (parameters_of(rank=4), "has the rank 3"),
    "no number": (parameters_of(scale="2"), "scale is '2'"),
    "not a number": (parameters_of(scale=float("nan")), "scale is nan"),
    "keys of another model": (parameters_of(keys=["attn.wq"]), "keys has 'attn.wq'"),
    "keys without tensors": (parameters_of(keys=["self_attn.q_proj", "mlp.up_proj"]), "has nothing for 2 of the 4"),
    "more layers than tensors": (settings_of(num_layers=3), "has nothing for 1 of the 3"),
    "the layers of a longer model": (renamed("layers.5", "layers.55"), "1 of the 2 matrices"),
    "nothing that matches": (renamed("language_model.model.layers", "transformer.h"), "2 of the 2 matrices"),
    "mlx-vlm's": (renamed("lora_a", "A"), "supported are LoRA's and DoRA's"),
    "half of it": (lambda _, weights: weights.pop(f"{Q5}.lora_b"), "only one of two factors"),
    "no tensors": (lambda _, weights: weights.clear(), "no tensors"),
    "another shape": (with_tensor(f"{Q5}.lora_a", 64, 3), "has shape [64, 3]; expected [128, 3]"),
    "whole numbers": (with_tensor(f"{Q5}.lora_a", 128, 3, dtype=mx.int32), "is stored as I32"),
    "lengths without DoRA": (with_tensor(f"{Q5}.m", 256), "has magnitudes"),
    "DoRA without lengths": (settings_of(fine_tune_type="dora"), "has no magnitudes"),
    "a bias": (with_tensor(f"{Q5}.bias", 128), "supported are LoRA's and DoRA's"),
    "an embedding": (
        lambda _, weights: weights.update(
            {f"language_model.model.embed_tokens.lora_{part}": mx.zeros((3, 3)) for part in "ab"}
        ),
        "1 of the 3 matrices",
    ),
    "two names for one": (with_tensor("model.language_model.layers.5.self_attn.q_proj.lora_a", 128, 3), "one tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_is_wrong_is_one_line(source: Path, tmp_path: Path, case: str) -> None:
    write_adapter(tmp_path, random_adapter(EVEN, ("self_attn.q_proj",), layers=2), "lora", 3, 2.0, 2)
    edit, said = WRONG[case]
    config, weights = json.loads((tmp_path / CONFIG).read_text()), mx.load(str(tmp_path / WEIGHTS))
    mx.eval(weights)
    edit(config, weights)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / WEIGHTS), weights)
    refused(source, tmp_path, said)


def refused(source: Path, adapter: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, None, adapter=adapter)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices is [7]"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"a_new_kind": {"on": True}}, "a_new_kind is"),
        ({"rank_pattern": {"q_proj": 5}}, "has the rank 3"),
        ({"rank_pattern": {"(": 5}}, "a pattern that is none"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_dora": True}, "has no magnitudes"),
        ({"target_modules": ["q_proj", "v_proj"]}, "has nothing for"),
    ],
)
def test_what_peft_has_and_is_not_supported_is_one_line(
    source: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    adapter = random_adapter(EVEN, ("self_attn.q_proj",))
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]} | changes
    refused(source, peft_folder(tmp_path / "peft", adapter, config, PREFIXES[0], ".{}.weight"), said)


@pytest.mark.parametrize(
    ("write", "config", "tensor", "said"),
    [
        (write_peft, {"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight", "modules_to_save is ['lm_he"),
        (write_peft, {"bias": "all"}, f"base_model.model.model.{Q5}.bias", "bias is 'all'"),
        (write_peft, {"alpha": 8, "peft_type": "LOHA"}, f"base_model.model.{Q5}.hada_w1_a", "peft_type is 'LOHA'"),
        (write_adapter, {"fine_tune_type": "full"}, f"{Q5}.weight", "fine_tune_type is 'full'"),
    ],
)
def test_of_another_kind_the_kind_is_told_not_its_tensors(
    source: Path, tmp_path: Path, write: Callable[..., None], config: dict[str, Any], tensor: str, said: str
) -> None:
    write(tmp_path, random_adapter(EVEN, ("self_attn.q_proj",)), "lora", 3, 2.0, None if write is write_peft else -1)
    file = next(tmp_path.glob("*.safetensors"))
    weights = mx.load(str(file)) | {tensor: mx.zeros((3, 3))}
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)
    (tmp_path / CONFIG).write_text(json.dumps(config | json.loads((tmp_path / CONFIG).read_text()) | config))
    refused(source, tmp_path, said)


def test_a_folder_without_an_adapter_or_with_two_is_one_line(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "nowhere", "is no folder")
    refused(source, tmp_path, "has no adapters.safetensors")
    adapter = random_adapter(EVEN, ("self_attn.q_proj",))
    write_adapter(tmp_path / "one", adapter, "lora", 3, 2.0, -1)
    refused(source, tmp_path / "one" / WEIGHTS, "is no folder")
    write_peft(tmp_path / "one", adapter, "lora", 3, 2.0, None)
    write_peft(tmp_path / "checkpoint-5", adapter, "lora", 3, 2.0, None)
    refused(source, tmp_path, "expected an adapter's folder, as its subfolders are: checkpoint-5, one")
    refused(source, tmp_path / "one", "expected one of them")
    write_adapter(tmp_path / "two", adapter, "lora", 3, 2.0, -1)
    (tmp_path / "two" / CONFIG).unlink()
    refused(source, tmp_path / "two", "is missing")
    (tmp_path / "two" / CONFIG).write_text("{")
    refused(source, tmp_path / "two", "is not valid JSON")
    with pytest.raises(CheckpointError, match="adapter is an int; expected"):
        load(source, adapter=3)


# --- beside the matrices -----------------------------------------------------------------------


def test_the_drafter_is_untouched_and_the_adapter_s_own_comes_first(source: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", random_adapter(EVEN), "lora", 3, 2.0, -1)
    bare, adapted = load(source)[0], load(source, adapter=tmp_path / "one")[0]
    weights = [dict(tree_flatten(model.drafter.parameters())) for model in (bare, adapted)]
    assert weights[0].keys() == weights[1].keys()
    assert all(mx.array_equal(weights[0][path], weights[1][path]) for path in weights[0] if "q_norm" not in path)
    write_drafter(tmp_path / "one" / "drafter", EVEN, seed=4)
    other = dict(tree_flatten(load(source, adapter=tmp_path / "one")[0].drafter.parameters()))
    assert not mx.array_equal(other["embed_tokens.weight"], weights[0]["embed_tokens.weight"])


def test_what_was_read_with_another_adapter_is_not_taken_for_this_one_s(source: Path, tmp_path: Path) -> None:
    adapter = random_adapter(EVEN, ("mlp.up_proj",))
    prints = {fingerprint_of(load(source, None)[0])}
    for scale in (2.0, 2.5):
        write_adapter(tmp_path / str(scale), adapter, "lora", 3, scale, -1)
        prints.add(fingerprint_of(load(source, None, adapter=tmp_path / str(scale))[0]))
    assert len(prints) == 3


def test_a_joined_matrix_has_two_products_more(source: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, random_adapter(EVEN, ALL), "lora", 3, 2.0, -1)
    with joining():
        layer = load(source, None, adapter=tmp_path)[0].language_model.layers[0]
    for joined in (layer.self_attn.inputs.joined, layer.mlp.inputs.joined):
        assert len(joined) == 1
        assert set(dict(tree_flatten(joined[0].parameters()))) == {"weight", "lora_a", "lora_b"}


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_float16_is_safe_with_an_adapter(source: Path, tmp_path: Path, size: float) -> None:
    """Also where what it adds is far larger than the matrices."""
    adapter = random_adapter(EVEN, dora=False)
    write_adapter(tmp_path, adapter, "lora", 3, 2.0 * size, -1)
    expected = logits(source, None, adapter=tmp_path, dtype="float32")
    found = logits(source, None, adapter=tmp_path, dtype="float16")
    coarse = logits(source, None, adapter=tmp_path, dtype="bfloat16")
    assert all(np.isfinite(own).all() for own in found)
    errors = [np.sqrt(np.mean((one[0] - expected[0]) ** 2)) for one in (found, coarse)]
    assert errors[0] < errors[1]
