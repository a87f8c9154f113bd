"""Weights that lie on a 4-bit lattice keep their place on it, and are given back exactly where that can be."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.convert.lattice import BLOCK, Lattice, find_lattice, keep_lattice, pack, round_bfloat16


def scales(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Steps of both signs, as checkpoints have had them rounded."""
    d = (np.random.default_rng(seed).standard_normal(count) * 0.01).astype(np.float32)
    return {"float16": d.astype(np.float16).astype(np.float32), "bfloat16": round_bfloat16(d), "float32": d}[kind]


def integers(count: int, seed: int = 1) -> np.ndarray:
    """Codes as llama.cpp's Q4_0 has them: the weight of largest magnitude is −8 d."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-8, 8, (count, BLOCK))
    q[np.arange(count), rng.integers(0, BLOCK, count)] = -8
    return q.astype(np.float32)


def back(found: Lattice) -> np.ndarray:
    """What MLX computes with: scale · (q + 8) + bias, each in float32, then rounded."""
    scale = found.scales[:, None]
    return round_bfloat16(found.codes.astype(np.float32) * scale + scale * np.float32(-8))


def exact_by_some_scale(weights: np.ndarray) -> bool:
    """Whether any bfloat16 scale at all gives one block back, with the best code for every weight."""
    every = (np.arange(0x0080, 0x7F80, dtype=np.uint32) << 16).view(np.float32)
    largest = np.abs(weights).max()
    every = every[(every >= largest / 9) & (every <= largest * 1.1)]
    every = np.concatenate([every, -every])[:, None]
    q = np.clip(np.rint(weights / every), -8, 7).astype(np.float32)
    return bool((round_bfloat16(q * every) == weights).all(axis=1).any())


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("float32_scales", [False, True])
def test_every_code_is_recovered(kind: str, float32_scales: bool) -> None:
    q, d = integers(2000), scales(kind, 2000)
    found = find_lattice(round_bfloat16(q * d[:, None]), float32_scales)
    assert found is not None
    assert (found.codes == q + 8).all()
    assert (np.sign(found.scales) == np.sign(d)).all()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_blocks_are_exact_wherever_some_bfloat16_scale_allows_it(kind: str) -> None:
    weights = round_bfloat16(integers(300) * scales(kind, 300)[:, None])
    found = find_lattice(weights)
    assert found is not None
    exact = (back(found) == weights).all(axis=1)
    assert exact.tolist() == [exact_by_some_scale(block) for block in weights]
    assert exact.all() == (kind == "bfloat16")
    assert found.inexact == np.count_nonzero(~exact)
    assert found.error == np.abs(back(found) - weights).max()
    assert not np.any(found.scales.view(np.uint32) & 0xFFFF)


def test_blocks_without_their_lowest_code_are_exact_wherever_some_scale_allows_it() -> None:
    """A narrow block has several lattices: the one whose scale is exact counts."""
    rng = np.random.default_rng(2)
    width = rng.integers(1, 9, 400)[:, None]
    q = np.clip(rng.integers(-8, 8, (400, BLOCK)), -width, np.minimum(width, 7)).astype(np.float32)
    for kind in ("float16", "bfloat16"):
        weights = round_bfloat16(q * scales(kind, 400)[:, None])
        found = find_lattice(weights)
        assert found is not None
        exact = (back(found) == weights).all(axis=1)
        assert exact.tolist() == [exact_by_some_scale(block) for block in weights]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_float32_scales_are_always_exact(kind: str) -> None:
    weights = round_bfloat16(integers(5000) * scales(kind, 5000)[:, None])
    found = find_lattice(weights, float32_scales=True)
    assert found is not None
    assert (back(found) == weights).all()
    assert found.inexact == 0 and found.error == 0


def test_an_extremum_of_either_sign_is_the_lowest_code() -> None:
    weights = np.zeros((2, BLOCK), np.float32)
    weights[0, :3] = 8, 3, -7
    weights[1, :3] = -8, -3, 7
    found = find_lattice(weights)
    assert found is not None
    assert found.codes[0, :4].tolist() == [0, 5, 15, 8]
    assert found.scales.tolist() == [-1, 1]
    assert (found.codes[0] == found.codes[1]).all()


def test_blocks_of_zeros_stay_zeros() -> None:
    weights = round_bfloat16(integers(4) * scales("float16", 4)[:, None])
    weights[1] = 0
    found = find_lattice(weights)
    assert found is not None
    assert (found.codes[1] == 8).all() and found.scales[1] == 0
    assert (back(found)[1] == 0).all()


def test_one_weight_off_the_lattice_is_noticed() -> None:
    weights = round_bfloat16(integers(3) * scales("bfloat16", 3)[:, None])
    assert find_lattice(weights) is not None
    between = weights.copy()
    between[1, np.argmin(np.abs(between[1]))] = np.abs(weights[1]).max() * 0.4375  # 3.5 of 8
    assert find_lattice(between) is None
    for value in (np.inf, np.nan):
        broken = weights.copy()
        broken[2, 0] = value
        assert find_lattice(broken) is None


def test_random_weights_are_on_no_lattice() -> None:
    weights = np.random.default_rng(0).standard_normal((4, BLOCK)).astype(np.float32)
    assert find_lattice(round_bfloat16(weights)) is None
    assert find_lattice(weights) is None  # not even bfloat16


def test_known_codes_are_kept_with_the_best_scale() -> None:
    q, d = integers(500), scales("float16", 500)
    kept, found = keep_lattice(q, d), find_lattice(round_bfloat16(q * d[:, None]))
    assert found is not None
    assert (kept.codes == q + 8).all()
    assert (kept.inexact, kept.error) == (found.inexact, found.error)
    whole = keep_lattice(q, d, float32_scales=True)
    assert (whole.scales == d).all() and whole.inexact == 0


def test_mlx_reads_the_packed_codes() -> None:
    weights = round_bfloat16(integers(24) * scales("bfloat16", 24)[:, None]).reshape(6, 128)
    found = find_lattice(weights)
    assert found is not None
    scale = mx.array(found.scales.reshape(6, 4))
    read = mx.dequantize(mx.array(pack(found.codes, 128)), scale, -8 * scale, 32, 4)
    assert np.array_equal(round_bfloat16(np.array(read)), weights)
