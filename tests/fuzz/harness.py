"""Tries inputs of a kind in a worker, counts what came of them, and makes those that fail small."""

import importlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Flaky

from . import inputs
from .judge import plain
from .limits import MOST_BYTES, SECONDS, SILENT_SECONDS
from .worker import receive, send

KINDS = (
    "messages", "tools", "calls", "replies", "arguments", "commands", "images", "sounds", "films", "gguf", "weights",
    "configs", "tokenizers", "templates", "checkpoints",
)  # fmt: skip
TESTS = Path(__file__).parents[1]
GROWTH, AGE = 3 * 10**8, 1000  # bytes more than at first, and inputs, after which a worker is replaced
BATCH = 1000  # inputs of one kind at a time
SHRINKS, SHRINK_SECONDS = 150, 20  # tries to make a failure smaller


@dataclass(frozen=True)
class Result:
    outcome: str  # "right" | "refused" | "fault"
    where: str = ""  # of a fault, the same for the same fault
    detail: str = ""


class Worker:
    """A process that tries inputs; a new one takes its place when it has died."""

    def __init__(self, seconds: float = SECONDS, most_bytes: int = MOST_BYTES) -> None:
        self.seconds, self.most_bytes = seconds, most_bytes
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        given, self.requests = os.pipe()
        self.answers, answering = os.pipe()
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        streams: list[IO[bytes]] = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        self.streams, self.read_up_to = streams, [0, 0]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker", str(given), str(answering)],
            stdin=subprocess.DEVNULL,
            stdout=streams[0],
            stderr=streams[1],
            pass_fds=(given, answering),
            cwd=TESTS,
            env=os.environ | {"PYTHONPATH": str(TESTS.parent), "HF_HUB_OFFLINE": "1", "HF_HOME": self.folder.name},
            start_new_session=True,  # what it starts goes with it
        )
        os.close(given)
        os.close(answering)
        self.to, self.back = os.fdopen(self.requests, "wb"), os.fdopen(self.answers, "rb")
        self.tried, self.prepared = 0, set[str]()

    def stop(self) -> int | None:
        """The status of the process, which ends now if it has not."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        for file in (self.back, *self.streams):
            file.close()
        try:
            self.to.close()
        except BrokenPipeError:  # what was not yet read by the dead
            self.back.close()
        self.folder.cleanup()
        self.process = None
        return status

    def attempt(self, kind: str, value: Any) -> Result:
        if self.process is None:
            self.start()
        if kind not in self.prepared:
            result = self.ask(kind, b"", 10 * self.seconds, 0)
            if result.outcome == "fault":
                raise RuntimeError(f"the worker cannot prepare {kind}: {result.where}\n{result.detail}")
            self.prepared.add(kind)
            self.base = resident(self.process.pid) if self.process else 0
        result = self.ask(kind, inputs.pack(value), self.seconds, self.most_bytes)
        self.tried += 1
        if self.process is not None and (self.tried >= AGE or resident(self.process.pid) > self.base + GROWTH):
            self.stop()
        return result

    def ask(self, kind: str, message: bytes, seconds: float, most_bytes: int) -> Result:
        assert self.process is not None
        started, computed = time.monotonic(), cpu_seconds(self.process.pid)
        try:
            send(self.to, kind.encode())
            send(self.to, message)
        except BrokenPipeError:
            return self.died()
        while not select.select([self.back], [], [], 0.02)[0]:
            if most_bytes and resident(self.process.pid) > self.base + most_bytes:
                self.stop()
                return Result("fault", f"more than {most_bytes / 1e9:g} GB")
            waited = time.monotonic() - started
            if waited > SILENT_SECONDS or (
                waited > seconds and cpu_seconds(self.process.pid) - computed > 0.9 * seconds
            ):
                detail = self.stack()
                self.stop()
                return Result("fault", f"more than {seconds:g} s", detail)
        answer = receive(self.back)
        if answer is None:
            return self.died()
        result = Result(**json.loads(answer))
        printed = self.printed()
        if result.outcome != "fault" and printed:
            return Result("fault", "a line on a stream: " + plain(printed)[:50], printed)
        return result

    def printed(self) -> str:
        """What its streams got since the last time."""
        new = []
        for number, stream in enumerate(self.streams):
            stream.seek(self.read_up_to[number])
            new.append(stream.read().decode(errors="replace"))
            self.read_up_to[number] = stream.tell()
        return "".join(new)[:5000]

    def stack(self) -> str:
        """Where it is, by faulthandler, which a signal asks."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGABRT)
        self.process.wait()
        return self.printed()

    def died(self) -> Result:
        assert self.process is not None
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        printed = self.printed()
        status = self.stop()
        places = re.findall(r'mlx_gemma4/(\S+)", line (\d+)', printed)
        return Result("fault", f"died with status {status} at {':'.join(places[0]) if places else '?'}", printed)


