"""Drafts in a batch, on machines whose costs are known and with rows of known acceptance."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mlx_gemma4.decoding.controller import MAX_DRAFTS, Acceptance, first_of
from mlx_gemma4.decoding.round import Learnt

Cost = Callable[[int, int], float]


def metal(rows: int, drafts: int) -> float:
    """What so many rows of one pass cost on an M4 Pro, in plain rounds of one: few are cheap; and a draft a tenth."""
    known = [(1, 1.0), (2, 0.99), (3, 1.13), (4, 1.43), (5, 1.75), (8, 2.84), (10, 4.5), (128, 57.6)]
    return float(np.interp(rows * (drafts + 1), *zip(*known, strict=True))) + 0.1 * drafts


def flat(rows: int, drafts: int) -> float:
    """Bandwidth alone, as on a large GPU."""
    return 1 + 0.02 * rows * (drafts + 1) + 0.08 * drafts


class Machine:
    """Rounds of rows that each accept with a probability of their own, and leave after so many rounds."""

    def __init__(self, cost: Cost, acceptances: Sequence[float], stays: int = 10**9, timed: float = 1.0, seed: int = 0):
        self.cost, self.stays, self.timed, self.rng = cost, stays, timed, np.random.default_rng(seed)
        self.rows = [(acceptance, Acceptance(), int(self.rng.integers(1, stays))) for acceptance in acceptances]
        self.lengths: list[int] = []

    def run(self, learnt: Learnt, rounds: int) -> float:
        """Tokens in the time of a plain round of one row."""
        tokens = seconds = 0.0
        for _ in range(rounds):
            controller = learnt.controller(len(self.rows))
            length = controller.choose()
            accepted = [
                int(np.append(self.rng.random(length) < acceptance, False).argmin()) for acceptance, *_ in self.rows
            ]
            took = self.cost(len(self.rows), length)
            noise = float(np.exp(0.05 * self.rng.standard_normal()))
            given = [(own, count) for (_, own, _), count in zip(self.rows, accepted, strict=True)]
            controller.record(length, given, took * noise if self.rng.random() < self.timed else None)
            self.rows = [
                (acceptance, own, left - 1) if left else (acceptance, Acceptance(), self.stays)
                for acceptance, own, left in self.rows
            ]
            tokens, seconds = tokens + sum(accepted) + len(accepted), seconds + took
            self.lengths.append(length)
        return tokens / seconds

    def expected(self, drafts: int) -> float:
        """The same of a fixed length."""
        tokens = sum(acceptance**n for acceptance, *_ in self.rows for n in range(drafts + 1))
        return tokens / self.cost(len(self.rows), drafts)

    @property
    def best(self) -> float:
        return max(self.expected(drafts) for drafts in range(MAX_DRAFTS + 1))


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("cost", [metal, flat])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("stays", [60, 10**9])
def test_a_batch_is_near_the_best_fixed_length_and_never_below_plain(
    size: int, cost: Cost, acceptance: float, stays: int
) -> None:
    machine = Machine(cost, [acceptance] * size, stays)
    rate = machine.run(Learnt(), 1000)
    assert rate > 0.9 * machine.best
    assert rate > 0.97 * machine.expected(0)


@pytest.mark.parametrize("others", [1, 3])
def test_a_row_whose_drafts_are_never_right_does_not_keep_another_from_its_own(others: int) -> None:
    machine = Machine(flat, [0.95, *[0.0] * others])
    assert machine.best > machine.expected(0)
    assert machine.run(Learnt(), 1000) > 0.93 * machine.best


def test_the_length_follows_who_is_there() -> None:
    """What one row accepts says little of the next: each is judged by its own drafts, and begins as most do."""
    learnt, machine = Learnt(), Machine(flat, [0.95] * 4)
    machine.run(learnt, 400)
    assert np.mean(machine.lengths[-50:]) > 3
    machine.rows = [(0.0, Acceptance(), 10**9)] * 3 + [(0.95, Acceptance(), 10**9)]
    machine.lengths.clear()
    assert machine.run(learnt, 120) > 0.85 * machine.best
    machine.rows = [(0.0, Acceptance(), 10**9)] * 4
    machine.lengths.clear()
    assert machine.run(learnt, 120) > 0.9 * machine.expected(0)
    assert np.mean(np.array(machine.lengths[-50:]) == 0) > 0.9


def test_what_rows_accept_is_known_at_any_number_of_them() -> None:
    learnt = Learnt()
    Machine(flat, [0.9] * 2).run(learnt, 300)
    machine = Machine(flat, [0.9] * 4)
    assert machine.run(learnt, 60) > 0.85 * machine.best


@pytest.mark.parametrize("size", [1, 4, 16])
def test_while_no_round_can_be_timed_few_are_drafted(size: int) -> None:
    """Somebody reads a prompt between any two rounds."""
    machine, learnt = Machine(metal, [0.0] * size, timed=0.0), Learnt()
    for seconds in (1.0,) * 3:
        learnt.controller(size).record(0, [(Acceptance(), 0)], seconds)
    machine.run(learnt, 500)
    assert np.mean(np.array(machine.lengths) > 0) < 0.13
    assert first_of(size) == max(machine.lengths)
