"""Recipes: which matrix gets how many bits, and that the published shapes then fit a 16 GB Mac."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.config import Quantization, parse_quantization
from mlx_gemma4.convert.recipes import (
    BITS,
    GROUP_SIZES,
    Shape,
    config_quantization,
    is_matrix,
    named_recipe,
    packed_nbytes,
    plan,
    sensitive,
    uniform_recipe,
    upgrades,
    weights_nbytes,
)


def published_shapes() -> dict[str, Shape]:
    """The 12B's tensors, computed from its config: 11.96 B weights."""
    hidden, mlp = 3840, 15360
    shapes: dict[str, Shape] = {
        "language_model.embed_tokens.weight": (262144, hidden),
        "language_model.norm.weight": (hidden,),
        "vision_embedder.patch_dense.weight": (hidden, 6912),
        "vision_embedder.patch_dense.bias": (hidden,),
        "vision_embedder.pos_embedding": (1120, 2, hidden),
        "embed_vision.embedding_projection.weight": (hidden, hidden),
        "embed_audio.embedding_projection.weight": (hidden, 640),
    }
    for norm, width in (("patch_ln1", 6912), ("patch_ln2", hidden), ("pos_norm", hidden)):
        shapes |= {f"vision_embedder.{norm}.{part}": (width,) for part in ("weight", "bias")}
    for i in range(48):
        layer, full = f"language_model.layers.{i}", i % 6 == 5
        dims, keys = (512, 512) if full else (256, 2048)
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (16 * dims, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, 16 * dims),
            f"{layer}.self_attn.q_norm.weight": (dims,),
            f"{layer}.self_attn.k_norm.weight": (dims,),
            f"{layer}.mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}.mlp.up_proj.weight": (mlp, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, mlp),
            f"{layer}.layer_scalar": (1,),
        }
        if not full:
            shapes[f"{layer}.self_attn.v_proj.weight"] = (keys, hidden)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}.{norm}_layernorm.weight"] = (hidden,)
    return shapes


SHAPES = published_shapes()


def size(name: str) -> int:
    return weights_nbytes(SHAPES, plan(named_recipe(name), SHAPES, 2), 2)


def test_the_published_shapes_are_all_there() -> None:
    assert len(SHAPES) == 677
    assert weights_nbytes(SHAPES, {}, 2) == 23_919_460_448


@pytest.mark.parametrize(("name", "gigabytes"), [("4bit", 6.741), ("8bit", 12.716), ("mixed", 7.589)])
def test_the_published_shapes_become_as_large_as_stated(name: str, gigabytes: float) -> None:
    assert round(size(name) / 1e9, 3) == gigabytes


def test_mixed_uses_its_budget_for_what_is_sensitive() -> None:
    chosen = plan(named_recipe("mixed"), SHAPES, 2)
    bits = {path: own.bits for path, own in chosen.items() if own is not None}
    assert size("mixed") <= 7.6e9 < size("mixed") + 15_000_000  # no further matrix of the order's next kind fits
    assert {n for path, n in bits.items() if "v_proj" in path} == {8}
    assert {bits[f"language_model.layers.{i}.self_attn.k_proj.weight"] for i in range(5, 48, 6)} == {8}
    assert bits["language_model.embed_tokens.weight"] == 6
    down = [bits[f"language_model.layers.{i}.mlp.down_proj.weight"] for i in range(48)]
    assert down[0] == down[47] == 6 and down[24] == 4
    assert down == sorted(down[:24], reverse=True) + sorted(down[24:])  # from both ends inwards
    assert {n for path, n in bits.items() if "gate_proj" in path} == {4}


def test_upgrades_stay_within_their_room_and_their_order() -> None:
    chosen = plan(named_recipe("4bit"), SHAPES, 2)
    matrices = {path: shape for path, shape in SHAPES.items() if is_matrix(path, shape)}
    first = next(iter(sensitive(matrices)))[0]
    cost = 3840 * 6912 // 2  # from 4 to 8 bits
    assert upgrades(matrices, chosen, cost - 1, 2).get(first) is None
    assert upgrades(matrices, chosen, cost, 2)[first] == Quantization(64, 8, "affine")


@pytest.mark.parametrize("mode", BITS)
def test_sizes_are_those_of_mlx(mode: str) -> None:
    for bits in BITS[mode]:
        for group_size in GROUP_SIZES[mode]:
            weights = mx.array(np.random.default_rng(0).standard_normal((8, 256))).astype(mx.bfloat16)
            made = mx.quantize(weights, group_size, bits, mode)
            own = Quantization(group_size, bits, mode)
            assert packed_nbytes((8, 256), own, 2) == sum(part.nbytes for part in made)


def test_every_mode_has_its_own_usual_values() -> None:
    assert uniform_recipe(None, None, "nvfp4").base == Quantization(16, 4, "nvfp4")
    assert uniform_recipe(None, None, "mxfp8").base == Quantization(32, 8, "mxfp8")
    assert uniform_recipe(3, 128, None).base == Quantization(128, 3, "affine")


@pytest.mark.parametrize(
    ("bits", "group_size", "mode", "message"),
    [
        (7, None, None, "q-bits is 7; affine takes 2, 3, 4, 5, 6, 8"),
        (4, 48, None, "q-group-size is 48; affine takes 32, 64, 128"),
        (4, 64, "mxfp4", "q-group-size is 64; mxfp4 takes 32"),
        (4, None, "mxfp8", "q-bits is 4; mxfp8 takes 8"),
        (0, None, None, "q-bits is 0"),
        (None, None, "gptq", "q-mode is 'gptq'; expected one of affine, mxfp4, nvfp4, mxfp8"),
        (None, None, "9" * 5000, r"q-mode is '9+\.\.\.9+'; expected one of affine, mxfp4, nvfp4, mxfp8"),
    ],
)
def test_what_mlx_cannot_do_is_refused(
    bits: int | None, group_size: int | None, mode: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        uniform_recipe(bits, group_size, mode)


NARROW: dict[str, Shape] = {"a.weight": (8, 64), "b.weight": (8, 96), "norm.weight": (64,), "table": (4, 64)}


def test_only_matrices_are_quantized_and_only_where_the_group_size_divides() -> None:
    assert plan(named_recipe("4bit"), NARROW, 2) == {"a.weight": Quantization(64, 4, "affine"), "b.weight": None}


def test_a_group_size_that_was_asked_for_has_to_divide() -> None:
    with pytest.raises(
        ValueError, match=r"group size 64 does not divide the 96 columns of b.weight \(1 of 2 matrices\)"
    ):
        plan(uniform_recipe(4, 64, None), NARROW, 2)


def test_the_config_says_what_the_parser_reads() -> None:
    default, own = Quantization(64, 4, "affine"), Quantization(32, 8, "affine")
    written = config_quantization({"a.weight": default, "b.weight": own, "c.weight": default, "d.weight": None})
    assert parse_quantization(written) == (default, {"b": own})
    assert config_quantization({"d.weight": None}) is None
