"""What decoding many requests at once gains, and what drafts gain beside it: each way of it takes turns in one run.

    python benchmarks/batch.py --model FOLDER --requests 1 --requests 8 --length 3 --length auto

Plain decoding, fixed draft lengths and "auto", greedy, by one `Engine`, and of a folder, where it is installed,
mlx-vlm's plain batch. Loads: "short", all requests alike and at once; "mixed", prompts and replies of several lengths,
at once; "arrivals", these by chance, so many a second. Prompts are random token ids, and stop tokens are written
through, so that each way does the same work. Ratios are medians of those of each turn. The last line of standard output
is JSON.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer
from against_mlx_vlm import load_peer, peer_version
from decode import SPLIT_HELP, load_endless, machine, machine_line, random_prompt, run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serve import Told, figures, streamed, timed

from mlx_gemma4 import Engine, Prompt, Sampling
from mlx_gemma4.decoding.round import learnt_of
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Stats
from mlx_gemma4.weights.peers import follows

# What the lengths of prompt and reply are multiplied with, request by request.
LENGTHS = {"short": ((1.0, 1.0),), "mixed": ((4, 1), (1, 0.25), (8, 0.5), (2, 1))}
LENGTHS["arrivals"] = LENGTHS["mixed"]
UNCOUNTED = 2  # turns: the first has a CPU's kernels built, the second is the first to use them


@dataclass(frozen=True)
class Asked:
    prompt: Prompt
    max_tokens: int


Turn = Callable[[list[Asked], np.ndarray], dict[str, float]]


def main(
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")],
    drafter: Annotated[str, typer.Option(help="Its drafter: a folder or hub id, or auto.")] = "auto",
    length: Annotated[list[str], typer.Option(help="Drafts, or auto; repeatable. 0 is always run.")] = ["3", "auto"],  # noqa: B006
    requests: Annotated[list[int], typer.Option(min=1, max=16, help="Repeatable.")] = [1, 2, 4, 8, 16],  # noqa: B006
    load: Annotated[list[str], typer.Option(help="short, mixed or arrivals; repeatable.")] = [*LENGTHS],  # noqa: B006
    rate: Annotated[float, typer.Option(min=0.001, help="Requests that arrive a second.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the short prompts.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of the longest replies.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 5,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    split: Annotated[str | None, typer.Option(help=SPLIT_HELP)] = None,
) -> None:
    """Medians of several turns, and of their ratios to plain decoding."""
    for name in load:
        if name not in LENGTHS:
            raise ValueError(f"load is {name!r}; expected {', '.join(LENGTHS)}")
    loaded, processor = load_endless(model, drafter, split)
    lengths = list(dict.fromkeys(["0", *length]))
    if loaded.drafter is None and lengths != ["0"]:
        raise ValueError(f"{model} has no drafter; expected one in its folder, or --drafter, or --length 0 alone")
    arrivals = np.random.default_rng(seed).exponential(1 / rate, max(requests)).cumsum()
    arrivals -= arrivals[0]
    rows: list[dict[str, Any]] = []
    with Engine(loaded, processor, max(requests)) as engine:
        if follows(loaded.group):
            engine.follow()
            return
        ways: dict[str, Turn] = {name: partial(ours, engine, name) for name in lengths}
        if find_spec("mlx_vlm") is not None and Path(model).is_dir() and loaded.group is None:
            peer = load_peer(model, drafts=False)[0]
            ways["mlx-vlm"] = partial(theirs, peer)
        for name in load:
            asked = [
                request(loaded, processor, LENGTHS[name][i % len(LENGTHS[name])], prompt_tokens, max_tokens, seed + i)
                for i in range(max(requests))
            ]
            for count in requests:
                own_arrivals = arrivals[:count] if name == "arrivals" else np.zeros(count)
                found = in_turns(ways, asked[:count], own_arrivals, repeats, loaded, f"{name}, {count}")
                rows += [{"load": name, "requests": count, "way": way, **own} for way, own in found.items()]
    head = {"model": model, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "repeats": repeats, "rate": rate}
    report(rows, head | {"mlx_vlm": peer_version() if "mlx-vlm" in ways else None})


def request(
    model: Model, processor: Processor, factors: tuple[float, float], prompt_tokens: int, max_tokens: int, seed: int
) -> Asked:
    prompt, reply = int(prompt_tokens * factors[0]), int(max_tokens * factors[1])
    return Asked(random_prompt(model, processor, prompt, reply, seed), reply)


def in_turns(
    ways: dict[str, Turn], asked: list[Asked], arrivals: np.ndarray, repeats: int, model: Model, label: str
) -> dict[str, dict[str, float]]:
    """Of each way the medians of its turns, and of their ratios to the first's."""
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in track(range(UNCOUNTED + repeats), label, console=Console(stderr=True), transient=True):
        for way, run in ways.items():
            found = run(asked, arrivals)
            if found["tokens"] != sum(own.max_tokens for own in asked):
                raise ValueError(f"{way} gave {found['tokens']:.0f} tokens; expected all that were asked for")
            if turn >= UNCOUNTED:
                turns[way].append(found)
        if turn < UNCOUNTED:
            wait_for_kernels(model)
    plain = [turn["tokens_per_second"] for turn in turns["0"]]
    return {way: summary(own, plain) for way, own in turns.items()}


