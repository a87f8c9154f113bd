"""How many tokens to draft: as many as the rounds measured so far say pays, none if drafting does not."""

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mlx_gemma4.errors import shown
from mlx_gemma4.model.cache import ROUND
from mlx_gemma4.prompt.prompt import is_whole

FIRST_PLAIN, FIRST_DRAFTED = 3, 3  # timed rounds without drafts and with some, to know what a draft costs
WINDOW = 12  # rounds of a length whose times are remembered
MEMORY = 0.97  # what a trial of a draft position still counts after each later one: about 33 are remembered
GUESSED_ACCEPTANCE = 0.6  # of the first draft, before any trial
COMMON = 1  # trials of a row's own that what is known of all rows counts for
GAIN = 1.02  # another length must promise this much more tokens a second
FIRST_PROBE, LAST_PROBE = 32, 1024  # rounds between probes, doubled as long as they change nothing
LONGEST_PROBE = 4  # rounds, if all its drafts are accepted
CHECK = 8  # rounds after a change until the length before it is probed

MAX_DRAFTS = ROUND - 1


def check_draft_length(value: int | str) -> None:
    valid = value == "auto" if isinstance(value, str) else is_whole(value) and 0 <= value <= MAX_DRAFTS
    if not valid:
        raise ValueError(f"draft_length is {shown(value)}; expected 'auto' or a whole number from 0 to {MAX_DRAFTS}")


@dataclass(eq=False)
class Acceptance:
    """How often drafts are accepted, by their position in a round; older rounds count less."""

    trials: dict[int, float] = field(default_factory=dict)  # drafts that got so far
    hits: dict[int, float] = field(default_factory=dict)  # of these, accepted

    def record(self, length: int, accepted: Sequence[int]) -> None:
        """Learn from a round of `length` drafts: what each row accepted."""
        for position in range(min(length, max(accepted) + 1)):
            tried, hit = (sum(own >= least for own in accepted) for least in (position, position + 1))
            self.trials[position] = MEMORY * self.trials.get(position, 0.0) + tried
            self.hits[position] = MEMORY * self.hits.get(position, 0.0) + hit

    def rate(self, position: int, guess: float, weight: float) -> float:
        """Of a position, where a guess counts for so many trials."""
        return (self.hits.get(position, 0.0) + weight * guess) / (self.trials.get(position, 0.0) + weight)


