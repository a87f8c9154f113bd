"""Which row has which place in a batch, whatever layers a machine has."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_checkpoint import TINY, config

from mlx_gemma4.config import FULL, SLIDING, GenerationConfig, TextConfig, parse_config
from mlx_gemma4.decoding.batch import MOST_ROWS, Batch, Seat
from mlx_gemma4.decoding.sampling import Sampler, Sampling
from mlx_gemma4.model.cache import Caches, capacity
from mlx_gemma4.model.model import Model

TEXT: TextConfig = parse_config(config(TINY), GenerationConfig(eos_token_ids=())).text
STAGES = Sampler(Sampling(temperature=0), GenerationConfig(eos_token_ids=()), TEXT.vocab_size).stages
# A row comes with so many positions, or the row of that number leaves, or places are to do for so many more rows.
steps = st.one_of(
    st.tuples(st.just("put"), st.sampled_from([5, 5, 600, 2000])),
    st.tuples(st.just("leave"), st.integers(0, 4)),
    st.tuples(st.just("shrink"), st.integers(0, 3)),
)


def placed(kinds: tuple[str, ...], script: Sequence[tuple[str, int]]) -> list[list[int | None]]:
    """Behind each step which row each place has, as the number of the step that it came with, and as its state says."""
    text = replace(TEXT, layer_types=kinds)
    batch = Batch(cast(Model, SimpleNamespace(config=SimpleNamespace(text=text))))
    came: dict[Seat, int] = {}
    found: list[list[int | None]] = []
    for number, (step, value) in enumerate(script):
        if step == "put" and len(batch.rows) < MOST_ROWS:
            seat = Seat(STAGES, value, 9, 0)
            came[seat] = number
            state = {"token": mx.array([number]), "offset": mx.array([value]), "limit": mx.array([0])}
            batch.put(seat, Caches.empty(text, mx.float32, capacity(value + 100)), state)
        elif step == "leave" and batch.rows:
            batch.remove(batch.rows[value % len(batch.rows)])
        elif step == "shrink":
            batch.shrink(min(len(batch.rows) + value, MOST_ROWS))
        found.append([None if seat is None else came[seat] for seat in batch.seats])
        for place, seat in enumerate(batch.seats):
            if seat is not None:
                assert batch.state["token"][place].item() == came[seat]
            else:
                assert batch.state["limit"][place].item() == -1
        if batch.rows and FULL in kinds:
            assert batch.caches is not None and batch.caches.slots >= max(seat.positions for seat in batch.rows)
    return found


@settings(max_examples=60, deadline=None)
@example([("put", 5)] * 5 + [("leave", 0)] * 3 + [("put", 5)])  # fewer rows than half of the places, and one comes
@example([("put", 2000), *[("put", 5)] * 3, ("leave", 0), ("shrink", 1)])  # fewer slots
@given(script=st.lists(steps, min_size=4, max_size=24))
def test_rows_have_the_same_places_on_machines_with_and_without_full_layers(script: list[tuple[str, int]]) -> None:
    assert placed((SLIDING,), script) == placed((SLIDING, FULL), script)
