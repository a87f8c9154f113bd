"""Items → rows of tokens, as the package's own `tune` has them.

A passage is one medium and questions, each of which sees the medium and itself alone: the medium is paid for once.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gemma4.prompt.messages import Part
from mlx_gemma4.prompt.processor import Loaded, Processor
from mlx_gemma4.tune.data import Example
from mlx_gemma4.tune.rows import Branch, Passage, Row, branches, packed, row
from mlx_gemma4.tune.rows import passage as joined
from training.items import Item, Question

THOUGHTS = {
    "image": "I look at the picture.",
    "audio": "I listen to the sound.",
    "video": "I look at the video.",
    "both": "I look and listen.",
}
THINKING = {True: 0.06, False: 0.2}  # how often, with media and without
HINTS, HINT_WEIGHT = 20, 0.5  # soft tokens of a run that are taught, and how much, against 1 for a token of an answer
NEAR = 0.3  # of a patch: so far beside a shape it still counts
NOTHING = Question("nothing", "", "-")  # asked of media that stand alone: neither is in the passage


def reader(processor: Processor) -> Callable[[Part], list[Loaded]]:
    return partial(processor.read, image_budget=processor.settings.image_budget)


def passage(processor: Processor, item: Item, rng: random.Random, room: int) -> Passage:
    """An item as tokens, with as many of its questions as fit in `room` tokens, one at least; media may have none."""
    thinking = rng.random() < THINKING[bool(item.media)]
    found: list[Branch] = []
    made: Passage | None = None
    for question in item.questions or (NOTHING,):
        (branch,), media = branches(processor, example(item, question, thinking), processor.settings.image_budget)
        if question is NOTHING:
            end = max(run.start + run.count for run in branch.runs)
            branch = Branch(branch.ids[:end], end, branch.runs)
        more = joined(item.group, [*found, branch], media)
        if made is not None and len(more) > room:
            break
        found.append(branch)
        made = more
    assert made is not None
    places, said = np.array(hinted(processor, item, made, rng), np.int32).reshape(-1, 2).T
    return replace(made, places=np.concatenate([places, made.places]), targets=np.concatenate([said, made.targets]))


def example(item: Item, question: Question, thinking: bool) -> Example:
    """The chat in which a question is answered."""
    if item.media:
        messages = [{"role": "user", "content": [*item.media, {"type": "text", "text": question.text}]}]
    else:
        messages = messages_of(question)
    reply: dict[str, Any] = {"role": "assistant", "content": question.answer}
    if question.call is not None and question.response is None:
        reply = {"role": "assistant", "content": "", "tool_calls": [call_of(question)]}
    thought = question.thought or THOUGHTS.get(item.group)
    if thinking and thought is not None:
        reply["reasoning"] = thought
    weights = [False] * len(messages) + [True]
    return Example(item.group, Path(), [*messages, reply], list(question.tools) or None, weights)


def call_of(question: Question) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": question.call}


def messages_of(question: Question) -> list[dict[str, Any]]:
    """The chat up to where the model is to go on."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    if question.response is not None:
        assert question.call is not None
        content = json.dumps(question.response)
        messages.append({"role": "assistant", "content": "", "tool_calls": [call_of(question)]})
        messages.append({"role": "tool", "tool_call_id": "call_1", "name": question.call["name"], "content": content})
    return messages


def hinted(processor: Processor, item: Item, made: Passage, rng: random.Random) -> list[tuple[int, int]]:
    """Some soft tokens of each run, by their place, and what they are to say."""
    found: list[tuple[int, int]] = []
    tokens = {
        word: processor.tokenizer.encode(f" {word}", add_special_tokens=False).ids[-1]
        for hint in item.hints
        for word in hint.words
    }
    loaded = [reader(processor)(part) for part in made.media]
    for number, run in enumerate(made.runs):
        n, positions = run.count, loaded[run.part][run.number].positions
        if positions is None:
            places, size = [(i, 0) for i in range(n)], (n, 1)
        else:
            places = [(int(x), int(y)) for x, y in positions]
            size = (max(x for x, _ in places) + 1, max(y for _, y in places) + 1)
        said: dict[int, list[str]] = {}
        for hint in item.hints:
            if hint.run == number:
                left, top, right, bottom = hint.box
                for i, (column, row) in enumerate(places):
                    x, y = (column + 0.5) / size[0], (row + 0.5) / size[1]
                    across, down = NEAR / size[0], NEAR / size[1]
                    if left - across <= x <= right + across and top - down <= y <= bottom + down:
                        said.setdefault(i, []).extend(hint.words)
        for i in rng.sample(sorted(said), min(len(said), HINTS)):
            found += [(run.start + i, tokens[word]) for word in said[i]]
    return found


def rows(processor: Processor, members: Sequence[Passage], room: int) -> list[Row]:
    """As few rows as hold them, of at most `room` tokens each. What soft tokens say counts less than what is said."""
    found = packed([len(one) for one in members], room)
    window = processor.config.text.sliding_window
    made = [row([members[index] for index in own], window, reader(processor)) for own in found]
    return [replace(one, weights=np.where(of_hints(one), HINT_WEIGHT, 1).astype(np.float32)) for one in made]


def of_hints(one: Row) -> np.ndarray:
    """[N] bool: which of the learnt tokens are said by soft tokens."""
    return one.soft[one.places] > 0


def answers_alone(one: Row) -> Row:
    """The same without hints."""
    kept = ~of_hints(one)
    return replace(
        one, places=one.places[kept], targets=one.targets[kept], owners=one.owners[kept], weights=one.weights[kept]
    )
