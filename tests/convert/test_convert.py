"""Conversions load as what they were made from, or leave nothing behind."""

import errno
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import Run
from huggingface_hub.errors import LocalTokenNotFoundError
from mlx import nn
from stored import stored_model
from toy_checkpoint import Shape, tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, load
from mlx_gemma4.config import COMPUTING
from mlx_gemma4.convert import shards as shards_module
from mlx_gemma4.convert import upload
from mlx_gemma4.convert.command import main
from mlx_gemma4.convert.export import export
from mlx_gemma4.convert.gguf import MEDIA_NAMES, model_path, unpack_q4_0, unpack_q6_k
from mlx_gemma4.convert.job import COPIED, open_target
from mlx_gemma4.convert.lattice import find_lattice, round_bfloat16
from mlx_gemma4.convert.shards import HEADER_BYTES
from mlx_gemma4.model.arrange import arrange
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import OLD_TEMPLATE_BYTES, PACKAGED_TEMPLATE
from mlx_gemma4.weights import tensors as tensors_module
from mlx_gemma4.weights.load import parameters
from mlx_gemma4.weights.tensors import INDEX, list_tensors

# Group sizes of 64 divide every matrix, Q6_K's 256 the embedding.
EVEN = Shape(hidden=256, mlp=256, heads=4, kv_heads=2, head_dim=32, global_head_dim=64)
TEXT = Prompt([2, 200, 201, 150, 160, 170, 300, 301, 5, 9])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 as Google publishes it, with its drafter."""
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "gemma", EVEN)
    write_drafter(folder / "drafter", EVEN)
    return folder


@pytest.fixture(scope="module")
def bfloat16_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "gemma", EVEN, dtype=mx.bfloat16)


@pytest.fixture
def run(in_process: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)
    return in_process("mlx_gemma4.convert", main)


def weights_of(folder: Path) -> dict[str, mx.array]:
    """Everything in a folder's weight files, by the names there."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in mx.load(str(file)).items()}


def edit_weights(folder: Path, **changes: mx.array | None) -> None:
    weights = weights_of(folder) | changes
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: value for name, value in weights.items() if value is not None}
    )


def quantized_in_memory(folder: Path, group_size: int, bits: int, mode: str) -> Model:
    model = stored_model(folder, None)
    nn.quantize(model, group_size, bits, mode=mode)
    return model


# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "quantization"),
    [
        ((), (64, 4, "affine")),
        (("--recipe", "8bit"), (64, 8, "affine")),
        (("--q-bits", 3), (64, 3, "affine")),
        (("--q-bits", 6, "--q-group-size", 32), (32, 6, "affine")),
        (("--q-mode", "mxfp4"), (32, 4, "mxfp4")),
        (("--q-mode", "nvfp4"), (16, 4, "nvfp4")),
        (("--q-mode", "mxfp8"), (32, 8, "mxfp8")),
    ],
)
def test_a_conversion_is_the_model_quantized_by_mlx(
    source: Path, run: Run, options: tuple[object, ...], quantization: tuple[int, int, str]
) -> None:
    status, out, err = run("--hf-path", source, "--no-drafter", *options)
    assert (status, err) == (0, "")
    size = sum(value.nbytes for value in weights_of(Path("mlx_model")).values())
    assert out.startswith(f"mlx_model: {size / 1e6:.2f} MB, ")
    expected, got = quantized_in_memory(source, *quantization), stored_model(Path("mlx_model"))
    assert parameters(got).keys() == parameters(expected).keys()
    for path, value in parameters(expected).items():
        assert mx.array_equal(parameters(got)[path], value), path
    arrange(expected)
    assert mx.array_equal(load("mlx_model")[0].logits(TEXT), expected.logits(TEXT))


