"""Many requests of all kinds at one engine for as long as it takes: nothing grows, hangs or is answered wrongly.

    python -m tests.soak --requests 3000

Eight threads ask a toy model: short and long prompts, pictures and sounds, forms, tools, stops, seeds and logprobs; a
third of the replies are left before their end. Of those that came whole each twentieth is compared with what `generate`
gives alone. Memory and open files are told ten times; the exit status is 1 if they grow.
"""

import gc
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer
from PIL import Image

from mlx_gemma4 import Engine, PromptStore, Sampling, collect, generate, load
from mlx_gemma4.reply.reply import Piece

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_planted
from fuzz.harness import resident
from toy_checkpoint import Shape

WORDS = ("the", "a", "fox", "bear", "runs", "home", "and", "or", "red", "blue", "sees", "sky", "tree", "one", "two")
PLACE = {"type": "object", "properties": {"place": {"type": "string"}, "far": {"type": "boolean"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": PLACE | {"required": ["place"]}}}
ANSWER = {"type": "object", "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}}, "required": ["ok"]}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
THREADS = 8
PARTS = 10


def main(
    requests: Annotated[int, typer.Option(min=PARTS, help="How many are asked.")] = 3000,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
) -> None:
    """Ask them all."""
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(str(write_planted(Path(folder) / "model", Shape(context=8192), 1, 2.2)))
        store = PromptStore(max_bytes=30_000_000)
        sizes: list[tuple[int, int]] = []
        counts: Counter[str] = Counter()
        wrong: list[str] = []
        with Engine(model, processor, THREADS, store) as engine, ThreadPoolExecutor(THREADS) as pool:
            for part in range(PARTS):
                numbers = range(requests * part // PARTS, requests * (part + 1) // PARTS)
                started = time.perf_counter()
                answers = list(pool.map(lambda number: answered(engine, random.Random(f"{seed} {number}")), numbers))
                seconds = time.perf_counter() - started
                counts.update(answer.ended for answer in answers)
                for number, answer in zip(numbers, answers, strict=True):
                    if answer.ended == "failed":
                        wrong.append(f"request {number}: {answer.error}")
                    elif answer.ended == "whole" and number % 20 == 0 and answer.asked["sampling"].temperature == 0:
                        counts["compared"] += 1  # here: each thread that generates keeps rounds of its own
                        if generate(model, processor, answer.words, **answer.asked).token_ids != answer.token_ids:
                            wrong.append(f"request {number}: another reply than alone")
                gc.collect()
                sizes.append((resident(os.getpid()), len(os.listdir("/proc/self/fd"))))
                print(
                    f"{numbers.stop} of {requests}: {len(numbers) / seconds:.1f} a second, "
                    f"{sizes[-1][0] / 1e6:.0f} MB resident, {mx.get_active_memory() / 1e6:.0f} MB of arrays, "
                    f"{sizes[-1][1]} open files, {dict(counts)}", flush=True,
                )  # fmt: skip
    # what is compiled comes and goes: the most of the second half beside the most of the first three parts
    grown = max(size for size, _ in sizes[PARTS // 2 :]) / max(size for size, _ in sizes[:3])
    print(f"{len(wrong)} wrong {wrong[:5]}; resident memory {grown:.2f} times what it was")
    sys.exit(int(bool(wrong) or grown > 1.1 or sizes[-1][1] > sizes[0][1] + 2))


@dataclass(frozen=True)
class Answer:
    """What was asked and what came: "whole", "left" or "failed"."""

    words: str
    asked: dict[str, Any]
    ended: str
    token_ids: list[int] = field(default_factory=list)
    error: str = ""


def answered(engine: Engine, rng: random.Random) -> Answer:
    words, asked = some_words(rng), some_options(rng)
    leaves = rng.random() < 1 / 3
    stream = engine.submit(words, **asked)
    pieces: list[Piece] = []
    try:
        for piece in stream:
            pieces.append(piece)
            if leaves and rng.random() < 0.2:
                stream.close()
                break
    except (ValueError, RuntimeError) as error:
        return Answer(words, asked, "failed", error=str(error))
    if pieces[-1].finish_reason is None:
        return Answer(words, asked, "left")
    return Answer(words, asked, "whole", collect(pieces).token_ids)


def some_words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.choice((3, 20, 100, 400) if rng.random() < 0.3 else (3, 20))))


def some_options(rng: random.Random) -> dict[str, Any]:
    """Keywords of `Engine.submit` and of `generate`."""
    asked: dict[str, Any] = {
        "max_tokens": rng.choice((1, 8, 40)),
        "sampling": Sampling(temperature=0) if rng.random() < 0.6 else Sampling(temperature=1, seed=rng.randrange(99)),
        "draft_length": rng.choice((0, 2, "auto")),
    }
    kind = rng.randrange(8)
    pixels = np.random.default_rng(rng.randrange(20)).integers(0, 255, (96, 144, 3), np.uint8)
    if kind == 0:
        asked["images"] = [Image.fromarray(pixels)]
    elif kind == 1:
        asked["audios"] = [(np.sin(np.arange(8000) / rng.randrange(3, 30)).astype(np.float32), 16000)]
    elif kind == 2:
        asked |= {"response_format": FORM, "max_tokens": 60}
    elif kind == 3:
        asked |= {"tools": [TOOL], "tool_choice": rng.choice(("auto", "required")), "max_tokens": 60}
    elif kind == 4:
        asked |= {"stop": rng.choice(WORDS), "logprobs": 2}
    elif kind == 5:
        asked["thinking"] = True
    return asked


if __name__ == "__main__":
    typer.run(main)
