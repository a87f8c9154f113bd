"""Items → rows of tokens for training.

A passage is one medium and questions, each of which sees the medium and itself alone: the medium is paid for once.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from mlx_gemma4.evaluate.quality import answer_ids
from mlx_gemma4.model.embed import LAYER_NORM_EPS
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import SoftTokens
from mlx_gemma4.prompt.template import render
from training.items import Item, Question

MARK = "\ue000"
THOUGHTS = {
    "image": "I look at the picture.",
    "audio": "I listen to the sound.",
    "video": "I look at the video.",
    "both": "I look and listen.",
}
HINTS, HINT_WEIGHT = 20, 0.5  # soft tokens of a run that are taught, and how much, against 1 for a token of an answer
NEAR = 0.3  # of a patch: so far beside a shape it still counts
HIDDEN = -1e4  # added to the scores of keys that are not seen


@dataclass(frozen=True)
class Segment:
    ids: list[int]
    answer: int  # index in ids of the first token that is learnt


@dataclass(frozen=True)
class Passage:
    """What is read once, and the questions after it; positions start at 0."""

    prefix: list[int]
    media: tuple[SoftTokens, ...]
    segments: list[Segment]
    hints: list[tuple[int, int]] = field(default_factory=list)  # index in prefix of a soft token, what it says there

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(s.ids) for s in self.segments)


def passage(processor: Processor, item: Item, rng: random.Random, room: int) -> Passage:
    """An item as tokens, with as many of its questions as fit in `room` tokens, one at least."""
    if item.group in ("text", "story", "unknown", "tool"):
        return text_passage(processor, item.questions, rng.random() < 0.2, room)
    thinking = rng.random() < 0.06
    parts = [{"type": part["type"], part["type"]: ""} for part in item.media]
    shown = [{"role": "user", "content": [*parts, {"type": "text", "text": MARK}]}]
    before, after = render(processor.template, shown, [], thinking, processor.bos_token).split(MARK)
    loaded = [(part["type"], processor.read(part, processor.settings.image_budget)) for part in item.media]
    head = processor.assemble(before, MARK, loaded)
    segments: list[Segment] = []
    used = len(head)
    for question in item.questions:
        thought = question.thought or THOUGHTS[item.group]
        segment = continuation(
            processor, question.text + after, reply_text(question.answer, thought if thinking else None)
        )
        if used + len(segment.ids) > room and segments:
            break
        segments.append(segment)
        used += len(segment.ids)
    return Passage(head.token_ids, head.media, segments, hinted(processor, item, head.media, rng))


def text_passage(processor: Processor, questions: Sequence[Question], thinking: bool, room: int) -> Passage:
    """Questions without media; what their prompts have in common, such as declared tools, is read once."""
    asked = [text_ids(processor, question, thinking) for question in questions]
    prompts = (ids[: start - 1] for ids, start in asked)
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    common = sum(1 for _ in same) if len(asked) > 1 else 0
    segments: list[Segment] = []
    used = common
    for ids, start in asked:
        if segments and used + len(ids) - common > room:
            break
        segments.append(Segment(ids[common:], start - common))
        used += len(ids) - common
    return Passage(asked[0][0][:common], (), segments)


def hinted(processor: Processor, item: Item, runs: Sequence[SoftTokens], rng: random.Random) -> list[tuple[int, int]]:
    """Some soft tokens of each run and what they are to say."""
    found: list[tuple[int, int]] = []
    tokens = {word: encode(processor, f" {word}")[-1] for hint in item.hints for word in hint.words}
    for number, run in enumerate(runs):
        n = len(run)
        if run.positions is None:
            places, size = [(i, 0) for i in range(n)], (n, 1)
        else:
            places = [(int(x), int(y)) for x, y in run.positions]
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


def reply_text(answer: str, thought: str | None) -> str:
    return f"{answer}<turn|>" if thought is None else f"<|channel>thought\n{thought}\n<channel|>{answer}<turn|>"


def encode(processor: Processor, text: str) -> list[int]:
    return processor.assemble(text, MARK, []).token_ids


def continuation(processor: Processor, asked: str, reply: str) -> Segment:
    ids = encode(processor, asked)
    return Segment(ids + encode(processor, reply), len(ids))


def messages_of(question: Question) -> list[dict[str, Any]]:
    """The chat up to where the model is to go on."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    if question.response is not None:
        assert question.call is not None
        call = {"id": "call_1", "type": "function", "function": question.call}
        content = json.dumps(question.response)
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": "call_1", "name": question.call["name"], "content": content})
    return messages


def text_ids(processor: Processor, question: Question, thinking: bool) -> tuple[list[int], int]:
    """A question without media as tokens, and where its reply begins."""
    tools = list(question.tools)
    messages = messages_of(question)
    ids = processor(messages, tools, thinking).token_ids
    if question.call is not None and question.response is None:
        call = {"id": "call_1", "type": "function", "function": question.call}
        reply = answer_ids(processor, [*messages, {"role": "assistant", "content": "", "tool_calls": [call]}], tools)
        thought = encode(processor, f"<|channel>thought\n{question.thought}\n<channel|>") if thinking else []
        return ids + thought + reply, len(ids)
    if thinking and question.response is not None:  # the template has begun the thought
        text = f"{question.thought}\n<channel|>{question.answer}<turn|>"
    else:
        text = reply_text(question.answer, question.thought if thinking else None)
    return ids + encode(processor, text), len(ids)


