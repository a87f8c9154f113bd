"""Decoding of this project against mlx-vlm's: one folder, one prompt, greedy, the two taking turns.

    pip install mlx-vlm==0.7.10
    python benchmarks/against_mlx_vlm.py --model FOLDER --block 2 --block 3

Plain, and with `--block` also with the drafter in the folder: this project's "auto" and mlx-vlm's blocks of that size.
Both are timed from their first token to their last: of mlx-vlm the inner loop, which gives token ids alone; of this
project the public `stream_generate`, which also masks suppressed tokens and makes text of the ids. The last line of
standard output is JSON.
"""

import json
import time
from functools import partial
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
    block: Annotated[list[int] | None, typer.Option(min=2, help="mlx-vlm's tokens a round; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, after one that does not count.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the prompt.")] = 0,
) -> None:
    """Medians of several runs and their ratios."""
    theirs_version = peer_version()
    if not Path(model).is_dir():
        raise ValueError(f"{model!r} is no folder; expected a model folder")
    loaded, processor = load_endless(model, drafter="auto" if block else None)
    if block and loaded.drafter is None:
        raise ValueError(f"{model} has no drafter; expected one in its subfolder drafter/, or no block")
    prompt = random_prompt(loaded, processor, prompt_tokens, max_tokens, seed)
    peer, peer_drafter = load_peer(model, bool(block))

    def ours(draft_length: int | str) -> tuple[float, list[int]]:
        stats, ids = measure(loaded, processor, prompt, max_tokens, Sampling(temperature=0), draft_length)
        return stats.generation_tps, ids

    def theirs(size: int | None) -> tuple[float, list[int]]:
        return measure_peer(peer, peer_drafter if size else None, size, prompt, max_tokens)

    plain, their_plain = "mlx_gemma4", f"mlx-vlm {theirs_version}"
    modes = {plain: partial(ours, 0), their_plain: partial(theirs, None)}
    if block:
        modes["mlx_gemma4, auto"] = partial(ours, "auto")
        modes |= {f"mlx-vlm, block {size}": partial(theirs, size) for size in block}

    speeds: dict[str, list[float]] = {name: [] for name in modes}
    replies: dict[str, list[int]] = {}
    for turn in track(range(repeats + 1), "Measuring", console=Console(stderr=True), transient=True):
        for name, run in modes.items():
            speed, replies[name] = run()
            if turn:  # the first compiles and warms up
                speeds[name].append(speed)
    equal = (a == b for a, b in zip(replies[plain], replies[their_plain], strict=True))
    same = len(list(takewhile(bool, equal)))
    medians = {name: median(figures) for name, figures in speeds.items()}
    ratio = medians[plain] / medians[their_plain]

    table = Table(title=f"{max_tokens} tokens after {prompt_tokens}, greedy, {repeats} runs in turn")
    for heading in ("", "median tokens/s", "lowest", "highest", "× mlx-vlm plain"):
        table.add_column(heading, justify="right")
    for name, figures in speeds.items():
        row = (f"{figure:.1f}" for figure in (medians[name], min(figures), max(figures)))
        table.add_row(name, *row, f"{medians[name] / medians[their_plain]:.2f}")
    found = machine()
    print(machine_line(found))
    Console().print(table)
    print(f"plain: ratio {ratio:.2f}; the first {same} of {max_tokens} tokens are the same")
    result = {
        "benchmark": "against_mlx_vlm",
        "machine": found,
        "model": model,
        "mlx_vlm": theirs_version,
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "decode_tps": {name: [round(figure, 2) for figure in figures] for name, figures in speeds.items()},
        "ratio": round(ratio, 3),
        "same_tokens": same,
    }
    print(json.dumps(result))


def peer_version() -> str:
    try:
        return version("mlx-vlm")
    except PackageNotFoundError:
        raise ImportError("mlx-vlm is not installed; expected it beside mlx_gemma4: pip install mlx-vlm") from None


def load_peer(folder: str, drafts: bool) -> tuple[Any, Any]:
    """mlx-vlm's model and drafter; None for one that is not needed."""
    from mlx_vlm import load  # here: it takes seconds, and an error above should not
    from mlx_vlm.speculative.drafters import load_drafter

    return load(folder)[0], load_drafter(f"{folder}/drafter", kind="mtp")[0] if drafts else None


def measure_peer(
    model: Any, drafter: Any, block: int | None, prompt: Prompt, max_tokens: int
) -> tuple[float, list[int]]:
    """Tokens/s and token ids of one greedy run of mlx-vlm, without what would slow it: text, suppressed tokens.

    drafter and block are None for plain decoding.
    """
    from mlx_vlm.generate import generate_step

    ids: list[int] = []
    started = 0.0
    input_ids = mx.array(prompt.token_ids)[None]
    stream = generate_step(
        input_ids, model, None, None, max_tokens=max_tokens, temperature=0,
        draft_model=drafter, draft_kind="mtp", draft_block_size=block,
    )  # fmt: skip
    for token, _ in stream:
        ids.append(int(token))
        started = started or time.perf_counter()
    return (len(ids) - 1) / (time.perf_counter() - started), ids


if __name__ == "__main__":
    run_script(main)
