"""The family side by side: this model, and others of it by mlx-lm or mlx-vlm: speed, memory, and answers.

    pip install mlx-lm mlx-vlm
    python benchmarks/family.py --model FOLDER --beside mlx-lm=E4B --beside mlx-vlm=26B-A4B --questions FILE.jsonl

Each loads its model in a process of its own, taking turns `--repeats` times (engines.py). One that is not installed, or
fails, says so in its row. Standard output is Markdown, its last line JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from conversation import text_of
from decode import machine, machine_line, run_script
from engines import OWN, Member, in_turns, member_of, summary
from report import table

from mlx_gemma4.config import read_config
from mlx_gemma4.evaluate.command import BUILT_IN
from mlx_gemma4.prompt.messages import json_lines
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.terminal import size_text
from mlx_gemma4.weights.load import find_folder

BUILT_IN_QUESTIONS = 6  # of evaluate's exchanges, where there are none of the user's


def main(
    model: Annotated[str, typer.Option(help="This model: a folder, a hub id, or demo.")],
    beside: Annotated[
        list[str] | None, typer.Option(help="mlx-lm=MODEL, mlx-vlm=MODEL or ollama=MODEL; repeatable.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help='JSON lines of {"question": TEXT}; without, six of mlx_gemma4.evaluate\'s.')
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt whose reading is timed, about.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each engine.")] = 3,
) -> None:
    """Tables of speed, memory and answers."""
    members = [Member(OWN, model), *map(member_of, beside or [])]
    asked = read_questions(questions)
    folder = find_folder(model)
    processor = load_processor(folder, read_config(folder))
    long = text_of(processor, prompt_tokens, 0)
    turns = in_turns(members, long, asked, max_tokens, repeats)
    rows = [
        asdict(member) | ({"missing": own} if isinstance(own, str) else {"version": member.version} | summary(own))
        for member, own in zip(members, turns, strict=True)
    ]
    answers = [
        {"question": question, "answers": [
            None if isinstance(own, str) else processor.parse_response(own[0].answers[number].text)["content"]
            for own in turns
        ]}
        for number, question in enumerate(asked)
    ]  # fmt: skip
    found = machine()
    print("\n".join([machine_line(found), "", *markdown(rows, answers, max_tokens, repeats)]))
    head = {"benchmark": "family", "machine": found, "max_tokens": max_tokens, "repeats": repeats}
    print(json.dumps(head | {"results": rows, "answers": answers}))


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


# --- what was found ----------------------------------------------------------------------------


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
        "–" if row["peak_memory_bytes"] is None else size_text(row["peak_memory_bytes"]),
    ]


def one_cell(text: str | None) -> str:
    return "–" if text is None else "<br>".join(text.strip().splitlines())


if __name__ == "__main__":
    run_script(main)