def test_names_and_config_are_those_of_mlx_conversions(source: Path, run: Run) -> None:
    assert run("--hf-path", source)[0] == 0
    names = weights_of(Path("mlx_model")).keys()
    assert {"language_model.model.layers.5.self_attn.k_proj.scales", "embed_audio.embedding_projection.biases"} <= names
    assert all(name.startswith(("language_model.model.", "vision_embedder.", "embed_")) for name in names)
    config = json.loads(Path("mlx_model/config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config["text_config"] == json.loads((source / "config.json").read_text())["text_config"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert Path("mlx_model", name).read_bytes() == (source / name).read_bytes()
    index = json.loads(Path("mlx_model", INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(names), "model.safetensors")


def test_a_model_is_converted_without_its_drafter(source: Path, run: Run) -> None:
    assert run("--hf-path", source, "--drafter", "none")[::2] == (0, "")
    assert not Path("mlx_model/drafter").exists()


def test_the_drafter_comes_along_quantized_with_its_head(source: Path, run: Run) -> None:
    status, out, _ = run("--hf-path", source, "--drafter-bits", 8)
    assert status == 0 and "mlx_model/drafter: " in out
    drafter = weights_of(Path("mlx_model/drafter"))
    assert drafter["model.embed_tokens.weight"].shape == (EVEN.vocab, EVEN.hidden // 2 * 8 // 32)
    model, expected = stored_model(Path("mlx_model")), stored_model(source)
    assert model.drafter is not None and expected.drafter is not None
    nn.quantize(expected.drafter, 64, 8)
    for path, value in parameters(expected.drafter).items():
        assert mx.array_equal(parameters(model.drafter)[path], value), path


def test_a_drafter_elsewhere_is_found_and_one_that_is_quantized_stays(source: Path, run: Run, tmp_path: Path) -> None:
    assert run("--hf-path", source, "--mlx-path", "first")[0] == 0
    status, _, err = run(
        "--hf-path", source, "--drafter", "first/drafter", "--drafter-bits", 8, "--mlx-path", tmp_path / "second"
    )
    assert status == 0 and "drafter: first/drafter" in err
    for name, value in weights_of(Path("first/drafter")).items():
        assert mx.array_equal(weights_of(Path("second/drafter"))[name], value), name
    config = json.loads(Path("second/drafter/config.json").read_text())
    assert config["quantization"]["bits"] == 4


def test_without_a_drafter_the_model_is_converted_alone(bfloat16_source: Path, run: Run) -> None:
    status, _, err = run("--hf-path", bfloat16_source)
    assert status == 0 and "there is no drafter beside the model" in err
    assert not Path("mlx_model/drafter").exists()


def test_mixed_bits_are_in_the_config_and_load(source: Path, run: Run) -> None:
    assert run("--hf-path", source, "--recipe", "mixed", "--no-drafter")[0] == 0
    assert run("--hf-path", source, "--no-drafter", "--mlx-path", "plain")[0] == 0
    config = json.loads(Path("mlx_model/config.json").read_text())["quantization"]
    assert config["embed_audio.embedding_projection"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    mixed, plain = (sum(value.nbytes for value in weights_of(Path(name)).values()) for name in ("mlx_model", "plain"))
    assert plain < mixed <= 1.126 * plain
    assert load("mlx_model")[0].logits(TEXT).shape == (1, len(TEXT), EVEN.vocab)


def test_the_rest_has_the_type_that_is_asked_for(source: Path, run: Run) -> None:
    assert run("--hf-path", source, "--dtype", "bfloat16")[0] == 0
    for folder in ("mlx_model", "mlx_model/drafter"):
        assert {value.dtype for value in weights_of(Path(folder)).values()} == {mx.uint32, mx.bfloat16}
        assert json.loads(Path(folder, "config.json").read_text())["dtype"] == "bfloat16"


def test_an_mlx_folder_is_requantized_and_a_quantized_one_dequantized(source: Path, run: Run) -> None:
    assert run("--hf-path", source, "--mlx-path", "four")[0] == 0
    assert run("--hf-path", "four", "--mlx-path", "back", "--dequantize")[0] == 0
    four, back = load("four")[0], load("back")[0]
    assert np.allclose(four.logits(TEXT), back.logits(TEXT), atol=1e-3)
    assert "quantization" not in json.loads(Path("back/config.json").read_text())
    assert "quantization" not in json.loads(Path("back/drafter/config.json").read_text())
    assert run("--hf-path", "back", "--mlx-path", "again", "--recipe", "8bit")[0] == 0
    assert np.allclose(four.logits(TEXT), load("again")[0].logits(TEXT), atol=0.2)


def test_what_a_group_size_does_not_divide_stays_and_is_named(tiny_folder: Path, run: Run) -> None:
    status, _, err = run("--hf-path", tiny_folder)
    assert status == 0 and "not quantized, for the group size does not divide their columns: " in err
    assert "mlp.down_proj" in err  # 96 columns
    kept = weights_of(Path("mlx_model"))["language_model.model.layers.0.mlp.down_proj.weight"]
    assert mx.array_equal(kept, weights_of(tiny_folder)["model.language_model.layers.0.mlp.down_proj.weight"])
    load("mlx_model")


def test_an_old_template_is_replaced(source: Path, run: Run, tmp_path: Path) -> None:
    old = Path(shutil.copytree(source, tmp_path / "old"))
    (old / "chat_template.jinja").unlink()
    (old / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x" * OLD_TEMPLATE_BYTES}))
    status, _, err = run("--hf-path", old, "--no-drafter")
    assert status == 0 and "the old chat template in tokenizer_config.json" in err
    assert Path("mlx_model/chat_template.jinja").read_bytes() == PACKAGED_TEMPLATE.read_bytes()
    assert "chat_template" not in json.loads(Path("mlx_model/tokenizer_config.json").read_text())


def test_the_card_says_what_it_is(source: Path, run: Run) -> None:
    assert run("--hf-path", source, "--mlx-path", "gemma-4bit")[0] == 0
    card = Path("gemma-4bit/README.md").read_text()
    for line in (
        "library_name: mlx",
        "license: apache-2.0",
        "base_model: google/gemma-4-12B-it",
        "# gemma-4bit",
        "- Recipe: 4bit",
        "- Quality: not measured.",
    ):
        assert f"\n{line}\n" in card
    assert "--model gemma-4bit" in card and "bits a weight; the drafter" in card
    assert "mlx_vlm.generate --model gemma-4bit" in card
    assert f"\n{source.name}, converted to MLX" in card


def test_the_card_names_a_source_that_is_the_folder_one_is_in(
    source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, path in ((source, "."), (source / "drafter", "..")):
        monkeypatch.chdir(place)
        assert run("--hf-path", path, "--mlx-path", tmp_path / f"out{path}")[0] == 0
        assert f"\n{source.name}, converted to MLX" in (tmp_path / f"out{path}" / "README.md").read_text()


# --- blocks and shards -------------------------------------------------------------------------


def test_blocks_and_shards_change_nothing(source: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--hf-path", source, "--mlx-path", "whole")[0] == 0
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 10_000)  # not a multiple of a row
    monkeypatch.setattr(shards_module, "SHARD_BYTES", HEADER_BYTES + 300_000)
    assert run("--hf-path", source, "--mlx-path", "parts")[0] == 0
    files = sorted(Path("parts").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    whole, parts = weights_of(Path("whole")), weights_of(Path("parts"))
    assert whole.keys() == parts.keys()
    assert all(mx.array_equal(whole[name], parts[name]) for name in whole)
    assert {tensor.file for tensor in list_tensors(Path("parts")).values()} == {
        file.absolute().relative_to(Path.cwd()) for file in files
    }
    for file in files:  # but for tensors that are larger themselves
        assert file.stat().st_size <= HEADER_BYTES + 300_000 or len(mx.load(str(file))) <= 3


def test_memory_is_that_of_a_block(source: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 2**14)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert run("--hf-path", source)[0] == 0
    assert mx.get_peak_memory() - before < 2**18


# --- the lattice -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lattice_source(tmp_path_factory: pytest.TempPathFactory, bfloat16_source: Path) -> Path:
    """The decoder's matrices on a lattice whose steps are float16's, the rest as it was."""
    folder = Path(shutil.copytree(bfloat16_source, tmp_path_factory.mktemp("source") / "qat"))
    changed = {}
    for name, value in weights_of(folder).items():
        if name.endswith("_proj.weight"):
            blocks = np.array(value.astype(mx.float32)).reshape(-1, 32)
            extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
            step = (1.01 * extreme / -8).astype(np.float16).astype(np.float32)  # of more bits than bfloat16 has
            blocks = round_bfloat16(np.clip(np.rint(blocks / step), -8, 7).astype(np.float32) * step)
            changed[name] = mx.array(blocks.reshape(value.shape)).astype(mx.bfloat16)
    edit_weights(folder, **changed)
    return folder


@pytest.mark.parametrize("scales", ["bfloat16", "float32"])
def test_qat_keeps_every_weight_at_its_point(lattice_source: Path, run: Run, scales: str) -> None:
    status, _, err = run("--hf-path", lattice_source, "--recipe", "qat", "--scales", scales)
    assert status == 0 and "41 of 45 matrices are kept on their lattice" in err
    assert "not on a lattice, and quantized as usual: " in err and "language_model.embed_tokens.weight" in err
    written, source = weights_of(Path("mlx_model")), weights_of(lattice_source)
    inexact = 0
    for name, value in source.items():
        if not name.endswith("_proj.weight"):
            continue
        module = name.replace("model.language_model", "language_model.model").removesuffix(".weight")
        scale, bias = written[f"{module}.scales"], written[f"{module}.biases"]
        assert scale.dtype == bias.dtype == (mx.bfloat16 if scales == "bfloat16" else mx.float32)
        back = mx.dequantize(written[f"{module}.weight"], scale.astype(mx.float32), bias.astype(mx.float32), 32, 4)
        weights = np.array(value.astype(mx.float32))
        codes = find_lattice(weights, float32_scales=True)
        assert codes is not None
        points = mx.array((codes.codes.astype(np.float32) - 8).reshape(-1, 32))
        assert mx.array_equal(mx.round(back.reshape(-1, 32) / scale.reshape(-1, 1)), points)
        inexact += np.count_nonzero((round_bfloat16(np.array(back)) != weights).reshape(-1, 32).any(axis=1))
    assert (inexact > 0) == (scales == "bfloat16")
    lines = [line.split("\t") for line in Path("mlx_model/lattice.tsv").read_text().splitlines()[1:]]
    assert len(lines) == 41 and sum(int(line[2]) for line in lines) == inexact
    config = json.loads(Path("mlx_model/config.json").read_text())["quantization"]
    assert config["bits"] == 4 and config["group_size"] == 32
    assert config["language_model.model.embed_tokens"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    load("mlx_model")


def test_qat_is_nearer_to_its_source_than_4bit(lattice_source: Path, run: Run) -> None:
    assert run("--hf-path", lattice_source, "--recipe", "qat", "--dtype", "float32", "--mlx-path", "qat")[0] == 0
    assert run("--hf-path", lattice_source, "--dtype", "float32", "--mlx-path", "4bit")[0] == 0
    expected = load(lattice_source)[0].logits(TEXT)
    errors = [mx.abs(load(name)[0].logits(TEXT) - expected).max().item() for name in ("qat", "4bit")]
    assert errors[0] < errors[1] / 2


def test_a_matrix_that_leaves_the_lattice_further_down_is_quantized_as_usual(
    lattice_source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 2**14)  # it is found in a later block
    folder = Path(shutil.copytree(lattice_source, tmp_path / "off"))
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    value = weights_of(folder)[name]
    value[-1, 3] = 0.123
    edit_weights(folder, **{name: value})
    status, _, err = run("--hf-path", folder, "--recipe", "qat")
    assert status == 0 and "40 of 45 matrices" in err and "layers.2.mlp.up_proj" in err
    written = weights_of(Path("mlx_model"))
    module = name.replace("model.language_model", "language_model.model").removesuffix(".weight")
    weight, scale, _ = mx.quantize(value, 64, 8)
    assert mx.array_equal(written[f"{module}.weight"], weight) and mx.array_equal(written[f"{module}.scales"], scale)
    index = json.loads(Path("mlx_model", INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
    assert Path("mlx_model/model.safetensors").stat().st_size == HEADER_BYTES + index["metadata"]["total_size"]
    load("mlx_model")


def test_dequantized_weights_are_rounded_once(lattice_source: Path, run: Run) -> None:
    assert run("--hf-path", lattice_source, "--recipe", "qat", "--mlx-path", "qat")[0] == 0
    assert run("--hf-path", "qat", "--dequantize", "--mlx-path", "back")[0] == 0
    qat, back = weights_of(Path("qat")), weights_of(Path("back"))
    module = "language_model.model.layers.0.mlp.up_proj"
    scale, bias = (qat[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    exact = np.array(mx.dequantize(qat[f"{module}.weight"], scale, bias, 32, 4))
    assert np.array_equal(np.array(back[f"{module}.weight"].astype(mx.float32)), round_bfloat16(exact))


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_dequantized_weights_are_as_exact_as_the_type_that_is_asked_for(source: Path, run: Run, name: str) -> None:
    assert run("--hf-path", source, "--mlx-path", "four", "--dtype", "bfloat16")[0] == 0
    assert run("--hf-path", "four", "--mlx-path", "back", "--dequantize", "--dtype", name)[0] == 0
    module = "language_model.model.layers.0.mlp.up_proj"
    four, back = (weights_of(Path(folder)) for folder in ("four", "back"))
    scale, bias = (four[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    found, exact = back[f"{module}.weight"], mx.dequantize(four[f"{module}.weight"], scale, bias, 64, 4)
    assert found.dtype == COMPUTING[name] and mx.array_equal(found, exact.astype(found.dtype))


# --- GGUF --------------------------------------------------------------------------------------


def gguf_names(layers: int) -> dict[str, str]:
    """Google's names of the text tensors by llama.cpp's, from the gguf package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
    found = {}
    for name in tensors(EVEN, 0):
        if not name.startswith("model.language_model."):
            continue
        plain = name.replace("model.language_model.", "model.").replace("layer_scalar", "layer_scalar.weight")
        found[str(table.get_name(plain, try_suffixes=(".weight",)))] = name
    return found


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, bfloat16_source: Path) -> Path:
    """What llama.cpp makes of the checkpoint: Q4_0 matrices, a Q6_K embedding, float32 norms."""
    file = tmp_path_factory.mktemp("gguf") / "toy-q4_0.gguf"
    writer = gguf.GGUFWriter(file, "gemma4")
    writer.add_token_list([f"piece{n}" for n in range(50)])
    writer.add_token_scores([0.5] * 50)
    writer.add_string("general.name", "toy")
    values = weights_of(bfloat16_source)
    for name, ours in gguf_names(6).items():
        value = np.array(values[ours].astype(mx.float32))
        if name == "token_embd.weight":
            raw = np.random.default_rng(0).integers(0, 256, (EVEN.vocab, EVEN.hidden // 256 * 210)).astype(np.uint8)
            raw.reshape(-1, 210)[:, 208:] = np.frombuffer(np.float16(0.0003).tobytes(), np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
        elif value.ndim == 2:
            raw = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, value)
    writer.add_tensor("rope_freqs.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_names_are_llama_cpps() -> None:
    names = gguf_names(6)
    assert {"blk.5.attn_k.weight", "blk.0.layer_output_scale.weight", "output_norm.weight"} <= names.keys()
    for name, ours in names.items():
        assert model_path(name) == ours.removeprefix("model.")


def test_blocks_are_unpacked_as_llama_cpp_does() -> None:
    rng = np.random.default_rng(0)
    for kind, size, step_at in ((2, 18, 0), (14, 210, 208)):
        blocks = rng.integers(0, 256, (40, size)).astype(np.uint8)
        blocks[:, step_at : step_at + 2] = rng.standard_normal((40, 1)).astype(np.float16).view(np.uint8)
        if kind == 2:
            q, d = unpack_q4_0(blocks)
            got = q * d[:, None]
        else:
            got = unpack_q6_k(blocks)
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
        assert np.array_equal(got.reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("scales", [None, "float32"])
def test_a_gguf_keeps_its_codes(gguf_file: Path, bfloat16_source: Path, run: Run, scales: str | None) -> None:
    options = () if scales is None else ("--scales", scales)
    status, _, err = run("--hf-path", gguf_file, "--media-from", bfloat16_source, *options)
    assert status == 0 and "41 of 45 matrices are kept" in err
    written = weights_of(Path("mlx_model"))
    values = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    for name, ours in gguf_names(6).items():
        expected = gguf.quants.dequantize(values[name].data, values[name].tensor_type)
        module = ours.replace("model.language_model", "language_model.model").removesuffix(".weight")
        if f"{module}.scales" not in written:
            got = written.get(module, written.get(f"{module}.weight"))
            assert got is not None and np.array_equal(
                np.array(got.astype(mx.float32)).reshape(-1), expected.reshape(-1)
            )
            continue
        scale, bias = (written[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        bits, group = (8, 64) if "embed_tokens" in module else (4, 32)
        got = np.array(mx.dequantize(written[f"{module}.weight"], scale, bias, group, bits))
        if bits == 8:
            # half a step, and what bfloat16 rounds off scale and bias
            assert (np.abs(got - expected) < 2 * np.repeat(np.abs(np.array(scale)), group, axis=1)).all()
        elif scales == "float32":
            assert np.array_equal(got, expected)
        else:
            steps = np.array(scale).reshape(-1, 1)
            q = (expected.reshape(-1, 32) / steps).round()
            assert np.array_equal((got.reshape(-1, 32) / steps).round(), q)
            assert np.abs(got - expected).max() <= 2**-8 * np.abs(expected).max()
    media = "embed_audio.embedding_projection.weight"
    assert written[media].dtype == mx.uint32
    model = load("mlx_model")[0]
    assert model.logits(TEXT).shape == (1, len(TEXT), EVEN.vocab)


@pytest.fixture
def media_file(gguf_file: Path, bfloat16_source: Path, tmp_path: Path) -> Path:
    """The text file and, beside it, what llama.cpp makes of the embedders: colours first, x and y first."""
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(gguf_file, folder)
    writer = gguf.GGUFWriter(folder / "mmproj-toy.gguf", "clip")
    values = weights_of(bfloat16_source)
    for name, path in MEDIA_NAMES.items():
        value = np.array(values[f"model.{path}"].astype(mx.float32))
        if "patch_dense.weight" in path or "patch_ln1" in path:
            index = np.arange(48 * 48 * 3)
            colour, row, column = index // 48**2, index % 48**2 // 48, index % 48
            value = value[..., row * 48 * 3 + column * 3 + colour]
        if path.endswith("pos_embedding"):
            value = value.transpose(1, 0, 2)
        writer.add_tensor(name, np.ascontiguousarray(value).astype(np.float16 if "audio" in path else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / gguf_file.name


def test_embedders_come_from_the_file_beside(
    media_file: Path, bfloat16_source: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 2**14)
    for file in COPIED:
        if (bfloat16_source / file).exists():
            shutil.copy(bfloat16_source / file, media_file.parent)
    shutil.copy(bfloat16_source / "config.json", media_file.parent)
    assert run("--hf-path", media_file, "--mlx-path", "both")[0] == 0
    assert run("--hf-path", media_file.parent, "--mlx-path", "folder")[0] == 0
    (media_file.parent / "mmproj-toy.gguf").unlink()
    assert run("--hf-path", media_file, "--media-from", bfloat16_source, "--mlx-path", "other")[0] == 0
    both, folder, other = (weights_of(Path(name)) for name in ("both", "folder", "other"))
    assert both.keys() == folder.keys() == other.keys()
    for name, value in other.items():
        assert mx.array_equal(both[name], value) and mx.array_equal(folder[name], value), name


def test_a_folder_with_a_gguf_is_taken_for_it(gguf_file: Path, bfloat16_source: Path, run: Run) -> None:
    assert run("--hf-path", gguf_file.parent, "--media-from", bfloat16_source)[0] == 0
    assert Path("mlx_model/lattice.tsv").exists()


def exported(source: Path, folder: Path, kind: str) -> Path:
    """The text file of what `mlx_gemma4.fuse --gguf` writes."""
    shutil.copytree(source, folder)
    for _ in export(open_target(source), folder, "toy", kind):
        pass
    return folder / f"toy-{kind}.gguf"


@pytest.mark.parametrize("options", [(), ("--recipe", "8bit"), ("--q-bits", 4, "--q-group-size", 32)])
def test_a_gguf_in_full_precision_takes_the_recipes_of_a_folder(
    bfloat16_source: Path, run: Run, tmp_path: Path, options: tuple[object, ...]
) -> None:
    file = exported(bfloat16_source, tmp_path / "files", "BF16")
    assert run("--hf-path", file, *options)[0] == 0
    assert run("--hf-path", bfloat16_source, "--mlx-path", "like", *options)[0] == 0
    found, expected = weights_of(Path("mlx_model")), weights_of(Path("like"))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("BF16", ("--dequantize",), "is not quantized; expected a quantized model"),
        ("BF16", ("--recipe", "qat"), "for recipe qat, or another recipe"),
        ("BF16", ("--scales", "float32"), "scales is for recipe qat"),
        ("Q8_0", (), "lies on a 4-bit lattice; expected a .gguf in Q4_0 or in full precision"),
        ("Q8_0", ("--recipe", "4bit"), "is quantized already and excludes recipe 4bit; expected recipe qat"),
        ("Q8_0", ("--dequantize",), "dequantize excludes a .gguf"),
    ],
)
def test_what_a_gguf_does_not_take_is_one_line(
    bfloat16_source: Path, run: Run, tmp_path: Path, kind: str, options: tuple[object, ...], message: str
) -> None:
    file = exported(bfloat16_source, tmp_path / "files", kind)
    status, out, err = run("--hf-path", file, *options)
    assert (status, out) == (2, "") and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_a_gguf_needs_its_media_from_elsewhere(gguf_file: Path, run: Run) -> None:
    status, _, err = run("--hf-path", gguf_file)
    assert status == 2 and "holds the text model alone; expected --media-from" in err


def small_gguf(entry: bytes, tensor: bytes) -> bytes:
    """A header, the architecture, at most one more entry, at most one tensor."""
    architecture = struct.pack("<Q20sIQ6s", 20, b"general.architecture", 8, 6, b"gemma4")
    return struct.pack("<4sIQQ", b"GGUF", 3, bool(tensor), 1 + bool(entry)) + architecture + entry + tensor


def test_a_damaged_gguf_is_one_line(gguf_file: Path, bfloat16_source: Path, run: Run, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    other = whole.replace(b"gemma4", b"gemma9", 1)
    for data, message in (
        (whole[:-100_000], "expected a whole GGUF file"),
        (whole[:500], "is damaged or incomplete"),
        (b"GGML" + whole[4:], "is no GGUF"),
        (other, "holds the architecture 'gemma9'; expected 'gemma4'"),
        (b"", "is damaged or incomplete"),
        (whole[:24] + struct.pack("<Q", 2**62) + whole[32:], "is damaged or incomplete"),
        (small_gguf(struct.pack("<Q17sII", 17, b"general.alignment", 4, 0), b""), "is damaged or incomplete"),
        (small_gguf(struct.pack("<Q17sIQ1s", 17, b"general.alignment", 8, 1, b"a"), b""), "is damaged or incomplete"),
        (small_gguf(struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 5000, b""), "is damaged or"),
        (small_gguf(b"", struct.pack("<Q1sIIQ", 1, b"a", 0, 0, 0)), "is damaged or incomplete"),
    ):
        damaged.write_bytes(data)
        status, _, err = run("--hf-path", damaged, "--media-from", bfloat16_source)
        assert status == 2 and message in err and err.count("\n") == 1
        assert not Path("mlx_model").exists()


# --- the hub -----------------------------------------------------------------------------------


class Hub:
    """The hub's client, which only notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def whoami(self) -> None:
        self.calls.append("whoami")

    def create_repo(self, repo_id: str, exist_ok: bool) -> None:
        self.calls.append((repo_id, exist_ok))

    def upload_folder(self, repo_id: str, folder_path: Path) -> None:
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())[:2]))


def test_a_conversion_is_uploaded_when_it_is_whole(source: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(upload, "HfApi", lambda: hub)
    assert run("--hf-path", source, "--upload-repo", "me/gemma")[0] == 0
    assert hub.calls == ["whoami", ("me/gemma", True), ("me/gemma", ["README.md", "chat_template.jinja"])]
    assert "mlx_gemma4.generate --model me/gemma " in Path("mlx_model/README.md").read_text()  # where others find it


def test_who_is_not_logged_in_hears_it_before_the_conversion(
    source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(hub: Hub) -> None:
        raise LocalTokenNotFoundError("no token\nadvice")

    monkeypatch.setattr(Hub, "whoami", refuse)
    monkeypatch.setattr(upload, "HfApi", Hub)
    status, _, err = run("--hf-path", source, "--upload-repo", "me/gemma")
    assert (status, err) == (2, "error: logging in to the hub (`hf auth login`) failed: no token\n")
    assert not any(tmp_path.iterdir())


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "4bit", "--q-bits", 4), "recipe excludes q-bits"),
        (("--recipe", "best"), "recipe is 'best'; expected one of 4bit, 8bit, mixed, qat"),
        (("--q-bits", 7), "q-bits is 7"),
        (("--q-bits", "four"), "'four'; expected a whole number"),
        (("--q-mode", "mxfp4", "--q-group-size", 64), "q-group-size is 64; mxfp4 takes 32"),
        (("--q-group-size", 48), "q-group-size is 48; affine takes 32, 64, 128"),
        (("--dtype", "int8"), "dtype is 'int8'; expected one of bfloat16, float16, float32"),
        (("--drafter-bits", 7), "drafter-bits is 7; expected one of 2, 3, 4, 5, 6, 8"),
        (("--scales", "float32"), "scales is for recipe qat"),
        (("--recipe", "qat"), "none of the 45 matrices of "),
        (("--dequantize",), "is not quantized; expected a quantized model"),
        (("--dequantize", "--recipe", "8bit"), "dequantize excludes recipe 8bit"),
        (("--media-from", "elsewhere"), "media-from is for a .gguf file"),
        (("--drafter", "nowhere"), "'nowhere' is no folder"),
        (("--unknown",), "No such option: --unknown"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    source: Path, run: Run, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    status, out, err = run("--hf-path", source, *options)
    assert (status, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith("error: ") and err.count("\n") <= 2
    assert not any(tmp_path.iterdir())


def test_a_group_size_that_divides_nothing_is_refused(tiny_folder: Path, run: Run, tmp_path: Path) -> None:
    status, _, err = run("--hf-path", tiny_folder, "--q-group-size", 64)
    assert status == 2 and "the group size 64 does not divide the 96 columns of language_model.layers." in err
    assert not any(tmp_path.iterdir())


def test_a_quantized_model_is_not_quantized_again(source: Path, run: Run) -> None:
    assert run("--hf-path", source, "--mlx-path", "four")[0] == 0
    status, _, err = run("--hf-path", "four")
    assert status == 2 and "four is quantized already; expected the original" in err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gemma3"}'), "model_type is 'gemma3'"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model*.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "is damaged or incomplete"),
        (lambda folder: cut(folder / "model.safetensors"), "is damaged or incomplete"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "b"}}'), "lacks b, 1 of 1 weight files"),
        (lambda folder: edit_weights(folder, **{"model.language_model.norm.weight": None}), "lacks 1 of "),
        (lambda folder: cut(folder / "drafter/model.safetensors"), "is damaged or incomplete"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(
    source: Path, run: Run, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "bad"))
    damage(folder)
    status, out, err = run("--hf-path", folder)
    assert (status, out) == (2, "") and message in err
    assert err.splitlines()[-1].startswith("error: ") and err.count("\n") <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def test_an_output_that_exists_is_left_alone(source: Path, run: Run) -> None:
    Path("full").mkdir()
    Path("full/kept").write_text("mine")
    Path("file").write_text("mine")
    Path("empty").mkdir()
    status, _, err = run("--hf-path", source, "--mlx-path", "full")
    assert status == 2 and "full is a folder that is not empty" in err
    status, _, err = run("--hf-path", source, "--mlx-path", "file")
    assert status == 2 and "file is no name for a new folder" in err
    for below in ("file/new", "file/new/er"):
        status, _, err = run("--hf-path", source, "--mlx-path", below)
        assert status == 2 and f"{below} is no name for a new folder" in err
    assert [path.name for path in Path("full").iterdir()] == ["kept"]
    assert run("--hf-path", source, "--mlx-path", "empty")[0] == 0


def test_room_on_the_disk_is_checked_first(
    source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    status, _, err = run("--hf-path", source)
    assert status == 1 and "free; expected more room" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "disk full"), 1)])
def test_what_stops_half_way_leaves_nothing(
    source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: int
) -> None:
    write = shards_module.ShardWriter.write
    calls = []

    def stopping(self: shards_module.ShardWriter, blocks: dict[str, mx.array]) -> None:
        calls.append(1)
        if len(calls) == 20:
            assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
            raise error
        write(self, blocks)

    monkeypatch.setattr(shards_module.ShardWriter, "write", stopping)
    assert run("--hf-path", source)[0] == expected
    assert not any(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared_away(source: Path, run: Run, tmp_path: Path) -> None:
    left = tmp_path / ".mlx_model.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / "shard-7.part").write_bytes(b"half")
    assert run("--hf-path", source)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mlx_model"]
    assert not list(Path("mlx_model").glob("*.part"))
    load("mlx_model")


def test_the_script_in_the_checkout_is_the_command(source: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "convert.py"
    words = [sys.executable, str(script), "--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / 'out'}: ")
    assert (tmp_path / "out" / "drafter" / "config.json").exists()