def wait_for_kernels(model: Model) -> None:
    """On a CPU other processes build them, beside which nothing is worth timing."""
    for warmup in learnt_of(model).warmups.values():
        if warmup.child is not None:
            warmup.child.wait()


def ours(engine: Engine, length: str, asked: list[Asked], arrivals: np.ndarray) -> dict[str, float]:
    """One turn: each request from a thread of its own."""
    stats: list[Stats] = []
    told = timed(asked, arrivals, len(asked), lambda own: from_engine(engine, length, own, stats))
    drafted = sum(own.drafted_tokens for own in stats)
    return told | {"acceptance": sum(own.accepted_tokens for own in stats) / max(drafted, 1)}


def from_engine(engine: Engine, length: str, asked: Asked, stats: list[Stats]) -> Told:
    started = time.perf_counter()
    stream = engine.submit(
        asked.prompt, max_tokens=asked.max_tokens, sampling=Sampling(temperature=0),
        draft_length=int(length) if length.isdecimal() else length, repetition_detection="off",
    )  # fmt: skip
    told, own = streamed(stream, started)
    stats.append(own)
    return told


def theirs(peer: Any, asked: list[Asked], arrivals: np.ndarray) -> dict[str, float]:
    """One turn of mlx-vlm: what is there at once is read at once, what arrives is read alone."""
    from mlx_vlm.generate import BatchGenerator
    from mlx_vlm.utils import StoppingCriteria

    endless = SimpleNamespace(stopping_criteria=StoppingCriteria([]))  # all that it asks of a tokenizer
    batch = BatchGenerator(
        peer.language_model, endless, completion_batch_size=len(asked),
        prefill_batch_size=1 if arrivals.any() else len(asked), compute_logprobs=False,
    )  # fmt: skip
    started, times, arrived = time.perf_counter(), dict[int, list[float]](), 0
    while arrived < len(asked) or batch.has_work:
        while arrived < len(asked) and arrivals[arrived] <= time.perf_counter() - started:
            own = asked[arrived]
            read = peer.get_input_embeddings(mx.array([own.prompt.token_ids])).to_dict()
            read = {name: value for name, value in read.items() if value is not None}
            batch.insert([own.prompt.token_ids], [own.max_tokens], prompt_kwargs=[read])
            arrived += 1
        if not batch.has_work:
            time.sleep(0.001)
        for given in batch.next()[1]:
            times.setdefault(given.uid, []).append(time.perf_counter() - started)
    seconds = time.perf_counter() - started
    batch.close()
    told = [(own[0] - arrivals[uid], own[-1] - arrivals[uid], len(own)) for uid, own in times.items()]
    return figures(told, seconds)


def summary(turns: list[dict[str, float]], plain: list[float]) -> dict[str, float]:
    speeds = [turn["tokens_per_second"] for turn in turns]
    return {key: round(median(turn[key] for turn in turns), 4) for key in turns[0]} | {
        "tokens_per_second_lowest": round(min(speeds), 4),
        "tokens_per_second_highest": round(max(speeds), 4),
        "times_plain": round(median(own / other for own, other in zip(speeds, plain, strict=True)), 3),
    }


def report(rows: list[dict[str, Any]], head: dict[str, Any]) -> None:
    table = Table(title=f"{head['max_tokens']} tokens at most, greedy, medians of {head['repeats']} turns")
    for heading in ("requests", "drafts", "tokens/s", "× plain", "a row", "first", "99 %", "kept"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['load']}, {row['requests']}",
            row["way"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['times_plain']:.2f}",
            f"{row['rate_p50']:.1f}",
            f"{row['first_p50']:.3f}",
            f"{row['first_p99']:.3f}",
            f"{row['acceptance']:.0%}" if row.get("acceptance") else "",
        )
    found = machine()
    print(machine_line(found))
    Console().print(table)
    print("a row, first: of the middle request; first, 99 %: seconds to the first token; kept: of the drafts")
    print(json.dumps({"benchmark": "batch", "machine": found, **head, "results": rows}))


if __name__ == "__main__":
    run_script(main)
