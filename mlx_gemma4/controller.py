"""How many tokens to draft: as many as the rounds measured so far say pays, none if drafting does not."""

from dataclasses import dataclass, field
from typing import Protocol

SMOOTHING = 0.2  # weight of the newest round's time
MEMORY = 0.97  # what a trial of a draft position still counts after each later one: about 33 are remembered
GUESSED_ACCEPTANCE = 0.6  # of the first draft, before any trial
GUESSED_DRAFT_COST = 0.3  # of one draft more, in plain rounds, before two lengths have been timed
GAIN = 1.02  # another length must promise this much more tokens a second
FIRST_PROBE, LAST_PROBE = 32, 1024  # rounds between probes, doubled as long as they change nothing


MAX_DRAFTS = 7  # in a round


class Pace(Protocol):
    """Who says how many tokens to draft."""

    longest: int

    def choose(self) -> int:
        """The draft length of the next round."""
        ...

    def record(self, length: int, accepted: int, seconds: float | None) -> None:
        """Learn from a finished round; seconds None if its time is not known."""
        ...


@dataclass
class FixedLength:
    longest: int

    def choose(self) -> int:
        return self.longest

    def record(self, length: int, accepted: int, seconds: float | None) -> None:
        pass


@dataclass
class Controller:
    """Learns what a round of each length costs and how often each draft position is accepted.

    It maximizes expected tokens a round over seconds a round. The best length stays in use; now and then another is
    probed for a round, and for longer only while its drafts are accepted.
    """

    longest: int = MAX_DRAFTS
    seconds: dict[int, float] = field(default_factory=dict)  # a round, by draft length, smoothed
    trials: list[float] = field(default_factory=list)  # by draft position: rounds that got so far
    hits: list[float] = field(default_factory=list)  # of these, accepted
    best: int = 0
    probe: int | None = None
    wait: int = FIRST_PROBE
    rounds: int = 0  # since the last probe
    probes: int = 0

    def choose(self) -> int:
        for length in (0, min(2, self.longest)):  # two lengths, to know what a draft costs
            if length not in self.seconds:
                return length
        if self.probe is not None:
            return self.probe
        if self.rounds >= self.wait:
            self.rounds, self.wait = 0, min(2 * self.wait, LAST_PROBE)
            self.probes += 1
            others = (self.best + 1, self.best - 1, self.best + 2, 0) if self.best else (1, 2)
            self.probe = min(max(others[self.probes % len(others)], 0), self.longest)
            return self.probe
        return self.best

    def record(self, length: int, accepted: int, seconds: float | None) -> None:
        for position in range(min(length, accepted + 1)):
            if position == len(self.trials):
                self.trials.append(0.0)
                self.hits.append(0.0)
            self.trials[position] = MEMORY * self.trials[position] + 1
            self.hits[position] = MEMORY * self.hits[position] + (position < accepted)
        if seconds is not None:
            known = self.seconds.get(length, seconds)
            # a hiccup of the machine must not count for more than a slow round
            self.seconds[length] = known + SMOOTHING * (min(seconds, 2 * known) - known)
        self.rounds += 1
        if length == self.probe and seconds is not None and accepted < max(length, 1):
            self.probe = None
        if len(self.seconds) > 1:
            self.settle()

    def settle(self) -> None:
        """Change to a length that promises clearly more."""
        best = max(range(self.longest + 1), key=self.tokens_per_second)
        if best != self.best and self.tokens_per_second(best) > GAIN * self.tokens_per_second(self.best):
            self.best, self.wait, self.rounds, self.probe = best, FIRST_PROBE, 0, None

    def tokens_per_second(self, length: int) -> float:
        tokens, chance, acceptance = 1.0, 1.0, GUESSED_ACCEPTANCE
        for position in range(length):
            if position < len(self.trials):  # the position before is worth one trial
                acceptance = (self.hits[position] + acceptance) / (self.trials[position] + 1)
            chance *= acceptance
            tokens += chance
        return tokens / self.cost(length)

    def cost(self, length: int) -> float:
        """Seconds a round, measured or on the line through the nearest measured lengths."""
        if length in self.seconds:
            return self.seconds[length]
        known = sorted(self.seconds, key=lambda other: abs(other - length))[:2]
        if len(known) == 1:
            return self.seconds[known[0]] * (1 + GUESSED_DRAFT_COST * (length - known[0]))
        near, far = known
        slope = (self.seconds[near] - self.seconds[far]) / (near - far)
        return max(self.seconds[near] + slope * (length - near), self.seconds[min(self.seconds)])
