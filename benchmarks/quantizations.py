"""Recipes for quantizing one checkpoint compared: size, memory, speed with and without drafts, and quality.

    pip install "mlx_gemma4[benchmark]"
    python benchmarks/quantizations.py SOURCE --output RESULTS --recipes "4bit, mixed, --q-bits 3"

A recipe is a name that mlx_gemma4.convert takes, or its --q-… options. Each is converted, measured and evaluated in
processes of its own, and has its figures in RESULTS/<recipe>.json when it is done: started again, the benchmark goes on
with the first that has none. RESULTS/table.md and RESULTS/chart.png show them together; the last line of standard
output is JSON.
"""

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TypeVar

import mlx.core as mx
import typer
from decode import machine, machine_line, measure, random_prompt, run_script

from mlx_gemma4 import Sampling, load
from mlx_gemma4.config import read_config
from mlx_gemma4.convert.command import convert
from mlx_gemma4.convert.recipes import named_recipe, uniform_recipe
from mlx_gemma4.evaluate.command import BUILT_IN, check_same, open_subject, read_lines, read_reference
from mlx_gemma4.evaluate.command import measure as evaluate
from mlx_gemma4.evaluate.quality import load_distributions
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Stats
from mlx_gemma4.terminal import size_text
from mlx_gemma4.weights.load import find_folder

NUMBERS = {"--q-bits": "q_bits", "--q-group-size": "q_group_size"}
Q_OPTIONS = NUMBERS | {"--q-mode": "q_mode"}
REFERENCE = "reference.safetensors"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """What is measured, and how: all that results must have in common to be compared."""

    source: str
    data: str | None
    answer_tokens: int | None
    prompt_tokens: int
    max_tokens: int
    chats: int
    repeats: int

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_lines(Path(self.data) if self.data else BUILT_IN)


def main(
    source: Annotated[str, typer.Argument(help="The checkpoint to convert: a folder or a hub id.")],
    recipes: Annotated[str, typer.Option(help="Recipes or --q-… options, with commas between.")] = "4bit, mixed, 8bit",
    output: Annotated[Path, typer.Option(help="The folder of the results.")] = Path("quantizations"),
    data: Annotated[str | None, typer.Option(help="JSON lines of chats, as mlx_gemma4.evaluate takes them.")] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of each answer, compare the first N tokens.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt whose reading is timed.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode in each chat.")] = 128,
    chats: Annotated[int, typer.Option(min=1, help="Chats of the data whose answers are decoded.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, after one that does not count.")] = 3,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the conversions.")] = False,
) -> None:
    """Convert, measure and compare."""
    check_source(source)
    if find_spec("matplotlib") is None:  # now, and not after hours
        raise ImportError('matplotlib is not installed; expected pip install "mlx_gemma4[benchmark]"')
    chosen = {slug(text): parse_recipe(text) for text in map(str.strip, recipes.split(","))}
    plan = Plan(source, data, answer_tokens, prompt_tokens, max_tokens, chats, repeats)
    check_plan(output / "plan.json", plan)
    rows = [result(name, options, plan, output, keep) for name, options in chosen.items()]
    text = table(rows)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(rows, output / "chart.png")
    print(machine_line(machine()))
    print(text)
    print(json.dumps({"benchmark": "quantizations", "machine": machine(), "plan": asdict(plan), "results": rows}))


def check_source(source: str) -> None:
    """ValueError if there is nothing to quantize."""
    if read_config(find_folder(source)).quantization is not None:
        raise ValueError(f"{source} is quantized already; expected the original")


# --- recipes -----------------------------------------------------------------------------------


def parse_recipe(text: str) -> dict[str, Any]:
    """The arguments of `convert` for a recipe's name or for options such as "--q-bits 3 --q-group-size 32"."""
    if not text.startswith("-"):
        return {"recipe": named_recipe(text).name}
    words = shlex.split(text.replace("=", " "))
    if len(words) % 2 or not set(words[::2]) <= Q_OPTIONS.keys():
        raise ValueError(f"recipe is {text!r}; expected a name, or values for {', '.join(Q_OPTIONS)}")
    chosen: dict[str, Any] = {}
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option in NUMBERS and not value.isdecimal():
            raise ValueError(f"{option} is {value!r}; expected a whole number")
        chosen[Q_OPTIONS[option]] = int(value) if option in NUMBERS else value
    uniform_recipe(chosen.get("q_bits"), chosen.get("q_group_size"), chosen.get("q_mode"))  # its errors, now
    return chosen


def slug(text: str) -> str:
    """A recipe as the name of a file."""
    return re.sub(r"[^\w]+", "-", text.replace("--", "")).strip("-")


def check_plan(file: Path, plan: Plan) -> None:
    """ValueError if the folder holds results that were measured in another way."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, asdict(plan))
    elif json.loads(file.read_text(encoding="utf-8")) != asdict(plan):
        raise ValueError(
            f"{file.parent} was measured with other options ({file}); expected the same, or another output"
        )


def write_whole(file: Path, value: dict[str, Any]) -> None:
    put(file, json.dumps(value, indent=2))


def put(file: Path, text: str) -> None:
    """Write a file whole: who is stopped meanwhile leaves what was there."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def result(name: str, options: dict[str, Any], plan: Plan, output: Path, keep: bool) -> dict[str, Any]:
    """The figures of a recipe, of an earlier run if that had done with it."""
    file, folder, reference = output / f"{name}.json", output / "models" / name, output / REFERENCE
    if not file.exists():
        if not reference.exists():
            apart(save_reference, plan, reference)
        if folder.exists():  # of a run that was stopped
            shutil.rmtree(folder)
        apart(make_conversion, plan.source, folder, options)
        row = {"recipe": name} | apart(timings, folder, plan) | apart(quality, folder, plan, reference)
        if not keep:
            shutil.rmtree(folder)
        write_whole(file, row)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a new process, whose memory is its own; its errors come back."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# --- in processes of their own -----------------------------------------------------------------


