"""Conversions of checkpoints that are not as published: their types, heads, stop tokens, cards and names."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Run
from toy_checkpoint import Shape, write_checkpoint

from mlx_gemma4 import Prompt, load
from mlx_gemma4.convert.card import base_of
from mlx_gemma4.convert.command import main
from mlx_gemma4.convert.recipes import named_recipe, plan
from mlx_gemma4.evaluate import command as evaluate_command
from mlx_gemma4.weights.tensors import list_tensors

EVEN = Shape(hidden=128, mlp=128, heads=4, kv_heads=2, head_dim=32, global_head_dim=64)
TEXT = Prompt([2, 200, 201, 150, 160, 170, 300, 301, 5, 9])


@pytest.fixture
def run(in_process: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)
    return in_process("mlx_gemma4.convert", main)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", EVEN, dtype=mx.bfloat16)


def edit(folder: Path, change: Callable[[str, mx.array], mx.array], **more: mx.array) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    changed = {name: change(name, value) for name, value in weights.items()} | more
    mx.eval(changed)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), changed)


def test_float32_norms_get_the_type_of_the_checkpoint(source: Path, run: Run) -> None:
    edit(source, lambda name, value: value.astype(mx.float32) if "norm" in name else value)
    assert run("--hf-path", source, "--mlx-path", "q")[0] == 0
    assert {own.dtype for own in list_tensors(Path("q")).values()} == {mx.uint32, mx.bfloat16}
    assert json.loads(Path("q/config.json").read_text())["dtype"] == "bfloat16"


def test_a_float32_checkpoint_is_cast_to_the_type_of_its_config(tmp_path: Path, run: Run) -> None:
    source = write_checkpoint(tmp_path / "wide", EVEN)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert run("--hf-path", source, "--mlx-path", "q")[0] == 0
    assert {own.dtype for own in list_tensors(Path("q")).values()} == {mx.uint32, mx.bfloat16}
    assert run("--hf-path", source, "--mlx-path", "wide4", "--dtype", "float32")[0] == 0
    assert {own.dtype for own in list_tensors(Path("wide4")).values()} == {mx.uint32, mx.float32}


def test_a_head_of_its_own_is_converted(source: Path, run: Run) -> None:
    head = np.random.default_rng(5).standard_normal((EVEN.vocab, EVEN.hidden)).astype(np.float32) * 0.1
    edit(source, lambda name, value: value, **{"lm_head.weight": mx.array(head).astype(mx.bfloat16)})
    assert run("--hf-path", source, "--mlx-path", "q", "--q-bits", "8")[0] == 0
    config = json.loads(Path("q/config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert "mlx-vlm" not in Path("q/README.md").read_text()  # which has no place for it
    names = {own.name for own in list_tensors(Path("q")).values()}
    assert {"language_model.lm_head.weight", "language_model.lm_head.scales"} <= names
    expected, found = (load(folder)[0].logits(TEXT) for folder in (source, Path("q")))
    tied = load(write_checkpoint(Path("tied"), EVEN, dtype=mx.bfloat16))[0].logits(TEXT)
    assert mx.abs(found - expected).mean() < 0.1 * mx.abs(tied - expected).mean()


def test_mixed_gives_more_bits_to_the_head_of_its_own() -> None:
    shapes = {"language_model.lm_head.weight": (512, 128), "language_model.embed_tokens.weight": (512, 128)}
    shapes |= {f"language_model.layers.{n}.mlp.up_proj.weight": (512, 128) for n in range(6)}
    bits = {path: own.bits for path, own in plan(named_recipe("mixed"), shapes, 2).items() if own is not None}
    assert bits["language_model.lm_head.weight"] == 6 and bits["language_model.embed_tokens.weight"] == 4


@pytest.mark.parametrize("own", [None, {"top_k": 64, "eos_token_id": [1, 106]}])
def test_a_conversion_names_all_stop_tokens(source: Path, run: Run, own: dict[str, object] | None) -> None:
    (source / "generation_config.json").unlink()
    if own is not None:
        (source / "generation_config.json").write_text(json.dumps(own))
    assert run("--hf-path", source, "--mlx-path", "q")[0] == 0
    found = json.loads(Path("q/generation_config.json").read_text())
    assert sorted(found["eos_token_id"]) == [1, 50, 106]
    assert found.get("top_k") == (own or {}).get("top_k") and found["suppress_tokens"]


@pytest.mark.parametrize(("card", "name", "expected"), [
    ("---\nbase_model: me/tuned\n---\n", None, "me/tuned"),
    ("---\nlanguage: en\nbase_model:\n- me/listed\n---\n", None, "me/listed"),
    ("---\nlicense: mit\n---\nbase_model: not/this\n", "google/gemma-4-12B-it-qat", "google/gemma-4-12B-it-qat"),
    (None, "/home/me/somewhere", "google/gemma-4-12B-it"),
    (None, None, "google/gemma-4-12B-it"),
])  # fmt: skip
def test_a_card_names_the_base_that_the_folder_tells_of(
    tmp_path: Path, card: str | None, name: str | None, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": name} if name else {}))
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_of(tmp_path) == expected


def test_the_hubs_cache_tells_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "models--google--gemma-4-12B-it-qat" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert base_of(folder) == "google/gemma-4-12B-it-qat"


@pytest.mark.parametrize("name", ["x" * 252, "ü" * 130, os.fsdecode(b"bad\xff"), "/".join(["y" * 200] * 30)])
def test_names_that_no_disk_takes_are_refused_before_anything_is_written(
    source: Path, run: Run, in_process: Callable[..., Run], name: str
) -> None:
    before = sorted(Path().rglob("*"))
    status, out, err = run("--hf-path", source, "--mlx-path", name)
    assert (status, out, err.count("\n")) == (2, "", 1) and re.search(r"expected (a name|names)", err), err
    evaluate = in_process("mlx_gemma4.evaluate", evaluate_command.main)
    status, out, err = evaluate(source, "--save-logits", f"{name[:246]}.safetensors")
    assert (status, out, err.count("\n")) == (2, "", 1) and "save-logits" in err
    assert sorted(Path().rglob("*")) == before
