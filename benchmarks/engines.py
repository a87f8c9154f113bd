"""Engines asked alike: this one, mlx-lm, mlx-vlm and Ollama, timed from a question to the last piece of its answer.

Each loads its model in a process of its own, one after the other and several times over, so that none has less memory
for the others and all see the same machine. All are greedy, with their own template, and do not think.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

import mlx.core as mx
from conversation import GREEDY
from quantizations import apart

from mlx_gemma4 import load, stream_generate
from mlx_gemma4.errors import shown, unbroken

OWN, OLLAMA = "mlx_gemma4", "ollama"
OLLAMA_URL = "http://127.0.0.1:11434/api/chat"
PATIENCE = 600  # seconds for an answer of Ollama's


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
    peak_memory: int | None  # bytes, with the weights; None where another process has them


@dataclass(frozen=True)
class Member:
    """An engine with a model."""

    engine: str
    model: str

    @property
    def version(self) -> str | None:
        """None: it is not installed."""
        if self.engine == OLLAMA:
            if shutil.which(OLLAMA) is None:
                return None
            told = subprocess.run([OLLAMA, "--version"], capture_output=True, text=True).stdout.split()
            return told[-1] if told else ""
        return version(self.engine) if find_spec(self.engine.replace("-", "_")) is not None else None


Ask = Callable[[str, int], Iterator[Told]]


def member_of(named: str) -> Member:
    """ENGINE=MODEL."""
    engine, _, model = named.partition("=")
    if engine not in ENGINES or engine == OWN or not model:
        others = " or ".join(f"{name}=MODEL" for name in ENGINES if name != OWN)
        raise ValueError(f"beside is {shown(named)}; expected {others}")
    return Member(engine, model)


def in_turns(
    members: Sequence[Member], long: str, questions: list[str], max_tokens: int, repeats: int
) -> list[list[Turn] | str]:
    """What each has found, or why it has not. long: a prompt whose reading is timed."""
    found: list[list[Turn]] = [[] for _ in members]
    missing = {index: "not installed" for index, member in enumerate(members) if member.version is None}
    for _ in range(repeats):
        for index, member in enumerate(members):
            if index in missing:
                continue
            try:
                found[index].append(apart(turn, member, long, questions, max_tokens))
            except Exception as error:  # an engine of others may raise anything: its row says so
                if member.engine == OWN:
                    raise
                missing[index] = f"{type(error).__name__}: {unbroken(error)}"
    return [missing.get(index, own) for index, own in enumerate(found)]


def summary(turns: list[Turn]) -> dict[str, Any]:
    speeds = [speed_of(own.answers) for own in turns]
    peaks = [own.peak_memory for own in turns if own.peak_memory is not None]
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
        "peak_memory_bytes": max(peaks) if peaks else None,
    }


def speed_of(answers: list[Answer]) -> float:
    """Tokens/s of all together, but for what came with the first; 0 if there is no more."""
    seconds = sum(answer.rest_s for answer in answers)
    return sum(answer.tokens - answer.first_tokens for answer in answers) / seconds if seconds else 0.0


# --- in a process of its own -------------------------------------------------------------------


def turn(member: Member, long: str, questions: list[str], max_tokens: int) -> Turn:
    started = time.perf_counter()
    ask = ENGINES[member.engine](member.model)
    load_s = time.perf_counter() - started
    timed(ask(questions[0], max_tokens))  # compiles and warms up
    read, answers = timed(ask(long, 2)), [timed(ask(question, max_tokens)) for question in questions]
    return Turn(load_s, read, answers, None if member.engine == OLLAMA else mx.get_peak_memory())


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
        for piece in stream_generate(
            loaded, processor, prompt, max_tokens=max_tokens, sampling=GREEDY, repetition_detection="off"
        ):
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


def open_ollama(model: str) -> Ask:
    """Its server is asked, which must run and have the model."""

    def ask(question: str, max_tokens: int) -> Iterator[Told]:
        body = {
            "model": model, "messages": [{"role": "user", "content": question}], "stream": True, "think": False,
            "options": {"temperature": 0, "num_predict": max_tokens},
        }  # fmt: skip
        tokens = 0
        with urlopen(Request(OLLAMA_URL, json.dumps(body).encode()), timeout=PATIENCE) as answered:
            for line in answered:
                said = json.loads(line)
                if "error" in said:
                    raise RuntimeError(said["error"])
                # a line is about a token, and the last one has counted
                tokens = said.get("eval_count", tokens + bool(said["message"]["content"]))
                yield Told(said["message"]["content"], tokens, said.get("prompt_eval_count", 0))

    return ask


ENGINES: dict[str, Callable[[str], Ask]] = {
    OWN: open_own, "mlx-lm": open_mlx_lm, "mlx-vlm": open_mlx_vlm, OLLAMA: open_ollama,
}  # fmt: skip
