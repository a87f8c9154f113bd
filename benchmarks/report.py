"""What a model does on this machine, right and how fast, as one report that others can repeat and compare.

    python benchmarks/report.py MODEL --out FOLDER

Checks (checks.py) hold the model against itself; speeds are those of the other benchmarks. FOLDER/report.json has each
part as soon as it is done: started again, a run goes on with the first that it lacks. FOLDER/report.md says the same as
tables, and chart.png (extra `benchmark`) draws it; benchmarks/compare_reports.py puts reports of one model side by
side. Exit status 1 if a check fails.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import quantizations
import typer
from checks import CHECKS, SAMPLES, Subject, checked, endless
from conversation import GREEDY, figures, text_of
from decode import decoder_bytes, machine, machine_line, measure, random_prompt, run_script
from decode import summary as reading_summary
from engines import OWN, Member, in_turns, member_of
from engines import summary as engine_summary
from serve import from_engine, measured
from serve import request as served_request
from speculate import summary as draft_summary

from mlx_gemma4 import Engine, PromptStore, Session, generate, load
from mlx_gemma4 import __version__ as own_version
from mlx_gemma4.config import read_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.planner import memory_limit, predict
from mlx_gemma4.prompt.processor import Processor, load_processor
from mlx_gemma4.terminal import size_text
from mlx_gemma4.weights.load import find_folder, footprint_of

LENGTHS = [512, 2048, 8192, 32768]
AT_ONCE = [1, 2, 4, 8]
LONG = 8192  # tokens of a prompt from which on it is read once
FIRST_TOKENS = 1024  # of a conversation
TURN_TOKENS = 100
WORDS = 100  # before the question of a request
SETTING_TURNS = 2
ENGINE_TURNS = 2
DIGESTS = "files.json"
SUMMED_BYTES = 2**28  # more than any chip caches
ROWS = (1, 2, 4, 8, 16)
PASSES = 8  # of each number of rows
KINDS = {
    "code": "Write a Python class for a binary search tree with insert, delete and find.",
    "prose": "Tell me a story about a fox and a ball.",
    "JSON": "Write a JSON array of ten made-up people with name, age, city and three hobbies each.",
    "chat": "I can't sleep well these days. What could I try?",
    "other language": "Erkläre mir bitte ausführlich, wie ein Regenbogen entsteht.",
}


VERDICT = {True: "right", False: "**wrong**", None: "–"}


@dataclass(frozen=True)
class Plan:
    """How much is measured: what reports must have in common to go on with each other."""

    prompt_tokens: list[int]
    max_tokens: int
    repeats: int
    requests: list[int]
    turns: int
    check_tokens: int
    recipes: str | None
    beside: list[str] | None


def main(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or demo.")],
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("report"),
    recipes: Annotated[
        str | None, typer.Option(help="Compare quantizations of MODEL too, as quantizations.py does.")
    ] = None,
    prompt_tokens: Annotated[list[int], typer.Option(help="Length of a prompt; repeatable.")] = LENGTHS,
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens of a reply.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, after one that does not count.")] = 3,
    requests: Annotated[list[int], typer.Option(min=1, help="Requests at once; repeatable.")] = AT_ONCE,
    turns: Annotated[int, typer.Option(min=2, help="Turns of a conversation.")] = 10,
    check_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt that is read in several ways.")] = 1536,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another engine, ENGINE=MODEL; repeatable. Without: mlx-lm and mlx-vlm on MODEL's folder."),
    ] = None,
) -> None:
    """Check and measure a model."""
    plan = Plan(prompt_tokens, max_tokens, repeats, requests, turns, check_tokens, recipes, beside)
    for named in beside or []:
        member_of(named)
    folder = find_folder(model)
    digests = digests_of(folder, out / DIGESTS)
    if recipes is not None:
        quantizations.check_source(model)
        chosen = {
            quantizations.slug(text): quantizations.parse_recipe(text) for text in map(str.strip, recipes.split(","))
        }
    report = opened(out / "report.json", model, {name: found.sha256 for name, found in digests.items()}, plan)
    quantizations.write_whole(out / DIGESTS, {name: asdict(found) for name, found in digests.items()})
    save = partial(quantizations.write_whole, out / "report.json", report)
    hold(folder, plan, report, save)
    for name, measure_apart in APART.items():
        if name not in report["fast"]:
            print(f"fast: {name}", file=sys.stderr)
            report["fast"][name] = measure_apart(folder, plan)
            save()
    if recipes is not None and "recipes" not in report:
        report["recipes"] = compared(model, chosen, plan, out / "recipes")
        save()
    text = markdown(report)
    quantizations.put(out / "report.md", text)
    if find_spec("matplotlib") is not None:
        draw(report, out / "chart.png")
    print(text)
    wrong = [name for name, found in report["right"].items() if found["right"] is False]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(CHECKS)} checks failed: {', '.join(wrong)}")


def hold(folder: Path, plan: Plan, report: dict[str, Any], save: Callable[[], None]) -> None:
    """All that one loaded model gives; it is loaded only if something is still to be done."""
    checks = [name for name in CHECKS if name not in report["right"]]
    sections = [name for name in HELD if name not in report["fast"]]
    if not checks and not sections:
        return
    started = time.perf_counter()
    loaded, processor = load(folder)
    report["fast"].setdefault(
        "load", [{"what": "model", "load_s": round(time.perf_counter() - started, 3)} | sizes(loaded)]
    )
    subject = Subject(loaded, processor, plan.check_tokens, plan.max_tokens)
    for name in checks:
        print(f"right: {name}", file=sys.stderr)
        report["right"][name] = asdict(checked(name, subject))
        save()
    for name in sections:
        print(f"fast: {name}", file=sys.stderr)
        report["fast"][name] = HELD[name](loaded, processor, plan)
        save()


# --- the folder --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digest:
    """What a file was when it was read whole: gigabytes are not read again where nothing has changed."""

    size: int
    mtime_ns: int
    sha256: str


def digests_of(folder: Path, known: Path) -> dict[str, Digest]:
    """What makes a model, by the files' names."""
    try:
        before = {name: Digest(**found) for name, found in json.loads(known.read_text(encoding="utf-8")).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):  # none yet, or not one of these
        before = {}
    files = sorted(file for ending in ("safetensors", "json", "jinja") for file in folder.rglob(f"*.{ending}"))
    return {str(file.relative_to(folder)): digest(file, before.get(str(file.relative_to(folder)))) for file in files}


