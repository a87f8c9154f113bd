"""A round is few kernels, and few that wait for each other."""

import mlx.core as mx
import pytest
from toy_checkpoint import Shape, write_checkpoint, write_drafter

from benchmarks.dispatches import kernels, round_kernels
from mlx_gemma4 import load
from mlx_gemma4.convert.command import convert
from mlx_gemma4.model.model import Model

LAYERS = 12
# Heads as wide as the 12B's, for quantization groups of 64 move with whole blocks of their dimensions.
SHAPE = Shape(hidden=128, mlp=128, heads=4, kv_heads=2, head_dim=256, global_head_dim=512, periods=2)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("kernels") / "whole", SHAPE, dtype=mx.bfloat16)
    write_drafter(folder / "drafter", SHAPE, dtype=mx.bfloat16)
    made = folder.with_name("quantized")
    convert(hf_path=str(folder), mlx_path=str(made), q_bits=4)
    return load(made)[0]


def test_kernels_are_counted_as_said() -> None:
    a, b = mx.zeros((2, 3)), mx.zeros((2, 3))
    mx.eval(a, b)
    assert kernels((a @ b.T).reshape(4)).by_name == {"Matmul": 1}
    assert kernels(mx.concatenate([a, b, a])).count == 3
    assert kernels(mx.slice_update(a, b, mx.array(0), axes=(0,))).count >= 2
    found = kernels(mx.exp(mx.sin(a) @ mx.cos(b).T))
    assert (found.count, found.chain) == (4, 3)


def test_a_plain_round_of_12_layers_has_at_most_23_kernels_a_layer(quantized: Model) -> None:
    found = round_kernels(quantized, 0)
    assert found.count <= 23 * LAYERS
    assert found.chain <= 200


def test_drafts_cost_no_more_than_their_own_layers(quantized: Model) -> None:
    plain, drafted = round_kernels(quantized, 0), round_kernels(quantized, 3)
    assert drafted.count <= plain.count + 3 * 100  # of each four layers, a head and a draw
    assert drafted.by_name["QuantizedMatmul"] < 2.5 * plain.by_name["QuantizedMatmul"]
