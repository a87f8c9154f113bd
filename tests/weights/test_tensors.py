"""Tensors in safetensors files: their names, types and values."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoint import OTHER, TINY, Shape, tensors

from mlx_gemma4.config import CheckpointError
from mlx_gemma4.weights.tensors import DTYPE_NAMES, conversion_name, from_header, list_tensors, module_path

TYPES = [
    mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64,
    mx.uint64, mx.bool_,
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.language_model.layers.0.layer_scalar", "language_model.layers.0.layer_scalar"),
        ("language_model.model.layers.0.layer_scalar", "language_model.layers.0.layer_scalar"),
        ("model.vision_embedder.pos_embedding", "vision_embedder.pos_embedding"),
        ("vision_embedder.pos_embedding", "vision_embedder.pos_embedding"),
        ("model.embed_audio.embedding_projection.weight", "embed_audio.embedding_projection.weight"),
    ],
)
def test_both_naming_schemes_give_the_models_paths(name: str, path: str) -> None:
    assert module_path(name) == path


@pytest.mark.parametrize("shape", [TINY, OTHER], ids=["tiny", "other"])
def test_the_name_of_a_conversion_leads_back_to_the_path(shape: Shape) -> None:
    paths = {module_path(name) for name in tensors(shape, seed=0)}
    for path in paths:
        assert module_path(path) == path
        assert module_path(conversion_name(path)) == path
        assert module_path(f"model.{path}") == path  # Google's name
    assert len({conversion_name(path) for path in paths}) == len(paths)


def test_all_types_of_a_safetensors_file_have_a_size(tmp_path: Path) -> None:
    arrays = {str(dtype): mx.zeros((3, 5), dtype) for dtype in TYPES}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    found = {tensor.name: tensor.nbytes for tensor in list_tensors(tmp_path).values()}
    assert found == {name: array.nbytes for name, array in arrays.items()}


def test_values_of_every_type_are_read_whole_and_by_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = {str(dtype): mx.array(rng.integers(0, 100, (7, 3, 5))).astype(dtype) for dtype in TYPES}
    raw |= {"one": mx.array([2.5]), "none": mx.zeros((0, 4)), "scalar": mx.array(3.5)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), raw)
    found = list_tensors(tmp_path)
    for name, expected in raw.items():
        value = found[name].read()
        assert value.dtype == expected.dtype == found[name].dtype
        assert mx.array_equal(value, expected)
        for start, stop in ((0, 2), (2, 7), (3, 3)):
            if expected.ndim == 3:
                assert mx.array_equal(found[name].rows(start, stop), expected[start:stop])


def test_what_is_read_is_the_tensors_alone(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {name: mx.zeros((256, 1024)) for name in "abcdefgh"})
    found = list_tensors(tmp_path)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    value = found["d"].read()
    mx.eval(value)
    assert mx.get_active_memory() - before == value.nbytes == 2**20
    assert mx.get_peak_memory() - before < value.nbytes + 1000


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {"a": mx.zeros((64, 64))})
    tensor = list_tensors(tmp_path)["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors ends early; expected \d+ bytes at least, so fetch it"
    ):
        tensor.read()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete \("):
        list_tensors(tmp_path)


def test_a_type_that_mlx_lacks_is_named() -> None:
    header = {"a.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}
    with pytest.raises(
        CheckpointError, match=r"^model\.safetensors: 'a\.weight' is stored as 'F8_E4M3', which MLX does not have; "
    ):
        from_header(Path("model.safetensors"), header, 0)
    assert "F8_E4M3" not in DTYPE_NAMES.values()
