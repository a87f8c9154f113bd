"""Recordings are cut where nobody speaks."""

import numpy as np
import pytest

for library in ("starlette", "python_multipart", "pydantic"):
    pytest.importorskip(library, reason="needs the extra serve")

from mlx_gemma4.serve.transcription import LONGEST, RATE, cut  # noqa: E402


def speech(seconds: float, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def test_a_long_recording_is_cut_in_its_pauses() -> None:
    rng = np.random.default_rng(0)
    parts, pauses, place = [], [], 0
    for seconds in (12, 17, 9, 14, 11, 8, 16, 13):
        parts += [speech(seconds, rng), np.zeros(RATE // 2, np.float32)]
        pauses.append((place + seconds * RATE, place + seconds * RATE + RATE // 2))
        place += seconds * RATE + RATE // 2
    samples = np.concatenate(parts)
    pieces = list(cut(samples))
    assert [first for first, _ in pieces] == [0] + [end for _, end in pieces[:-1]] and pieces[-1][1] == len(samples)
    assert all(end - first <= LONGEST for first, end in pieces)
    assert all(any(first < end < last for first, last in pauses) for _, end in pieces[:-1])


@pytest.mark.parametrize("samples", [1, 100, LONGEST, LONGEST + 1, 3 * LONGEST + 7])
def test_no_length_is_cut_wrongly(samples: int) -> None:
    pieces = list(cut(np.zeros(samples, np.float32)))
    assert pieces[0][0] == 0 and pieces[-1][1] == samples
    assert all(0 < end - first <= LONGEST for first, end in pieces)