def digest(file: Path, before: Digest | None) -> Digest:
    status = file.stat()
    if before is not None and (before.size, before.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return before
    with file.open("rb") as opened_file:
        return Digest(status.st_size, status.st_mtime_ns, hashlib.file_digest(opened_file, "sha256").hexdigest())


def opened(file: Path, model: str, files: dict[str, str], plan: Plan) -> dict[str, Any]:
    """The report to go on with, or a new one; ValueError for that of another model or of other options."""
    if not file.exists():
        report: dict[str, Any] = {
            "report": 1, "model": model, "files": files, "machine": described(), "plan": asdict(plan), "right": {},
            "fast": {},
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        quantizations.write_whole(file, report)
        return report
    known = read_report(file)
    if known["files"] != files:
        raise ValueError(f"{file} is of another model, {known['model']}; expected {model}'s, or another --out")
    own = versions()
    if known["plan"] != asdict(plan) or {key: known["machine"][key] for key in own} != own:
        raise ValueError(f"{file} was measured with other options, or elsewhere; expected the same, or another --out")
    return known


def read_report(file: Path) -> dict[str, Any]:
    """ValueError if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{file} is no report of benchmarks/report.py; expected its report.json") from None
    if not isinstance(found, dict) or found.get("report") != 1:
        raise ValueError(f"{file} is no report of benchmarks/report.py; expected its report.json")
    return found


# --- the machine -------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    return machine() | {"mlx_gemma4": own_version}


def described() -> dict[str, Any]:
    return versions() | {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "model_may_hold_bytes": memory_limit(),
        "bandwidth_gb_per_s": bandwidth(),
        "power": power(),
        "load_average": round(os.getloadavg()[0], 2),
        "busy": busy(),
    }


def bandwidth() -> float:
    """GB/s at which a large array is summed, the best of five."""
    array, seconds = mx.zeros(SUMMED_BYTES // 4), []
    mx.eval(array)
    for _ in range(5):
        started = time.perf_counter()
        mx.eval(array.sum())
        seconds.append(time.perf_counter() - started)
    return round(SUMMED_BYTES / min(seconds) / 1e9, 1)


def told_by(*command: str) -> list[str]:
    """The lines that a program of the system prints; none where there is no such program."""
    if shutil.which(command[0]) is None:
        return []
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def power() -> str:
    lines = told_by("pmset", "-g", "batt")  # "Now drawing from 'Battery Power'"
    return lines[0].partition("'")[2].rstrip("'") if lines else "not known"


def busy() -> list[str]:
    """Programs that take more than a tenth of a core, this one apart."""
    rows = [line.split(maxsplit=2) for line in told_by("ps", "-A", "-o", "pid=", "-o", "pcpu=", "-o", "comm=")]
    found = [(float(part), Path(name).name) for pid, part, name in rows if float(part) > 10 and int(pid) != os.getpid()]
    return [f"{name} {part:.0f} %" for part, name in sorted(found, reverse=True)]


# --- how fast ----------------------------------------------------------------------------------

Measured = list[dict[str, Any]]


def sizes(model: Model) -> dict[str, Any]:
    own = footprint_of(model)
    return {"weights_bytes": own.weights, "drafter_bytes": own.drafter}


def prompts(model: Model, processor: Processor, plan: Plan) -> Measured:
    """Random prompts by length, written on without drafts; the peak beside what the planner predicts."""
    return [prompt_row(model, processor, plan, length) for length in plan.prompt_tokens]


def prompt_row(model: Model, processor: Processor, plan: Plan, length: int) -> dict[str, Any]:
    predicted = predict(footprint_of(model), length, plan.max_tokens).peak
    context = model.config.text.max_position_embeddings
    if length + plan.max_tokens > context or predicted > memory_limit():
        return {"prompt_tokens": length, "note": f"does not fit: {context} tokens, {size_text(memory_limit())}"}
    prompt = random_prompt(model, processor, length, plan.max_tokens, 0)
    count = 1 if length >= LONG else plan.repeats + 1  # the first compiles, which is little beside a long prompt
    with endless(model):
        runs = [measure(model, processor, prompt, plan.max_tokens, GREEDY)[0] for _ in range(count)]
    row = reading_summary(runs[1:] or runs)
    speed = decoder_bytes(model) * row["decode_tps"] / 1e9
    return row | {
        "weights_gb_per_s": round(speed, 2),
        "predicted_bytes": predicted,
        "predicted_to_measured": round(predicted / row["peak_memory_bytes"], 3),
    }


def drafting(model: Model, processor: Processor, plan: Plan) -> Measured:
    """Plain and with drafts, taking turns, by kind of text."""
    if model.drafter is None:
        return [{"kind": kind, "note": "no drafter"} for kind in KINDS]
    rows = []
    for kind, text in KINDS.items():
        prompt = processor([{"role": "user", "content": text}])
        runs: dict[int | str, list[Any]] = {0: [], "auto": []}
        for turn in range(plan.repeats + 1):
            for length, own in runs.items():
                with endless(model):
                    stats, _ = measure(model, processor, prompt, plan.max_tokens, GREEDY, length)
                if turn:
                    own.append(stats)
        plain = median(stats.generation_tps for stats in runs[0])
        drafted = sum(stats.drafted_tokens for stats in runs["auto"])
        accepted = sum(stats.accepted_tokens for stats in runs["auto"])
        own_row = draft_summary(runs["auto"], plain)
        rows.append(
            {"kind": kind, "plain_tps": round(plain, 2), "acceptance": round(accepted / max(1, drafted), 3)} | own_row
        )
    return rows


def rows_of_a_pass(model: Model, processor: Processor, plan: Plan) -> Measured:
    """What a pass costs by the tokens that it takes: how dear the verification of drafts is."""
    rows: Measured = []
    for count in ROWS:
        prompt = random_prompt(model, processor, count * (PASSES + 1), 1, 0)
        seconds: list[float] = []
        started = time.perf_counter()
        for hidden in model.read(prompt, model.caches(len(prompt)), count):
            mx.eval(model.language_model.head(hidden))
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
        found = median(seconds[1:])
        times = found / (rows[0]["ms"] / 1000) if rows else 1.0
        rows.append({"rows": count, "ms": round(1000 * found, 2), "times_one": round(times, 2)})
    return rows


def at_once(model: Model, processor: Processor, plan: Plan) -> Measured:
    """Requests that come together, each a reply of full length."""
    rows = []
    for count in plan.requests:
        asked = [served_request(number, 0, WORDS, plan.max_tokens) for number in range(count)]
        with endless(model), Engine(model, processor, count) as engine:
            found = measured(asked, np.zeros(count), count, partial(from_engine, engine))
        rows.append({"requests": count} | {key: round(value, 3) for key, value in found.items()})
    return rows


def soft_tokens(model: Model, processor: Processor, plan: Plan) -> Measured:
    """From a file, or an array, to the first token."""
    asked: dict[str, dict[str, Any]] = {}
    if model.config.vision is not None:
        asked["an image"] = {"type": "image", "image": SAMPLES / "number.jpg"}
        asked["a film of 6 s"] = {"type": "video", "video": SAMPLES / "film.mp4"}
    if model.config.audio is not None:
        noise = np.random.default_rng(0).normal(0, 0.1, 160_000).astype(np.float32)
        asked["10 s of sound"] = {"type": "audio", "audio": (noise, 16_000)}
    rows = []
    for name, part in asked.items():
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
        runs = [
            generate(model, processor, messages, max_tokens=1, sampling=GREEDY).stats for _ in range(plan.repeats + 1)
        ][1:]
        first = median(stats.time_to_first_token for stats in runs)
        rows.append({"media": name, "prompt_tokens": runs[0].prompt_tokens, "time_to_first_token_s": round(first, 3)})
    return rows


def conversation(model: Model, processor: Processor, plan: Plan) -> Measured:
    """Turn by turn, what was read coming from the store."""
    session, rows = Session(model, processor, store=PromptStore()), []
    room = model.config.text.max_position_embeddings - plan.turns * (TURN_TOKENS + plan.max_tokens + 32)
    with endless(model):
        for turn in range(plan.turns):
            tokens = TURN_TOKENS if turn else max(1, min(FIRST_TOKENS, plan.check_tokens, room))
            reply = session.send(text_of(processor, tokens, turn), max_tokens=plan.max_tokens, sampling=GREEDY)
            found = figures(reply)
            rows.append({"turn": turn + 1} | {key: round(value, 4) for key, value in found.items()})
    return rows


HELD: dict[str, Callable[[Model, Processor, Plan], Measured]] = {
    "prompts": prompts,
    "drafts": drafting,
    "rows": rows_of_a_pass,
    "requests": at_once,
    "media": soft_tokens,
    "conversation": conversation,
}


# --- how fast, in processes of their own -------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What may make a chip faster: a computing type, or how much MLX sends to a GPU at once."""

    dtype: str | None = None  # the default, which is the first row
    variables: dict[str, str] = field(default_factory=dict)


SETTINGS = {
    "as it is": Setting(),
    "bfloat16": Setting("bfloat16"),
    "float16": Setting("float16"),
    "1,000 kernels a command buffer": Setting(variables={"MLX_MAX_OPS_PER_BUFFER": "1000"}),
    "and up to 400 MB": Setting(variables={"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "400"}),
}


environment = partial(patch.dict, os.environ)  # what processes that are started see: MLX reads it once


def settings(folder: Path, plan: Plan) -> Measured:
    """The shortest prompt and a reply without drafts in other settings, taking turns."""
    chosen = {name: own for name, own in SETTINGS.items() if machine()["device"] == "gpu" or not own.variables}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(SETTING_TURNS):
        for name, own in chosen.items():
            with environment(own.variables):
                runs[name].append(quantizations.apart(in_setting, folder, own.dtype, plan))
    first = runs["as it is"]
    rows: Measured = []
    for name in SETTINGS:
        if name not in runs:
            rows.append({"setting": name, "note": "a CPU has no command buffers"})
            continue
        row: dict[str, Any] = {"setting": name, "computes_in": runs[name][0]["computes_in"]}
        for key in ("prompt_tps", "decode_tps"):
            row[key] = round(median(run[key] for run in runs[name]), 2)
            row[f"times_{key}"] = round(
                median(run[key] / own[key] for run, own in zip(runs[name], first, strict=True)), 3
            )
        rows.append(row)
    return rows


def in_setting(folder: Path, dtype: str | None, plan: Plan) -> dict[str, Any]:
    model, processor = load(folder, drafter=None, dtype=dtype)
    prompt = random_prompt(model, processor, min(plan.prompt_tokens), plan.max_tokens, 0)
    with endless(model):
        measure(model, processor, prompt, 4, GREEDY)  # compiles
        stats, _ = measure(model, processor, prompt, plan.max_tokens, GREEDY)
    return {
        "computes_in": str(model.config.dtype).removeprefix("mlx.core."),
        "prompt_tps": stats.prompt_tps,
        "decode_tps": stats.generation_tps,
    }


def engines(folder: Path, plan: Plan) -> Measured:
    """This one and others, each as it comes: with its own template, and this one with its drafts."""
    others = (
        [Member(engine, str(folder)) for engine in ("mlx-lm", "mlx-vlm")]
        if plan.beside is None
        else map(member_of, plan.beside)
    )
    members = [Member(OWN, str(folder)), *others]
    long = text_of(load_processor(folder, read_config(folder)), min(plan.prompt_tokens), 0)
    found = in_turns(members, long, [*KINDS.values()], plan.max_tokens, ENGINE_TURNS)
    return [
        {"engine": f"{member.engine} {member.version or ''}".strip()}
        | ({"note": own} if isinstance(own, str) else engine_summary(own))
        for member, own in zip(members, found, strict=True)
    ]


APART: dict[str, Callable[[Path, Plan], Measured]] = {"settings": settings, "engines": engines}


# --- what is shown -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    key: str
    heading: str
    shown: Callable[[Any], str]


@dataclass(frozen=True)
class Section:
    title: str
    columns: tuple[Column, ...]  # the first says which row it is


def number(digits: int, unit: str = "") -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}{unit}"


FIRST = Column("time_to_first_token_s", "first token", number(3, " s"))
TOKENS = Column("prompt_tokens", "prompt", str)
SECTIONS = {
    "load": Section(
        "Loading",
        (
            Column("what", "", str),
            Column("load_s", "load", number(2, " s")),
            Column("weights_bytes", "weights", size_text),
            Column("drafter_bytes", "drafter", size_text),
        ),
    ),
    "prompts": Section(
        "Prompts by length, without drafts",
        (
            TOKENS,
            Column("prompt_tps", "prompt tokens/s", number(1)),
            FIRST,
            Column("decode_tps", "tokens/s", number(1)),
            Column("weights_gb_per_s", "weights, GB/s", number(1)),
            Column("peak_memory_bytes", "peak memory", size_text),
            Column("predicted_bytes", "predicted", size_text),
            Column("predicted_to_measured", "ratio", number(2)),
        ),
    ),
    "drafts": Section(
        "Drafts by kind of text",
        (
            Column("kind", "text", str),
            Column("plain_tps", "plain tokens/s", number(1)),
            Column("decode_tps", "with drafts", number(1)),
            Column("times_plain", "× plain", number(2)),
            Column("acceptance", "accepted", number(3)),
            Column("tokens_per_round", "tokens a round", number(2)),
        ),
    ),
    "rows": Section(
        "Rows of a pass",
        (
            Column("rows", "rows", str),
            Column("ms", "a pass", number(2, " ms")),
            Column("times_one", "× one", number(2)),
        ),
    ),
    "requests": Section(
        "Requests at once",
        (
            Column("requests", "requests", str),
            Column("tokens_per_second", "tokens/s together", number(1)),
            Column("rate_p50", "tokens/s each", number(1)),
            Column("first_p50", "first token", number(3, " s")),
        ),
    ),
    "media": Section("Media to the first token", (Column("media", "of", str), TOKENS, FIRST)),
    "conversation": Section(
        "A conversation, from the store",
        (
            Column("turn", "turn", str),
            TOKENS,
            Column("read_tokens", "read", number(0)),
            Column("time_to_first_token", "first token", number(3, " s")),
        ),
    ),
    "settings": Section(
        "Settings, without drafts",
        (
            Column("setting", "", str),
            Column("computes_in", "computes in", str),
            Column("prompt_tps", "prompt tokens/s", number(1)),
            Column("times_prompt_tps", "×", number(2)),
            Column("decode_tps", "tokens/s", number(1)),
            Column("times_decode_tps", "×", number(2)),
        ),
    ),
    "engines": Section(
        "Engines, taking turns",
        (
            Column("engine", "", str),
            Column("prompt_tps", "prompt tokens/s", number(1)),
            Column("question_first_token_s", "first token", number(3, " s")),
            Column("generation_tps", "tokens/s", number(1)),
            Column("peak_memory_bytes", "peak memory", lambda value: "–" if value is None else size_text(value)),
        ),
    ),
}


def table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
    yield ""


def cells(section: Section, row: dict[str, Any]) -> list[str]:
    """A row's; of one that was not measured, why."""
    first, *others = section.columns
    if "note" in row:
        return [first.shown(row[first.key]), row["note"], *["–"] * (len(others) - 1)]
    return [column.shown(row[column.key]) for column in section.columns]


def markdown(report: dict[str, Any]) -> str:
    own = report["machine"]
    lines = [f"# {report['model']}", "", f"{machine_line(own)}, mlx_gemma4 {own['mlx_gemma4']}", ""]
    facts = {
        "cores": str(own["cores"]),
        "memory": f"{size_text(own['memory_bytes'])}, for a model {size_text(own['model_may_hold_bytes'])}",
        "bandwidth (a sum)": f"{own['bandwidth_gb_per_s']} GB/s",
        "power": own["power"],
        "load average": str(own["load_average"]),
        "also running": ", ".join(own["busy"]) or "nothing of note",
        "files": hashlib.sha256(json.dumps(report["files"], sort_keys=True).encode()).hexdigest()[:16],
    }
    lines += table(["machine", ""], [[key, value] for key, value in facts.items()])
    lines += ["## Is it right", ""]
    rows = [[CHECKS[name][0], VERDICT[found["right"]], found["told"]] for name, found in report["right"].items()]
    lines += [*table(["check", "", "found"], rows), "## How fast", ""]
    for name, section in SECTIONS.items():
        lines += [f"### {section.title}", ""]
        lines += table(
            [column.heading for column in section.columns], [cells(section, r) for r in report["fast"][name]]
        )
    if "recipes" in report:
        lines += ["## Quantizations", "", quantizations.table(report["recipes"]), ""]
    return "\n".join(lines)


def draw(report: dict[str, Any], file: Path) -> None:
    """Speed by the length of the prompt, and how long each turn of a conversation waits."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = [row for row in report["fast"]["prompts"] if "note" not in row]
    for key, label in (("prompt_tps", "reading"), ("decode_tps", "writing, no drafts")):
        left.plot([row["prompt_tokens"] for row in rows], [row[key] for row in rows], marker="o", label=label)
    left.set(xlabel="tokens of the prompt", ylabel="tokens/s", xscale="log", yscale="log")
    left.legend()
    turns = report["fast"]["conversation"]
    right.plot([row["turn"] for row in turns], [row["time_to_first_token"] for row in turns], marker="o")
    right.set(xlabel="turn of a conversation", ylabel="seconds to the first token", ylim=(0, None))
    part = file.with_suffix(".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(file)
    pyplot.close(figure)


def compared(model: str, chosen: dict[str, dict[str, Any]], plan: Plan, folder: Path) -> Measured:
    """The recipes' figures, as quantizations.py measures them."""
    own = quantizations.Plan(model, None, None, plan.prompt_tokens[0], plan.max_tokens, 6, plan.repeats)
    quantizations.check_plan(folder / "plan.json", own)
    return [quantizations.result(name, options, own, folder, False) for name, options in chosen.items()]


if __name__ == "__main__":
    run_script(main)
