"""python -m tests.fuzz --minutes 10 [--only KIND] [--seed N] [--jobs N]; --repeat FILE tries one input again."""

import argparse
import json
import secrets
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import inputs
from .harness import KINDS, Result, Tally, Worker, batch

BATCH_SECONDS = 60.0  # of one kind at a time
FOLDER = Path("fuzz-failures")


def repeat(path: Path) -> int:
    kind = path.name.partition("-")[0]
    with Worker() as worker:
        result = worker.attempt(kind, inputs.unpack(path.read_bytes()))
    print(f"{kind}: {result.outcome} {result.where}\n{result.detail}")
    return int(result.outcome == "fault")


def report(kind: str, value: Any, result: Result) -> str:
    path = inputs.save(FOLDER, kind, value)
    print(f"{kind}: {result.where}\n    python -m tests.fuzz --repeat {path}", flush=True)
    return str(path)


def fuzz(kinds: list[str], minutes: float, seed: int, jobs: int) -> int:
    ends = time.monotonic() + 60 * minutes
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    failures: list[dict[str, Any]] = []
    counts: Counter[tuple[str, str]] = Counter()
    spent = {kind: 0.0 for kind in kinds}  # seconds: the next kind is that which has had the fewest
    running: dict[Future[tuple[str, Tally]], tuple[str, float]] = {}
    turn = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while running or time.monotonic() < ends:
            while len(running) < jobs and (left := ends - time.monotonic()) > 0:
                kind = min(kinds, key=spent.__getitem__)
                known = frozenset(where for other, where in counts if other == kind)
                task = pool.submit(batch, kind, seed + turn, min(left, BATCH_SECONDS), known)
                running[task] = kind, time.monotonic()
                spent[kind] += BATCH_SECONDS  # until it is known
                turn += 1
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                kind, started = running.pop(task)
                spent[kind] += time.monotonic() - started - BATCH_SECONDS
                _, tally = task.result()
                outcomes[kind] += tally.outcomes
                for where, (value, result) in tally.faults.items():
                    if (kind, where) not in counts:
                        failures.append({"kind": kind, "where": where, "file": report(kind, value, result)})
                    counts[kind, where] += tally.seen[where]
    for kind in kinds:
        print(f"{kind:12}" + "".join(f"{outcomes[kind][name]:9} {name}" for name in ("right", "refused", "fault")))
    total = sum(sum(found.values()) for found in outcomes.values())
    failures = [failure | {"times": counts[failure["kind"], failure["where"]]} for failure in failures]
    print(json.dumps({"seed": seed, "inputs": total, "by_kind": outcomes, "failures": failures}))
    return int(bool(failures))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=KINDS, action="append", help="a kind of input; repeatable")
    parser.add_argument("--seed", type=int, default=None, help="of the first batch; the others count on from it")
    parser.add_argument("--jobs", type=int, default=2, help="workers at a time")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="try a saved input again")
    given = parser.parse_args()
    if given.repeat is not None:
        return repeat(given.repeat)
    seed = secrets.randbits(32) if given.seed is None else given.seed
    return fuzz(given.only or list(KINDS), given.minutes, seed, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
