"""The draft length on machines whose costs and models whose acceptance are known."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from rounds import GREEDY

from mlx_gemma4 import Prompt, generate
from mlx_gemma4.decoding.controller import MAX_DRAFTS, Acceptance, Controller
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor

Cost = Callable[[int], float]


def linear(draft: float, row: float = 0.02) -> Cost:
    """Seconds of a round: 20 ms for a plain one, so much of that more for each draft and each row verified."""
    return lambda length: 0.02 * (1 + (draft + row) * length)


def steep(length: int) -> float:
    """Verifying more than three rows takes another pass over the weights."""
    return 0.02 * (1 + 0.05 * length + (0.9 if length > 3 else 0))


class Machine:
    """Rounds whose drafts are each accepted with one probability, and which take what `cost` says."""

    def __init__(self, cost: Cost, acceptance: float, noise: float = 0.0, seed: int = 0, timed: float = 1.0):
        self.cost, self.acceptance, self.noise, self.timed = cost, acceptance, noise, timed
        self.load: Sequence[float] = (1.0,)  # what all rounds are slowed down by: one of these, for 50 rounds or so
        self.rng = np.random.default_rng(seed)
        self.row = Acceptance()
        self.lengths: list[int] = []

    def run(self, pace: Controller, rounds: int) -> float:
        """Tokens a second over so many rounds."""
        tokens = seconds = 0.0
        load = self.rng.choice(self.load)
        for _ in range(rounds):
            if self.rng.random() < 0.02:
                load = self.rng.choice(self.load)
            length = pace.choose()
            assert 0 <= length <= MAX_DRAFTS
            accepted = int(np.append(self.rng.random(length) < self.acceptance, False).argmin())
            took = load * self.cost(length) * float(np.exp(self.noise * self.rng.standard_normal()))
            pace.record(length, [(self.row, accepted)], took if self.rng.random() < self.timed else None)
            tokens, seconds = tokens + accepted + 1, seconds + self.cost(length)
            self.lengths.append(length)
        return tokens / seconds

    def expected(self, length: int) -> float:
        """Tokens a second of a fixed length."""
        return sum(self.acceptance**n for n in range(length + 1)) / self.cost(length)

    @property
    def best(self) -> float:
        return max(self.expected(length) for length in range(MAX_DRAFTS + 1))


PAYS = [
    pytest.param(linear(0.1), 0.9, id="cheap and good"),
    pytest.param(linear(0.1), 0.6, id="cheap"),
    pytest.param(linear(0.3), 0.8, id="dear and good"),
    pytest.param(linear(0.02), 0.98, id="nearly free"),
    pytest.param(linear(0.25), 0.5, id="hardly"),
    pytest.param(steep, 0.7, id="another pass from four rows on"),
    pytest.param(linear(0.55), 1.0, id="dear and always accepted"),
    pytest.param(steep, 1.0, id="another pass from four rows on, always accepted"),
]


@pytest.mark.parametrize(("cost", "acceptance"), PAYS)
@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.95), (0.2, 0.9)])
def test_where_drafting_pays_it_is_near_the_best_fixed_length(
    cost: Cost, acceptance: float, noise: float, share: float
) -> None:
    """Of several runs, for some begin with bad luck; but none ends below plain decoding."""
    machines = [Machine(cost, acceptance, noise, seed) for seed in range(5)]
    best, plain = machines[0].best, machines[0].expected(0)
    assert best > plain
    rates = sorted(machine.run(Controller(), 2000) for machine in machines)
    assert rates[2] > share * best
    assert rates[0] > 0.97 * plain


@pytest.mark.parametrize(
    ("draft", "acceptance"),
    [*((draft, acceptance) for draft in (0.3, 0.5, 1.0) for acceptance in (0.0, 0.05, 0.3)), (1.2, 1.0), (1.5, 1.0)],
)
def test_where_drafting_never_pays_it_parks_at_none(draft: float, acceptance: float) -> None:
    machine = Machine(linear(draft), acceptance)
    assert machine.best == machine.expected(0)
    assert machine.run(Controller(), 500) > 0.97 * machine.best
    assert np.mean(np.array(machine.lengths[100:]) == 0) > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_it_follows_an_acceptance_that_goes_and_comes_back(seed: int) -> None:
    machine, controller = Machine(linear(0.15), 0.9, seed=seed), Controller()
    machine.run(controller, 500)
    good = machine.run(controller, 200)
    assert good > 0.9 * machine.best
    machine.acceptance = 0.0
    machine.run(controller, 300)
    assert machine.run(controller, 200) > 0.95 * machine.best == 0.95 * machine.expected(0)
    machine.acceptance = 0.9
    machine.run(controller, 700)
    assert machine.run(controller, 200) > 0.9 * machine.best


def test_probes_get_rarer() -> None:
    machine, controller = Machine(linear(0.5), 0.1), Controller()
    machine.run(controller, 8000)
    tries = [n for n, length in enumerate(machine.lengths) if length]
    probes = [n for n, before in zip(tries, [-9, *tries], strict=False) if n - before > 3]
    pauses = np.diff(probes)
    assert len(probes) >= 5
    assert list(pauses) == sorted(pauses)
    assert pauses[-1] > 900
    assert len(tries) < 60


@pytest.mark.parametrize("timed", [0.0, 0.3])
def test_rounds_of_unknown_time_are_fine(timed: float) -> None:
    machine = Machine(linear(0.1), 0.9, timed=timed)
    rate = machine.run(Controller(), 1500)
    if timed:
        assert rate > 0.9 * machine.best


@pytest.mark.parametrize("draft", [0.3, 1.1])
@pytest.mark.parametrize("acceptance", [0.2, 0.5])
def test_where_drafting_never_pays_another_program_does_not_change_that(draft: float, acceptance: float) -> None:
    """One that takes more than half of the machine now and then."""
    rates = []
    for seed in range(9):
        machine = Machine(linear(draft), acceptance, noise=0.05, seed=seed)
        machine.load = (1.0, 2.5)
        rates.append(machine.run(Controller(), 1000) / machine.expected(0))
    assert sorted(rates)[4] > 0.97
    assert min(rates) > 0.8


@pytest.mark.parametrize(("cost", "acceptance"), PAYS)
def test_where_drafting_pays_another_program_does_not_change_that(cost: Cost, acceptance: float) -> None:
    rates = []
    for seed in range(9):
        machine = Machine(cost, acceptance, noise=0.05, seed=seed)
        machine.load = (1.0, 2.5)
        rates.append(machine.run(Controller(), 1000))
    assert sorted(rates)[4] > 0.93 * machine.best
    assert min(rates) > 0.97 * machine.expected(0)


def test_a_hiccup_changes_nothing() -> None:
    machine, controller = Machine(linear(0.1), 0.8), Controller()
    machine.run(controller, 600)
    length = controller.choose()
    controller.record(length, [(machine.row, 0)], 30.0)
    machine.lengths.clear()
    assert machine.run(controller, 100) > 0.85 * machine.best
    assert np.mean(np.array(machine.lengths) >= 2) > 0.9


def test_what_was_learnt_holds_for_the_next_request() -> None:
    machine, controller = Machine(linear(0.1), 0.9), Controller()
    machine.run(controller, 400)
    settled = controller.choose()
    assert settled > 2
    machine.lengths.clear()
    assert machine.run(controller, 50) > 0.8 * machine.best
    assert machine.lengths[0] == settled


def test_a_model_keeps_its_controller_over_requests(
    planted: tuple[Model, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[tuple[int, int]] = []
    makers: set[int] = set()
    record = Controller.record

    def recorded(self: Controller, length: int, accepted: list[tuple[Acceptance, int]], seconds: float | None) -> None:
        makers.add(id(self))
        records.append((length, sum(count for _, count in accepted)))
        record(self, length, accepted, seconds)

    monkeypatch.setattr(Controller, "record", recorded)
    stats = [generate(*planted, Prompt([2, 150, 160]), max_tokens=20, sampling=GREEDY).stats for _ in range(2)]
    assert len(makers) == 1
    assert len(records) == sum(own.rounds for own in stats)
    assert sum(length for length, _ in records) == sum(own.drafted_tokens for own in stats)
    assert sum(accepted for _, accepted in records) == sum(own.accepted_tokens for own in stats)