@dataclass(frozen=True)
class Batch:
    """Rows of T tokens, padded. B rows, N learnt tokens, P patches, F frames of sound."""

    ids: np.ndarray  # [B, T] int32
    positions: np.ndarray  # [B, T] int32
    full: np.ndarray  # [B, T, T] float32, added to scores
    sliding: np.ndarray  # [B, T, T] float32
    soft: np.ndarray  # [B, T] int32: 0 for a token of text, else 1 + its row in (patches, frames)
    patches: np.ndarray  # [P, side * side * 3] float32, past the first norm
    places: np.ndarray  # [P, 2] int32
    frames: np.ndarray  # [F, samples] float32
    learnt: np.ndarray  # [N] int32: indices into the B * T positions whose next token is learnt
    targets: np.ndarray  # [N] int32
    weights: np.ndarray  # [N] float32: 1 for a token of an answer, HINT_WEIGHT for a hint, 0 for padding

    @property
    def answers(self) -> np.ndarray:
        """Which of the learnt tokens are of answers, [N] bool."""
        return self.weights == 1


def normed(pixels: np.ndarray) -> np.ndarray:
    """What the model's first norm makes of patches, [P, n] uint8 -> [P, n] float32: mean 0, variance 1."""
    x = pixels.astype(np.float32)
    x -= pixels.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    variance = np.einsum("pn,pn->p", x, x)[:, None] / (255**2 * x.shape[1])
    x *= 1 / (255 * np.sqrt(variance + LAYER_NORM_EPS))
    return x


def batch(rows: Sequence[Sequence[Passage]], length: int, patch: int, frame: int, multiple: int = 1) -> Batch:
    """Rows of passages → arrays; a passage sees only itself, a question only its own passage's prefix and itself.

    P, F and N are padded to a multiple, for fewer shapes to compile for.
    """
    count = len(rows)
    ids, positions = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    passages, segments = np.full((count, length), -1, np.int32), np.zeros((count, length), np.int32)
    blocks, soft = np.full((count, length), -1, np.int32), np.zeros((count, length), np.int32)
    images: list[SoftTokens] = []
    image_at: list[tuple[int, int]] = []
    sounds: list[SoftTokens] = []
    sound_at: list[tuple[int, int]] = []
    learnt: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for r, row in enumerate(rows):
        at = 0
        for number, one in enumerate(row):
            start, head = at, len(one.prefix)
            ids[r, at : at + head] = one.prefix
            positions[r, at : at + head] = np.arange(head)
            passages[r, at : at + len(one)] = number
            for run in one.media:
                (image_at if run.positions is not None else sound_at).append((r, start + run.start))
                (images if run.positions is not None else sounds).append(run)
                if run.positions is not None:
                    blocks[r, start + run.start : start + run.start + len(run)] = len(images)
            for place, token in one.hints:
                learnt.append(r * length + at + place)
                targets.append(token)
                weights.append(HINT_WEIGHT)
            at += head
            for index, segment in enumerate(one.segments, 1):
                n = len(segment.ids)
                ids[r, at : at + n] = segment.ids
                positions[r, at : at + n] = head + np.arange(n)
                segments[r, at : at + n] = index
                for i in range(segment.answer, n):
                    learnt.append(r * length + at + i - 1)
                    targets.append(segment.ids[i])
                    weights.append(1.0)
                at += n
        assert at <= length, f"a row has {at} tokens; it holds {length}"
    next_row = 1
    for runs, places in ((images, image_at), (sounds, sound_at)):
        for run, (r, start) in zip(runs, places, strict=True):
            soft[r, start : start + len(run)] = np.arange(next_row, next_row + len(run))
            next_row += len(run)
    q, k = np.s_[:, :, None], np.s_[:, None, :]
    order = np.arange(length)
    causal = order[:, None] >= order[None, :]
    together = (passages[q] == passages[k]) & ((segments[k] == 0) | (segments[q] == segments[k]))
    block = (blocks[q] == blocks[k]) & (blocks[q] >= 0)
    full = np.where(causal & together, np.float32(0), np.float32(HIDDEN))
    sliding = np.where((causal & together) | block, np.float32(0), np.float32(HIDDEN))

    def padded(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.zeros((-len(values) % multiple, *values.shape[1:]), values.dtype)])

    pixels = np.concatenate([np.zeros((0, patch * patch * 3), np.uint8), *(run.values for run in images)])
    columns_rows = [run.positions for run in images if run.positions is not None]
    frames = np.concatenate([np.zeros((0, frame), np.float32), *(run.values for run in sounds)])
    return Batch(
        ids, positions, full, sliding, np.where(soft > len(pixels), soft + -len(pixels) % multiple, soft),
        normed(padded(pixels)), padded(np.concatenate([np.zeros((0, 2), np.int32), *columns_rows])), padded(frames),
        padded(np.array(learnt, np.int32)), padded(np.array(targets, np.int32)),
        padded(np.array(weights, np.float32)),
    )  # fmt: skip
