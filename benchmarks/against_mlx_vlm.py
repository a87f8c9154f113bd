"""Plain decoding of this project against mlx-vlm's: one folder, one prompt, greedy, the two taking turns.

    pip install mlx-vlm==0.7.10
    python benchmarks/against_mlx_vlm.py --model FOLDER

Both are timed from their first token to their last: of mlx-vlm the inner loop, which gives token ids alone; of this
project the public `stream_generate`, which also masks suppressed tokens and makes text of the ids. The last line of
standard output is JSON.
"""

import json
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from decode import load_endless, machine, machine_line, measure, random_prompt, run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_gemma4 import Prompt, Sampling


def main(
    model: Annotated[str, typer.Option(help="A model folder that both can load.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, after one that does not count.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the prompt.")] = 0,
) -> None:
    """Medians of several runs and their ratio."""
    theirs_version = peer_version()
    if not Path(model).is_dir():
        raise ValueError(f"{model!r} is no folder; expected a model folder")
    loaded, processor = load_endless(model)
    prompt = random_prompt(loaded, processor, prompt_tokens, max_tokens, seed)
    peer = load_peer(model)
    ours, theirs = [], []
    for turn in track(range(repeats + 1), "Measuring", console=Console(stderr=True), transient=True):
        stats, our_ids = measure(loaded, processor, prompt, max_tokens, Sampling(temperature=0))
        their_tps, their_ids = measure_peer(peer, prompt, max_tokens)
        if turn:  # the first compiles and warms up
            ours.append(stats.generation_tps)
            theirs.append(their_tps)
    same = len(list(takewhile(bool, (a == b for a, b in zip(our_ids, their_ids, strict=True)))))
    ratio = median(ours) / median(theirs)

    table = Table(title=f"{max_tokens} tokens after {prompt_tokens}, greedy, {repeats} runs in turn")
    for heading in ("", "median tokens/s", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for name, figures in (("mlx_gemma4", ours), (f"mlx-vlm {theirs_version}", theirs)):
        table.add_row(name, *(f"{figure:.1f}" for figure in (median(figures), min(figures), max(figures))))
    found = machine()
    print(machine_line(found))
    Console().print(table)
    print(f"ratio {ratio:.2f}; the first {same} of {max_tokens} tokens are the same")
    result = {
        "benchmark": "against_mlx_vlm",
        "machine": found,
        "model": model,
        "mlx_vlm": theirs_version,
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "decode_tps": [round(figure, 2) for figure in ours],
        "mlx_vlm_decode_tps": [round(figure, 2) for figure in theirs],
        "ratio": round(ratio, 3),
        "same_tokens": same,
    }
    print(json.dumps(result))


def peer_version() -> str:
    try:
        return version("mlx-vlm")
    except PackageNotFoundError:
        raise ImportError("mlx-vlm is not installed; expected it beside mlx_gemma4: pip install mlx-vlm") from None


def load_peer(folder: str) -> Any:
    from mlx_vlm import load  # here: it takes seconds, and an error above should not

    return load(folder)[0]


def measure_peer(model: Any, prompt: Prompt, max_tokens: int) -> tuple[float, list[int]]:
    """Tokens/s and token ids of one greedy run of mlx-vlm, without what would slow it: text, suppressed tokens."""
    from mlx_vlm.generate import generate_step

    ids: list[int] = []
    started = 0.0
    input_ids = mx.array(prompt.token_ids)[None]
    for token, _ in generate_step(input_ids, model, None, None, max_tokens=max_tokens, temperature=0):
        ids.append(int(token))
        started = started or time.perf_counter()
    return (len(ids) - 1) / (time.perf_counter() - started), ids


if __name__ == "__main__":
    run_script(main)