@dataclass
class Controller:
    """Learns what a round of each length costs, for so many rows, and how often their drafts are accepted.

    It maximizes expected tokens a round, of all rows together, over seconds a round. The best length stays in use; now
    and then another is probed until a draft is refused, for four rounds at most. What the machine does besides slows
    all lengths down alike: when the best one's times change, the others' are changed with them until they are probed.
    """

    common: Acceptance = field(default_factory=Acceptance)  # of all rows so far, at whatever number of them
    first: int = 2  # the first length that is timed beside none
    times: dict[int, deque[float]] = field(default_factory=dict)  # seconds of the last rounds, by draft length
    is_new: bool = True  # it is not known yet what a draft costs
    best: int = 0
    former: int | None = None  # the best before, until it is known that the change was right
    probe: int | None = None
    renews: bool = False  # the first time of a probe makes those of that length before it void
    wait: int = 0  # rounds until the next probe
    rounds: int = 0  # since the last probe
    probes: int = 0

    def choose(self) -> int:
        """The draft length of the next round."""
        if len(self.times.get(0, ())) < FIRST_PLAIN:
            return 0
        if self.probe is None and self.rounds >= self.wait:
            self.start_probe()
        return self.best if self.probe is None else self.probe

    def start_probe(self) -> None:
        if self.is_new:
            self.probe, self.wait, self.rounds = self.first, FIRST_PROBE, 0
            return
        if self.former is not None:
            self.probe, self.former, self.wait = self.former, None, FIRST_PROBE
        else:
            near = (self.best + 1, self.best - 1, self.best + 2, self.best // 2, 0)
            others = [length for length in dict.fromkeys(near) if length != self.best and 0 <= length <= MAX_DRAFTS]
            self.probe = others[self.probes % len(others)]
            self.wait, self.probes = min(2 * self.wait, LAST_PROBE), self.probes + 1
        self.rounds, self.renews = 0, True

    def record(self, length: int, accepted: Sequence[tuple[Acceptance, int]], seconds: float | None) -> None:
        """Learn from a finished round: what each row accepted; seconds None if its time is not known."""
        self.rounds += 1
        counts = [count for _, count in accepted]
        self.common.record(length, counts)
        for row, count in accepted:
            row.record(length, [count])
        if seconds is not None:
            self.remember(length, seconds)
        told = seconds is not None and (min(counts) < length or length == 0)
        if self.is_new:
            self.is_new = len(self.times.get(self.first, ())) < FIRST_DRAFTED
            told = not self.is_new
        if length == self.probe and (told or self.rounds >= LONGEST_PROBE):
            self.probe = None
        # plain rounds say nothing new of drafting, and this takes as long as a few of a round's launches
        if len(self.times) > 1 and (length or self.rounds % 16 == 0):
            self.settle([row for row, _ in accepted])

    def remember(self, length: int, seconds: float) -> None:
        times = self.times.setdefault(length, deque(maxlen=WINDOW))
        if length == self.probe and self.renews:
            times.clear()
            self.renews = False
        before = quartile(times) if len(times) > 1 else None
        times.append(seconds)
        if length == self.best and before is not None:
            change = quartile(times) / before
            for other in self.times.keys() - {length} if change != 1 else ():
                self.times[other] = deque((time * change for time in self.times[other]), WINDOW)

    def settle(self, rows: Sequence[Acceptance]) -> None:
        """Change to a length that promises these rows clearly more."""
        speeds = self.tokens_per_second(rows)
        best = max(range(len(speeds)), key=speeds.__getitem__)
        if speeds[best] > GAIN * speeds[self.best]:
            self.former, self.best, self.wait, self.rounds, self.probe = self.best, best, CHECK, 0, None

    def tokens_per_second(self, rows: Sequence[Acceptance]) -> list[float]:
        """Expected of these rows together, of each length."""
        tokens, guess, guesses = float(len(rows)), GUESSED_ACCEPTANCE, []
        for position in range(MAX_DRAFTS):  # a guess from the position before is worth one trial
            guess = self.common.rate(position, guess, 1)
            guesses.append(guess)
        chances, found = [1.0] * len(rows), [tokens]
        for position, guess in enumerate(guesses):
            chances = [chance * row.rate(position, guess, COMMON) for row, chance in zip(rows, chances, strict=True)]
            tokens += sum(chances)
            found.append(tokens)
        return [own / cost for own, cost in zip(found, self.costs(), strict=True)]

    def costs(self) -> list[float]:
        """Seconds a round of each length: measured, no more than a longer one takes, or on a line through two."""
        measured = {length: quartile(times) for length, times in self.times.items()}
        return [self.cost(length, measured) for length in range(MAX_DRAFTS + 1)]

    def cost(self, length: int, measured: Mapping[int, float]) -> float:
        if length in measured:
            return min(cost for known, cost in measured.items() if known >= length)
        near, far = sorted(measured, key=lambda known: abs(known - length))[:2]
        slope = max((measured[near] - measured[far]) / (near - far), 0.0)
        return measured[near] + slope * (length - near)


def first_of(rows: int) -> int:
    """The draft length to time first: with many rows each position drafted is dear."""
    return 2 if rows < 4 else 1


def quartile(times: Collection[float]) -> float:
    """The lower one: what disturbs a round only ever makes it slower."""
    return sorted(times)[len(times) // 4]


class RoundClock:
    """Seconds a round, from one read to the next: the device works on without a gap, if nobody makes it wait.

    MLX bounds how far it runs ahead, so between two reads the device does parts of two rounds. Only if they draft
    alike, and neither a trace nor the caller took longer than the device, is the time that of one round.
    """

    def __init__(self) -> None:
        self.last_read: float | None = None
        self.outside = 0.0  # of the time since then, how long the caller kept the tokens
        self.lengths: list[int] = []  # of the last two rounds launched
        self.traced = False

    def launched(self, length: int, is_new: bool) -> None:
        self.lengths = [*self.lengths[-1:], length]
        self.traced = is_new

    def read(self) -> float | None:
        """Seconds since the last read, None if they say nothing."""
        now = time.perf_counter()
        seconds = None if self.last_read is None else now - self.last_read
        alike = len(set(self.lengths)) == 1 and not self.traced
        self.last_read = now
        return seconds if alike and seconds is not None and self.outside < seconds / 2 else None

    def interrupted(self) -> None:
        """The device does something else until the next read."""
        self.last_read = None

    def resumed(self) -> None:
        if self.last_read is not None:
            self.outside = time.perf_counter() - self.last_read