def save_reference(plan: Plan, file: Path) -> None:
    read_reference(open_subject(plan.source, None, plan.lines, plan.answer_tokens)).save(file)


def make_conversion(source: str, folder: Path, chosen: dict[str, Any]) -> None:
    convert(hf_path=source, mlx_path=str(folder), **chosen)


def timings(folder: Path, plan: Plan) -> dict[str, Any]:
    """Size, load time, memory and speed of a conversion."""
    started = time.perf_counter()
    model, processor = load(folder)
    loading = time.perf_counter() - started
    mx.reset_peak_memory()
    whole = random_prompt(model, processor, plan.prompt_tokens, 2, seed=0)
    reading = [measure(model, processor, whole, 2, Sampling(temperature=0))[0] for _ in range(plan.repeats + 1)][1:]
    row: dict[str, Any] = {
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
        "load_s": round(loading, 3),
        "prompt_tps": round(median(stats.prompt_tps for stats in reading), 1),
        "time_to_first_token_s": round(median(stats.time_to_first_token for stats in reading), 4),
    }
    plain = answers(model, processor, plan, 0)
    row |= {"decode_tps": decode_tps(plain), "mtp_tps": None, "mtp_tokens_per_round": None}
    runs = reading + plain
    if model.drafter is not None:
        drafted = answers(model, processor, plan, "auto")
        rounds = sum(stats.rounds for stats in drafted)
        made = sum(stats.accepted_tokens for stats in drafted)
        row |= {"mtp_tps": decode_tps(drafted), "mtp_tokens_per_round": round(1 + made / max(1, rounds), 3)}
        runs += drafted
    return row | {"peak_memory_bytes": max(stats.peak_memory for stats in runs)}


def answers(model: Model, processor: Processor, plan: Plan, draft_length: int | str) -> list[Stats]:
    """Greedy answers to the chats, several times."""
    prompts = [processor(line["messages"][:-1], tools=line.get("tools")) for line in plan.lines[: plan.chats]]
    measure(model, processor, prompts[0], plan.max_tokens, Sampling(temperature=0), draft_length)  # compiles
    return [
        measure(model, processor, prompt, plan.max_tokens, Sampling(temperature=0), draft_length)[0]
        for _ in range(plan.repeats)
        for prompt in prompts
    ]


def decode_tps(runs: list[Stats]) -> float:
    """Tokens a second after the first of each answer, over all of them."""
    timed = [stats for stats in runs if stats.generation_tps]
    if not timed:
        raise ValueError("no answer has a second token; expected chats with longer answers")
    tokens = sum(stats.generation_tokens - 1 for stats in timed)
    return round(tokens / sum((stats.generation_tokens - 1) / stats.generation_tps for stats in timed), 2)


def quality(folder: Path, plan: Plan, reference: Path) -> dict[str, Any]:
    known = load_distributions(reference)
    subject = open_subject(str(folder), "auto", plan.lines, plan.answer_tokens)
    check_same(subject, known)
    return asdict(evaluate(subject, known))


# --- what is shown -----------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| recipe | disk | peak memory | load | first token | prompt | plain | MTP | accepted | mean KL | 99 % below "
        "| same token |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        drafts = ["–", "–"]
        if row["mtp_tps"] is not None and row["acceptance"] is not None:
            drafts = [f"{row['mtp_tps']:.1f} tokens/s", f"{100 * row['acceptance']:.1f} %"]
        cells = [
            row["recipe"],
            size_text(row["disk_bytes"]),
            size_text(row["peak_memory_bytes"]),
            f"{row['load_s']:.1f} s",
            f"{row['time_to_first_token_s']:.2f} s",
            f"{row['prompt_tps']:.0f} tokens/s",
            f"{row['decode_tps']:.1f} tokens/s",
            *drafts,
            f"{row['kl_mean']:.4f}",
            f"{row['kl_p99']:.4f}",
            f"{100 * row['top1']:.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Speed against divergence; the size of a point is the peak memory."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    largest = max(row["peak_memory_bytes"] for row in rows)
    for row in rows:
        speed = row["mtp_tps"] or row["decode_tps"]
        axes.scatter(row["kl_mean"], speed, s=600 * row["peak_memory_bytes"] / largest, alpha=0.6)
        label = f"{row['recipe']}\n{size_text(row['peak_memory_bytes'])}"
        point = row["kl_mean"], speed
        axes.annotate(label, point, (0, 18), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(0.15)
    axes.set_xlabel("mean KL divergence from the source (nats a token; left is better)")
    axes.set_ylabel("tokens/s, with drafts where there is a drafter")
    axes.set_title("Quantizations: speed, quality and peak memory (area)")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main)
