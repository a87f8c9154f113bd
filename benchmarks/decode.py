"""How fast a model folder reads and writes: prompt tokens/s, time to first token, decode tokens/s, peak memory.

    python benchmarks/decode.py --model FOLDER --prompt-tokens 128 --prompt-tokens 2048

Prompts are random token ids: the time does not depend on what they say. Stop tokens are written through, so that
every run has its full length. Under mlx.launch machines share the model, and the first one reports. The last line of
standard output is JSON.
"""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer
from mlx.utils import tree_reduce
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_gemma4 import Prompt, Sampling, load, stream_generate
from mlx_gemma4.config import ModelConfig
from mlx_gemma4.errors import unbroken
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Stats
from mlx_gemma4.weights.peers import follows, launched

SPLIT_HELP = "Under mlx.launch, of one model on several machines: tensors or layers; the faster by default."


def main(
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")],
    prompt_tokens: Annotated[list[int], typer.Option(help="Length of a prompt; repeatable.")] = [128, 2048],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each length, after one that does not count.")] = 3,
    temp: Annotated[float, typer.Option(help="0 is greedy; above, the checkpoint's top-k and top-p apply.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the prompts and of sampling.")] = 0,
    split: Annotated[str | None, typer.Option(help=SPLIT_HELP)] = None,
) -> None:
    """Medians of several runs, the prompt lengths taking turns."""
    loaded, processor = load_endless(model, split=split)
    sampling = Sampling(temperature=temp, seed=seed)
    prompts = [random_prompt(loaded, processor, length, max_tokens, seed) for length in prompt_tokens]
    runs: list[list[Stats]] = [[] for _ in prompts]
    order = [(turn, i) for turn in range(repeats + 1) for i in range(len(prompts))]
    for turn, i in track(order, "Measuring", console=Console(stderr=True), transient=True):
        stats, ids = measure(loaded, processor, prompts[i], max_tokens, sampling)
        if len(ids) != max_tokens:
            raise ValueError(f"a run gave {len(ids)} tokens; expected {max_tokens}")
        if turn:  # the first compiles and warms up
            runs[i].append(stats)
    if follows(loaded.group):
        return
    report(machine(), model, decoder_bytes(loaded), [summary(stats) for stats in runs], max_tokens, repeats, temp)


def load_endless(path_or_hub_id: str, drafter: str | None = None, split: str | None = None) -> tuple[Model, Processor]:
    """`load`, for a model that does not know stop tokens; under mlx.launch, of this machine's part of it."""
    model, processor = load(path_or_hub_id, drafter=drafter, group=launched(), split=split)
    model.config = without_stops(model.config)
    return model, processor


def without_stops(config: ModelConfig) -> ModelConfig:
    return replace(config, generation=replace(config.generation, eos_token_ids=()))


def random_prompt(model: Model, processor: Processor, length: int, max_tokens: int, seed: int) -> Prompt:
    """`length` random ids of text, with room for `max_tokens` more; ValueError if the context is shorter."""
    context = model.config.text.max_position_embeddings
    if length < 1 or length + max_tokens > context:
        raise ValueError(
            f"a prompt of {length} tokens and {max_tokens} more do not fit; expected 2 to {context} together"
        )
    controls = set(processor.control.ids.values()) | set(model.config.special_tokens.values())
    text_ids = np.array([i for i in range(model.config.text.vocab_size) if i not in controls])
    return Prompt(np.random.default_rng(seed).choice(text_ids, length).tolist())


def measure(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    max_tokens: int,
    sampling: Sampling,
    draft_length: int | str = 0,
) -> tuple[Stats, list[int]]:
    """The stats and the token ids of one run."""
    ids: list[int] = []
    stream = stream_generate(
        model, processor, prompt, max_tokens=max_tokens, sampling=sampling, draft_length=draft_length,
        repetition_detection="off",
    )  # fmt: skip
    for piece in stream:
        ids += piece.token_ids
        if piece.stats is not None:
            return piece.stats, ids
    raise RuntimeError("the stream ended without stats")


def decoder_bytes(model: Model) -> int:
    """The weights that each decoded token reads: the decoder's, its embedding being the head too."""
    return int(tree_reduce(lambda total, array: total + array.nbytes, model.language_model.parameters(), 0))


def summary(runs: Sequence[Stats]) -> dict[str, Any]:
    return {
        "prompt_tokens": runs[0].prompt_tokens,
        "prompt_tps": round(median(run.prompt_tps for run in runs), 1),
        "time_to_first_token_s": round(median(run.time_to_first_token for run in runs), 4),
        "decode_tps": round(median(run.generation_tps for run in runs), 2),
        "decode_tps_lowest": round(min(run.generation_tps for run in runs), 2),
        "decode_tps_highest": round(max(run.generation_tps for run in runs), 2),
        "peak_memory_bytes": max(run.peak_memory for run in runs),
    }


def machine() -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "chip": str(mx.device_info().get("device_name", platform.machine())),
        "device": "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu",
        "mlx": version("mlx"),
        "python": platform.python_version(),
    }


def machine_line(found: dict[str, str]) -> str:
    return "{chip} ({device}), {platform}, mlx {mlx}, Python {python}".format(**found)


def report(
    found: dict[str, str],
    model: str,
    nbytes: int,
    rows: list[dict[str, Any]],
    max_tokens: int,
    repeats: int,
    temp: float,
) -> None:
    table = Table(title=f"{max_tokens} tokens decoded, median of {repeats} runs, temperature {temp:g}")
    for heading in ("prompt", "prompt tokens/s", "first token", "tokens/s", "GB/s *", "peak"):
        table.add_column(heading, justify="right")
    for row in rows:
        row["weights_gb_per_s"] = round(nbytes * row["decode_tps"] / 1e9, 2)
        table.add_row(
            str(row["prompt_tokens"]),
            f"{row['prompt_tps']:.1f}",
            f"{row['time_to_first_token_s']:.3f} s",
            f"{row['decode_tps']:.1f}",
            f"{row['weights_gb_per_s']:.1f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
        )
    print(machine_line(found))
    Console().print(table)
    print(f"* weights read: {nbytes / 1e9:.3f} GB a token; keys and values come on top")
    head = {"benchmark": "decode", "machine": found, "model": model, "max_tokens": max_tokens}
    print(json.dumps(head | {"repeats": repeats, "temperature": temp, "decoder_bytes": nbytes, "results": rows}))


def run_script(command: Any) -> None:
    """Run a benchmark's `main`; an error is one line on standard error."""
    try:
        typer.run(command)
    except (ValueError, OSError, MemoryError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {unbroken(error)}")


if __name__ == "__main__":
    run_script(main)