def resident(process: int) -> int:
    """Bytes of a process in memory; 0 where the system does not say (it is then not watched)."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def cpu_seconds(process: int) -> float:
    """What a process has computed; where the system does not say, the time, as if it computed all the while."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own, and of children that it waited for
    except (OSError, IndexError):
        return time.monotonic()


# --- hunting -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[Any, Result]] = field(default_factory=dict)  # the smallest input by `where`
    seen: Counter[str] = field(default_factory=Counter)  # how often by `where`

    def add(self, value: Any, result: Result) -> None:
        self.outcomes[result.outcome] += 1
        if result.outcome == "fault":
            self.seen[result.where] += 1
            if result.where not in self.faults or size(value) < size(self.faults[result.where][0]):
                self.faults[result.where] = value, result


def size(value: Any) -> tuple[int, bytes]:
    """For inputs: the shorter is the simpler, of one length that which comes first."""
    data = inputs.pack(value)
    return len(data), data


@dataclass(frozen=True)
class Input:
    """Keeps hypothesis from writing inputs out, which may be megabytes."""

    value: Any

    def __repr__(self) -> str:
        return "Input(…)"


class Found(Exception):
    """Makes hypothesis shrink."""


class Enough(BaseException):
    """Ends hypothesis' search from within."""


def hunt(kind: str, first_seed: int, count: int, worker: Worker, until: float, known: Collection[str] = ()) -> Tally:
    """Try `count` inputs of a kind, or fewer if time.monotonic() passes `until`. Faults whose `where` is known are
    counted and not made smaller."""
    module = importlib.import_module(f".{kind}", __package__)
    tally, left, number = Tally(), count, random.Random(first_seed)
    ended: set[str] = set(known)
    while left > 0 and time.monotonic() < until:
        left -= search(kind, module.strategy(), number.getrandbits(32), left, worker, until, tally, ended)
    return tally


def batch(kind: str, first_seed: int, seconds: float, known: Collection[str]) -> tuple[str, Tally]:
    """A hunt with a worker of its own, for a process of a pool."""
    with Worker() as worker:
        return kind, hunt(kind, first_seed, BATCH, worker, time.monotonic() + seconds, known)


def search(
    kind: str, strategy: Any, number: int, count: int, worker: Worker, until: float, tally: Tally, ended: set[str]
) -> int:
    """Try inputs up to the first new fault, which is made smaller; the number of inputs tried before that."""
    tried = shrinks = 0
    target: str | None = None
    shrink_until = 0.0

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate, Phase.shrink], print_blob=False,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False, verbosity=Verbosity.quiet,
    )  # fmt: skip
    @given(strategy.map(Input))
    def trial(given_input: Input) -> None:
        value = given_input.value
        nonlocal tried, shrinks, target, shrink_until
        if target is not None:
            shrinks += 1
            if shrinks > SHRINKS or time.monotonic() > shrink_until:
                raise Enough
        elif time.monotonic() > until:
            raise Enough
        result = worker.attempt(kind, value)
        tally.add(value, result)
        tried += target is None
        if result.outcome == "fault" and result.where not in ended and target in (None, result.where):
            if target is None:
                target, shrink_until = result.where, time.monotonic() + SHRINK_SECONDS
            raise Found(target)

    with suppress(Found, Enough, Flaky):
        trial()
    if target is not None:
        ended.add(target)
    return tried if target is not None else max(tried, count)  # hypothesis may know that there are no more
