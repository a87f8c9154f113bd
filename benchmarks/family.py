"""The family side by side: this model, and others of it by mlx-lm or mlx-vlm: speed, memory, and answers.

    pip install mlx-lm mlx-vlm
    python benchmarks/family.py --model FOLDER --beside mlx-lm=E4B --beside mlx-vlm=26B-A4B --questions FILE.jsonl

Each engine loads its model in a process of its own, one after the other and `--repeats` times over, so that none has
less memory for the others and all see the same machine. All are asked the same, greedily, with their own template, and
timed alike, from the question to the last of the reply's pieces. One that is not installed, or fails, says so in its
row. Standard output is Markdown, its last line JSON.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from conversation import GREEDY, text_of
from decode import machine, machine_line, run_script
from quantizations import apart
from report import table

from mlx_gemma4 import load, stream_generate
from mlx_gemma4.config import read_config
from mlx_gemma4.errors import shown, unbroken
from mlx_gemma4.evaluate.command import BUILT_IN
from mlx_gemma4.prompt.messages import json_lines
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.terminal import size_text
from mlx_gemma4.weights.load import find_folder

OWN = "mlx_gemma4"
BUILT_IN_QUESTIONS = 6  # of evaluate's exchanges, where there are none of the user's


@dataclass(frozen=True)
class Told:
    """What a reply has said by now: the text that is new, and how many tokens there are in all."""

    text: str
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    tokens: int
    first_tokens: int  # that came at once with the first
    first_s: float  # from the question on
    rest_s: float  # from the first token to the last


@dataclass(frozen=True)
class Turn:
    """What one process has found."""

    load_s: float
    long: Answer  # to a prompt whose reading is timed
    answers: list[Answer]
    peak_memory: int  # bytes, with the weights


Ask = Callable[[str, int], Iterator[Told]]


def main(
    model: Annotated[str, typer.Option(help="This model: a folder, a hub id, or demo.")],
    beside: Annotated[
        list[str] | None, typer.Option(help="mlx-lm=MODEL or mlx-vlm=MODEL, a folder or a hub id; repeatable.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help='JSON lines of {"question": TEXT}; without, six of mlx_gemma4.evaluate\'s.')
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt whose reading is timed, about.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each engine.")] = 3,
) -> None:
    """Tables of speed, memory and answers."""
    members = [(OWN, model), *(member_of(named) for named in beside or [])]
    asked = read_questions(questions)
    folder = find_folder(model)
    processor = load_processor(folder, read_config(folder))
    long = text_of(processor, prompt_tokens, 0)
    turns: list[list[Turn]] = [[] for _ in members]
    missing = {index: f"{engine} is not installed" for index, (engine, _) in enumerate(members) if not is_here(engine)}
    for _ in range(repeats):
        for index, (engine, name) in enumerate(members):
            if index in missing:
                continue
            try:
                turns[index].append(apart(turn, engine, name, long, asked, max_tokens))
            except Exception as error:  # an engine of others may raise anything: its row says so
                if engine == OWN:
                    raise
                missing[index] = f"{type(error).__name__}: {unbroken(error)}"
    rows = [
        {"engine": engine, "model": name}
        | ({"missing": missing[index]} if index in missing else {"version": version(engine)} | summary(turns[index]))
        for index, (engine, name) in enumerate(members)
    ]
    answers = [
        {"question": question, "answers": [
            None if index in missing else processor.parse_response(own[0].answers[number].text)["content"]
            for index, own in enumerate(turns)
        ]}
        for number, question in enumerate(asked)
    ]  # fmt: skip
    found = machine()
    print("\n".join([machine_line(found), "", *markdown(rows, answers, max_tokens, repeats)]))
    head = {"benchmark": "family", "machine": found, "max_tokens": max_tokens, "repeats": repeats}
    print(json.dumps(head | {"results": rows, "answers": answers}))


def member_of(named: str) -> tuple[str, str]:
    """Engine and model."""
    engine, _, model = named.partition("=")
    if engine not in ENGINES or engine == OWN or not model:
        raise ValueError(f"beside is {shown(named)}; expected mlx-lm=MODEL or mlx-vlm=MODEL")
    return engine, model


def is_here(engine: str) -> bool:
    return find_spec(engine.replace("-", "_")) is not None


def read_questions(file: Path | None) -> list[str]:
    """ValueError that names the line if one is wrong."""
    if file is None:
        return [line["messages"][0]["content"] for _, line in islice(json_lines(BUILT_IN), BUILT_IN_QUESTIONS)]
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is no file; expected one of JSON lines, for questions")
    found = []
    for number, entry in json_lines(file):
        if not isinstance(entry, dict) or not isinstance(entry.get("question"), str) or not entry["question"]:
            raise ValueError(f'{file}, line {number}: expected {{"question": a text}}')
        found.append(entry["question"])
    if not found:
        raise ValueError(f"{file} has no questions; expected one in each line")
    return found


# --- in a process of its own -------------------------------------------------------------------


def turn(engine: str, model: str, long: str, questions: list[str], max_tokens: int) -> Turn:
    started = time.perf_counter()
    ask = ENGINES[engine](model)
    load_s = time.perf_counter() - started
    timed(ask(questions[0], max_tokens))  # compiles and warms up
    return Turn(
        load_s,
        timed(ask(long, 2)),
        [timed(ask(question, max_tokens)) for question in questions],
        mx.get_peak_memory(),
    )


def timed(pieces: Iterator[Told]) -> Answer:
    started = time.perf_counter()
    text, first, last, told = "", None, started, Told("", 0, 0)
    first_tokens = 0
    for told in pieces:
        last = time.perf_counter()
        text += told.text
        if first is None and told.tokens:
            first, first_tokens = last, told.tokens
    first = last if first is None else first
    return Answer(text, told.prompt_tokens, told.tokens, first_tokens, first - started, last - first)


def open_own(model: str) -> Ask:
    """With the drafter in its folder, if there is one, as it is used."""
    loaded, processor = load(model)

    def ask(question: str, max_tokens: int) -> Iterator[Told]:
        prompt, tokens = processor([{"role": "user", "content": question}]), 0
        for piece in stream_generate(loaded, processor, prompt, max_tokens=max_tokens, sampling=GREEDY):
            tokens += len(piece.token_ids)
            yield Told(piece.text, tokens, len(prompt))

    return ask


def open_mlx_lm(model: str) -> Ask:
    import mlx_lm  # here: it takes seconds, and need not be installed

    loaded, tokenizer = mlx_lm.load(model)[:2]

    def ask(question: str, max_tokens: int) -> Iterator[Told]:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        for said in mlx_lm.stream_generate(loaded, tokenizer, prompt, max_tokens=max_tokens):
            yield Told(said.text, said.generation_tokens, said.prompt_tokens)

    return ask


def open_mlx_vlm(model: str) -> Ask:
    import mlx_vlm
    from mlx_vlm.prompt_utils import apply_chat_template

    loaded, processor = mlx_vlm.load(model)

    def ask(question: str, max_tokens: int) -> Iterator[Told]:
        prompt = apply_chat_template(processor, loaded.config, question, enable_thinking=False)
        for said in mlx_vlm.stream_generate(loaded, processor, prompt, max_tokens=max_tokens, temperature=0.0):
            yield Told(said.text, said.generation_tokens, said.prompt_tokens)

    return ask


ENGINES: dict[str, Callable[[str], Ask]] = {OWN: open_own, "mlx-lm": open_mlx_lm, "mlx-vlm": open_mlx_vlm}


# --- what was found ----------------------------------------------------------------------------


def summary(turns: list[Turn]) -> dict[str, Any]:
    speeds = [speed_of(own.answers) for own in turns]
    return {
        "load_s": round(median(own.load_s for own in turns), 2),
        "prompt_tokens": turns[0].long.prompt_tokens,
        "prompt_tps": round(median(own.long.prompt_tokens / own.long.first_s for own in turns), 1),
        "first_token_s": round(median(own.long.first_s for own in turns), 4),
        "question_first_token_s": round(
            median(chain.from_iterable([answer.first_s for answer in own.answers] for own in turns)), 4
        ),
        "generation_tokens": sum(answer.tokens for answer in turns[0].answers),
        "generation_tps": round(median(speeds), 2),
        "generation_tps_lowest": round(min(speeds), 2),
        "generation_tps_highest": round(max(speeds), 2),
        "peak_memory_bytes": max(own.peak_memory for own in turns),
    }


def speed_of(answers: list[Answer]) -> float:
    """Tokens/s of all together, but for what came with the first; 0 if there is no more."""
    seconds = sum(answer.rest_s for answer in answers)
    return sum(answer.tokens - answer.first_tokens for answer in answers) / seconds if seconds else 0.0


def markdown(rows: list[dict[str, Any]], answers: list[dict[str, Any]], max_tokens: int, repeats: int) -> Iterator[str]:
    yield f"Greedy, up to {max_tokens} tokens an answer, medians of {repeats} processes each, taking turns."
    yield ""
    yield from table(
        [
            "engine",
            "model",
            "load",
            "prompt tokens/s",
            "first token",
            "to a question",
            "tokens/s (range)",
            "peak memory",
        ],
        [[f"{row['engine']} {row.get('version', '')}".strip(), row["model"], *speeds(row)] for row in rows],
    )
    yield from table(
        ["question", *(f"{row['engine']}: {Path(row['model']).name}" for row in rows)],
        [[one_cell(own["question"]), *map(one_cell, own["answers"])] for own in answers],
    )


def speeds(row: dict[str, Any]) -> list[str]:
    """Of what was not measured, why."""
    if "missing" in row:
        return [row["missing"], *["–"] * 5]
    return [
        f"{row['load_s']:.1f} s",
        f"{row['prompt_tps']:.0f} of {row['prompt_tokens']}",
        f"{row['first_token_s']:.2f} s",
        f"{row['question_first_token_s']:.2f} s",
        f"{row['generation_tps']:.1f} ({row['generation_tps_lowest']:.1f}–{row['generation_tps_highest']:.1f})",
        size_text(row["peak_memory_bytes"]),
    ]


def one_cell(text: str | None) -> str:
    return "–" if text is None else "<br>".join(text.strip().splitlines())


if __name__ == "__main__":
    run_script(main)
