"""What drafting gains: plain decoding against each fixed draft length and "auto", taking turns in one run.

    python benchmarks/speculate.py --model FOLDER [--drafter FOLDER] --length 0 --length 1 --length 3 --length auto
    python benchmarks/speculate.py --model FOLDER --acceptance 0.66

With --acceptance X every draft is kept with that probability, whatever it is, so that cost can be measured on random
weights; what it then says is marked "simulated". The last line of standard output is JSON.
"""

import json
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from decode import SPLIT_HELP, load_endless, machine, machine_line, measure, random_prompt, run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_gemma4 import Sampling
from mlx_gemma4.decoding import round as speculate
from mlx_gemma4.reply.reply import Stats
from mlx_gemma4.weights.peers import follows

Accepted = tuple[mx.array, mx.array]  # how many of each row's drafts, [B], and what the next is drawn from, [B, V]


def main(
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")],
    drafter: Annotated[str, typer.Option(help="Its drafter: a folder or hub id, or auto.")] = "auto",
    length: Annotated[list[str], typer.Option(help="A draft length, or auto; repeatable. 0 is always run.")] = ["auto"],  # noqa: B006
    acceptance: Annotated[float | None, typer.Option(min=0, max=1, help="Simulate drafts accepted this often.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, after one that does not count.")] = 5,
    temp: Annotated[float, typer.Option(help="0 is greedy; above, the checkpoint's top-k and top-p apply.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the prompt and of sampling.")] = 0,
    split: Annotated[str | None, typer.Option(help=SPLIT_HELP)] = None,
) -> None:
    """Medians of several runs, and their ratio to plain decoding."""
    loaded, processor = load_endless(model, drafter, split)
    if loaded.drafter is None:
        raise ValueError(f"{model} has no drafter; expected one in its folder, or --drafter")
    if acceptance is not None:
        speculate.accept = simulated(acceptance)  # type: ignore[assignment]
    prompt = random_prompt(loaded, processor, prompt_tokens, max_tokens, seed)
    sampling = Sampling(temperature=temp, seed=seed)
    lengths = list(dict.fromkeys(["0", *length]))
    runs: dict[str, list[Stats]] = {name: [] for name in lengths}
    order = [(turn, name) for turn in range(repeats + 1) for name in lengths]
    for turn, name in track(order, "Measuring", console=Console(stderr=True), transient=True):
        drafts = int(name) if name.isdecimal() else name
        stats, _ = measure(loaded, processor, prompt, max_tokens, sampling, drafts)
        if turn:  # the first compiles and warms up
            runs[name].append(stats)
    if follows(loaded.group):
        return
    report(machine(), model, acceptance, runs, max_tokens, repeats, temp)


def simulated(acceptance: float) -> Callable[[mx.array, mx.array, mx.array, mx.array, mx.array], Accepted]:
    """An `accept` that tosses a coin for each draft, and then takes the target's own token."""

    def accept(p: mx.array, q: mx.array, drafts: mx.array, keys: mx.array, limit: mx.array) -> Accepted:
        length = drafts.shape[1]
        numbers = mx.vmap(lambda key: mx.random.uniform(shape=(length,), key=key))(keys)
        kept = (numbers < acceptance) & (mx.arange(length) < limit[:, None])
        accepted = mx.cumprod(kept.astype(mx.int32), axis=1).sum(axis=1)
        return accepted, mx.take_along_axis(p, accepted[:, None, None], axis=1)[:, 0]

    return accept


def summary(runs: list[Stats], plain: float) -> dict[str, Any]:
    decode_tps = median(run.generation_tps for run in runs)
    tokens = median(run.tokens_per_round for run in runs)
    last = runs[-1]
    return {
        "decode_tps": round(decode_tps, 2),
        "decode_tps_lowest": round(min(run.generation_tps for run in runs), 2),
        "decode_tps_highest": round(max(run.generation_tps for run in runs), 2),
        "times_plain": round(decode_tps / plain, 3),
        "tokens_per_round": round(tokens, 3),
        "round_cost_in_plain_steps": round(tokens * plain / decode_tps, 3),
        "acceptance_by_position": [round(part, 3) for part in last.acceptance_by_position],
        "drafted": last.drafted_tokens,
        "accepted": last.accepted_tokens,
    }


def report(
    found: dict[str, str],
    model: str,
    acceptance: float | None,
    runs: dict[str, list[Stats]],
    max_tokens: int,
    repeats: int,
    temp: float,
) -> None:
    plain = median(run.generation_tps for run in runs["0"])
    rows = {name: summary(stats, plain) for name, stats in runs.items()}
    how = "" if acceptance is None else f", acceptance {acceptance:g} simulated"
    table = Table(title=f"{max_tokens} tokens, median of {repeats} runs, temperature {temp:g}{how}")
    for heading in ("drafts", "tokens/s", "× plain", "tokens a round", "round cost *", "accepted by position"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['decode_tps']:.1f}",
            f"{row['times_plain']:.2f}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['round_cost_in_plain_steps']:.2f}",
            " ".join(f"{part:.2f}" for part in row["acceptance_by_position"]),
        )
    print(machine_line(found))
    Console().print(table)
    print("* in plain rounds")
    head = {"benchmark": "speculate", "machine": found, "model": model, "max_tokens": max_tokens, "repeats": repeats}
    print(json.dumps(head | {"temperature": temp, "simulated_acceptance": acceptance, "results": rows}))


if __name__ == "__main__":
    run_script(main)
