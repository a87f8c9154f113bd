"""A reply that only repeats itself: found at the first token at which that holds, and nowhere else."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma4.config import read_config
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.reply.repetition import Repetition, RepetitionSettings, parse_repetition_detection
from mlx_gemma4.weights.load import DEMO

AUTO = RepetitionSettings()


def holds(ids: Sequence[int], settings: RepetitionSettings) -> bool:
    """The definition: the ids end with copies of a block that is no repetition itself."""
    for size in range(settings.min_pattern_size, settings.max_pattern_size + 1):
        length = max(size * settings.min_count, settings.min_tokens)
        if length > len(ids):
            continue
        tail = ids[-length:]
        block = tail[-size:]
        repeated = all(tail[i] == tail[i - size] for i in range(size, length))
        parts = [part for part in range(1, size) if size % part == 0]
        if repeated and not any(block == block[:part] * (size // part) for part in parts):
            return True
    return False


def first(ids: Sequence[int], settings: RepetitionSettings) -> int | None:
    return next((end for end in range(1, len(ids) + 1) if holds(ids[:end], settings)), None)


def fed(ids: Sequence[int], settings: RepetitionSettings, cuts: Sequence[int] = ()) -> int | None:
    """Where the detector says so, the ids given in rounds that end at `cuts`."""
    detector = Repetition(settings)
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        if (taken := detector.feed(ids[start:end])) is not None:
            return start + taken
    return None


SETTINGS = st.builds(
    lambda low, more, count, tokens: RepetitionSettings(low + more, low, count, tokens),
    st.integers(1, 5), st.integers(0, 5), st.integers(2, 4), st.integers(0, 14),
)  # fmt: skip
TOKENS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=11), st.integers(1, 6)).map(
        lambda pair: pair[0] * pair[1]
    ),
    max_size=5,
).map(lambda blocks: [token for block in blocks for token in block])


@given(TOKENS, SETTINGS, st.data())
def test_it_is_found_at_the_first_token_at_which_it_holds(
    ids: list[int], settings: RepetitionSettings, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    assert fed(ids, settings, cuts) == first(ids, settings)


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=64), st.lists(st.integers(0, 1), max_size=80), st.integers(6, 9)
)
def test_the_default_is_found_at_that_token_too(block: list[int], before: list[int], count: int) -> None:
    ids = before + block * count + [7]
    assert fed(ids, AUTO) == first(ids, AUTO)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64])
def test_the_default_takes_eight_copies_and_128_tokens(size: int) -> None:
    start, block = list(range(500, 700)), list(range(size))
    length = max(8 * size, 128)
    ids = start + (block * 128)[: length + 5]
    assert fed(ids, AUTO) == len(start) + length


def test_longer_blocks_pass() -> None:
    assert fed(list(range(65)) * 50, AUTO) is None


def test_a_block_that_repeats_a_shorter_one_is_not_taken_for_longer() -> None:
    assert fed([5] * 100, RepetitionSettings(8, 2, 3, 0)) is None
    assert fed([5, 6] * 100, RepetitionSettings(8, 3, 3, 0)) is None
    assert fed([5, 6] * 100, RepetitionSettings(8, 2, 3, 0)) == 6


def test_one_other_token_begins_the_count_again() -> None:
    ids = [*[1] * 127, 2] * 20
    assert fed(ids, AUTO) is None


def test_very_large_numbers_are_never_met() -> None:
    settings = parse_repetition_detection({"max_pattern_size": 2**31 - 1, "min_count": 2**31 - 1})
    assert settings is not None
    assert fed([1] * 300, settings) is None
    settings = parse_repetition_detection({"max_pattern_size": 2**30, "min_count": 3})
    assert settings is not None
    assert fed([*range(1000), *[*range(400)] * 3], settings) == 2200


def test_its_note_counts_the_copies() -> None:
    detector = Repetition(AUTO)
    detector.feed([3, 4, 5] * 50)
    assert "a block of 3 tokens 42 times" in detector.note()


def test_a_dict_is_read_as_vllm_reads_it() -> None:
    settings = parse_repetition_detection({"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 3})
    assert settings == RepetitionSettings(2, 1, 3, 0)
    assert fed([1, 2, 1, 2, 1, 2], settings) == 6
    assert parse_repetition_detection({"max_pattern_size": np.int64(4), "min_count": 2}) == RepetitionSettings(
        4, 1, 2, 0
    )
    assert parse_repetition_detection({"max_pattern_size": 0}) is None
    assert parse_repetition_detection({}) is None


def test_words_switch_it() -> None:
    assert parse_repetition_detection("auto") == AUTO
    assert parse_repetition_detection("off") is None


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 3, 1.5, "on", "", "x" * 5000, b"auto", [], ["auto"], ("auto",), {"auto"},
        {"max_pattern_size": 8}, {"max_pattern_size": 8, "min_count": 1}, {"max_pattern_size": -1, "min_count": 2},
        {"max_pattern_size": 8.0, "min_count": 2}, {"max_pattern_size": True, "min_count": 2},
        {"max_pattern_size": "8", "min_count": 2}, {"max_pattern_size": None}, {"min_pattern_size": 2},
        {"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2}, {"max_pattern_size": float("nan")},
        {"max_pattern_size": 4, "min_count": -(10**400)}, {"max_pattern_size": 10**400, "min_count": 2},
        {"min_tokens": 3}, {1: 2}, {None: 1},
        {"max_pattern_size": [8]}, {"max_pattern_size": 8, "min_count": 8, "x" * 3000: 1},
    ],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(ValueError, match="repetition_detection") as caught:
        parse_repetition_detection(value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


REAL = {
    "table": "\n".join(
        ["| Name | Points | Won | Lost |", "|---|---|---|---|"]
        + [f"| Player {n} | {n * 3 % 7} | {n % 4} | 0 |" for n in range(60)]
    ),
    "empty table": "\n".join(["| Day | Morning | Noon | Evening |", "|:---|:---:|:---:|---:|"] + ["|  |  |  |  |"] * 6),
    "code": "\n".join(f"    case {n}:\n        return values[{n}];\n        break;" for n in range(80)),
    "list": "\n".join(f"{n}. Item number {n}" for n in range(1, 150)),
    "numbers": str([n * 37 % 101 for n in range(400)]),
    "ones and zeros": str([[int(row == column) for column in range(12)] for row in range(12)]),
    "art": "\n".join("*" * (2 * n + 1) for n in range(30)),
    "rule": "=" * 80 + "\n" + "-" * 100 + "\n",
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_what_people_ask_for_passes(name: str) -> None:
    tokenizer = load_processor(DEMO, read_config(DEMO)).tokenizer
    ids = tokenizer.encode(REAL[name], add_special_tokens=False).ids
    assert fed(ids, AUTO) is None
