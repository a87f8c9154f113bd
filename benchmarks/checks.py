"""Whether a model reads and writes right on this machine. No reference is needed: it is held against itself.

Rounding differs with the number of rows that are multiplied at once, so that tokens may part where two are all but
equally likely: a reply is right as long as it parts nowhere else.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from conversation import GREEDY, text_of
from decode import without_stops
from PIL import Image, ImageOps

from mlx_gemma4 import Prompt, PromptStore, generate, generate_batch
from mlx_gemma4.config import with_kv_bits
from mlx_gemma4.decoding.controller import MAX_DRAFTS
from mlx_gemma4.evaluate.quality import blocks, log_probabilities
from mlx_gemma4.model.cache import Caches, capacity
from mlx_gemma4.model.model import CHUNK, Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Reply
from mlx_gemma4.weights.load import DEMO

SAMPLES = DEMO / "samples"
ODD_CHUNK = 100  # divides no other: its borders lie elsewhere
SINGLE = 32  # tokens read one by one, behind all others
READ_KL, CACHE_KL = 0.01, 0.02  # nats, the mean of all positions
CLOSE, CLOSE_FLOAT32 = 0.25, 0.01  # nats where replies may part: in bfloat16 two logits of 32 are 0.25 apart
ASKED = (
    "Tell me a story about a fox and a ball.",
    "What is 27 + 45?",
    "Tell me a story about an owl and a drum.",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SUM = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "even": {"type": "boolean"}},
    "required": ["sum", "even"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Subject:
    """What is checked, and how long the prompt and the replies are that it is checked on."""

    model: Model
    processor: Processor
    prompt_tokens: int  # of text; beyond the window of the sliding layers, if that is to be seen
    reply_tokens: int


@dataclass(frozen=True)
class Finding:
    right: bool | None  # None: the model does not have what would be checked
    told: str


@contextmanager
def endless(model: Model) -> Iterator[None]:
    """Within it the model knows no stop tokens: replies have their full length."""
    known = model.config
    model.config = without_stops(known)
    try:
        yield
    finally:
        model.config = known


# --- reading -----------------------------------------------------------------------------------


def mixed_prompt(subject: Subject) -> Prompt:
    """Every kind of soft token that the model takes, and text behind them."""
    config, parts = subject.model.config, []
    if config.vision is not None:
        number = Image.open(SAMPLES / "number.jpg")
        parts += [{"type": "image", "image": number}]
        parts += [{"type": "video", "video": [number, ImageOps.mirror(number)], "fps": 1}]
    if config.audio is not None:
        parts += [{"type": "audio", "audio": SAMPLES / "beeps.wav"}]
    text = text_of(subject.processor, subject.prompt_tokens, 0)
    return subject.processor([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])


def hidden_states(model: Model, prompt: Prompt, caches: Caches, chunk: int, single: int = 0) -> mx.array:
    """Of all positions, [L, hidden]; the last `single` tokens are read one by one."""
    first = Prompt(prompt.token_ids[: len(prompt) - single], prompt.media)
    parts = [*model.read(first, caches, chunk), *model.read(prompt, caches, 1)]
    return mx.concatenate(parts, axis=1)[0]


def divergence(model: Model, one: mx.array, other: mx.array) -> float:
    """The mean KL of the next tokens' distributions, in nats, from hidden states [L, hidden]."""
    total = 0.0
    for rows in blocks(len(one)):
        p, q = log_probabilities(model, one[rows]), log_probabilities(model, other[rows])
        total += float(mx.where(mx.isfinite(p), mx.exp(p) * (p - q), 0).sum())
    return total / len(one)


def reading(subject: Subject) -> Finding:
    """A prompt in one pass, in chunks of two sizes and token by token."""
    model, prompt = subject.model, mixed_prompt(subject)

    def read(chunk: int, single: int = 0) -> mx.array:
        return hidden_states(model, prompt, model.caches(len(prompt)), chunk, single)

    whole = read(len(prompt))
    found = [divergence(model, whole, read(*way)) for way in ((CHUNK,), (ODD_CHUNK,), (ODD_CHUNK, SINGLE))]
    told = f"{len(prompt)} tokens in chunks of {CHUNK} and {ODD_CHUNK}, the last {SINGLE} one by one: KL"
    return Finding(max(found) <= READ_KL, f"{told} {', '.join(f'{kl:.1e}' for kl in found)}; at most {READ_KL}")


def quantized_cache(subject: Subject) -> Finding:
    """What full layers keep, at 8 bits against as it was computed."""
    model, prompt = subject.model, mixed_prompt(subject)
    whole = hidden_states(model, prompt, model.caches(len(prompt)), CHUNK)
    packed = Caches.empty(with_kv_bits(model.config.text, 8), model.language_model.dtype, capacity(len(prompt)))
    kl = divergence(model, whole, hidden_states(model, prompt, packed, CHUNK))
    return Finding(kl <= CACHE_KL, f"{len(prompt)} tokens with caches of 8 bits: KL {kl:.1e}; at most {CACHE_KL}")


# --- replies -----------------------------------------------------------------------------------


def same_replies(subject: Subject, pairs: Sequence[tuple[Reply, Reply]]) -> Finding:
    """Plain replies, which tell the two likeliest at each place, and those that are to be equal."""
    tokens = sum(len(plain.token_ids) for plain, _ in pairs)
    partings = [parting(plain, other) for plain, other in pairs if plain.token_ids != other.token_ids]
    if not partings:
        return Finding(True, f"{len(pairs)} replies, {tokens} tokens: all equal")
    close = CLOSE_FLOAT32 if subject.model.language_model.dtype == mx.float32 else CLOSE
    right = all(apart <= close for apart in partings)
    told = f"{len(partings)} of {len(pairs)} part where the two likeliest are up to {max(partings):.2g} nats apart"
    return Finding(right, f"{told}; at most {close}")


def parting(plain: Reply, other: Reply) -> float:
    """How much less likely the other reply's token is where they part; infinite if it is not one of the two."""
    ids = zip(plain.token_ids, other.token_ids, strict=False)
    place = next((place for place, (own, its) in enumerate(ids) if own != its), None)
    if place is None or plain.logprobs is None:
        return float("inf")
    top = plain.logprobs[place]["top"]
    its = top.get(other.token_ids[place], -float("inf"))
    return float(max(top.values()) - its)


def reply_of(
    subject: Subject, request: str, images: Sequence[Any] = (), drafts: int | str = 0, store: PromptStore | None = None
) -> Reply:
    with endless(subject.model):
        return generate(
            subject.model, subject.processor, request, images, max_tokens=subject.reply_tokens, sampling=GREEDY,
            draft_length=drafts, store=store, logprobs=2, repetition_detection="off",
        )  # fmt: skip


def drafts(subject: Subject) -> Finding:
    """Greedy replies with drafts of several lengths, against plain ones."""
    if subject.model.drafter is None:
        return Finding(None, "there is no drafter")
    plain = {text: reply_of(subject, text) for text in ASKED}
    return same_replies(
        subject,
        [(plain[text], reply_of(subject, text, drafts=length)) for text in ASKED for length in (1, 3, MAX_DRAFTS)],
    )


def batch(subject: Subject) -> Finding:
    """Replies written together, against each alone."""
    plain = [reply_of(subject, text) for text in ASKED]
    with endless(subject.model):
        together = generate_batch(
            subject.model, subject.processor, ASKED, max_tokens=subject.reply_tokens, sampling=GREEDY,
            repetition_detection="off",
        )  # fmt: skip
    return same_replies(subject, [*zip(plain, together, strict=True)])


def store(subject: Subject) -> Finding:
    """Prompts that begin alike, some of them again, against fresh ones; pictures of one size too."""
    kept = PromptStore()
    asked: list[tuple[str, list[Any]]] = [(ASKED[0], []), (ASKED[2], []), (ASKED[0], [])]
    if subject.model.config.vision is not None:
        number = Image.open(SAMPLES / "number.jpg")
        asked += [("What number is this?", [picture]) for picture in (number, ImageOps.mirror(number), number)]
    pairs = [(reply_of(subject, *own), reply_of(subject, *own, store=kept)) for own in asked]
    found = same_replies(subject, pairs)
    hits = [pairs[place][1].stats.cached_tokens for place in range(2, len(pairs), 3)]
    if not all(hits):
        return Finding(False, "a prompt that had been read was read again")
    return Finding(found.right, f"{found.told}; {sum(hits)} tokens not read again")


# --- answers -----------------------------------------------------------------------------------


def answered(subject: Subject, kind: str, name: str, question: str, *expected: str) -> Finding:
    """Whether the answer about a sample has one of these words."""
    parts = [{"type": kind, kind: SAMPLES / name}, {"type": "text", "text": question}]
    reply = generate(
        subject.model, subject.processor, [{"role": "user", "content": parts}], max_tokens=64, sampling=GREEDY
    )
    text = " ".join(reply.text.split())
    right = any(word in text.lower() for word in expected)
    return Finding(right, f"{question} {text!r}; expected {' or '.join(expected)}")


def image(subject: Subject) -> Finding:
    """A number, drawn."""
    if subject.model.config.vision is None:
        return Finding(None, "the model takes no images")
    return answered(subject, "image", "number.jpg", "What number is this?", "97", "ninety-seven")


def audio(subject: Subject) -> Finding:
    """A digit, spoken."""
    if subject.model.config.audio is None:
        return Finding(None, "the model takes no audio")
    return answered(subject, "audio", "digit.mp3", "Which digit is spoken?", "6", "six")


def video(subject: Subject) -> Finding:
    """A shape that moves."""
    if subject.model.config.vision is None:
        return Finding(None, "the model takes no videos")
    return answered(subject, "video", "film.mp4", "Which way does it move?", "left")


def tool_call(subject: Subject) -> Finding:
    """A call that is asked for comes, and parses."""
    reply = generate(
        subject.model, subject.processor, "What is the weather in Paris?", tools=[WEATHER], tool_choice="required",
        max_tokens=128, sampling=GREEDY,
    )  # fmt: skip
    calls = reply.tool_calls
    right = bool(calls) and calls[0]["name"] == "get_weather" and isinstance(calls[0]["arguments"].get("city"), str)
    return Finding(right, json.dumps(calls) if calls else f"no call: {reply.text!r}")


def json_answer(subject: Subject) -> Finding:
    """An answer that is held to a schema parses, and has what it asks for."""
    reply = generate(
        subject.model, subject.processor, "What is 27 + 45, and is it even?", response_format=SUM, max_tokens=128,
        sampling=GREEDY,
    )  # fmt: skip
    try:
        value = json.loads(reply.text)
    except ValueError:
        return Finding(False, f"no JSON: {reply.text!r}")
    right = isinstance(value, dict) and isinstance(value.get("sum"), int) and isinstance(value.get("even"), bool)
    return Finding(right, json.dumps(value))


CHECKS: dict[str, tuple[str, Callable[[Subject], Finding]]] = {
    "reading": ("one pass, chunks and single tokens read alike", reading),
    "drafts": ("drafts change no token", drafts),
    "batch": ("rows of a batch are written as alone", batch),
    "store": ("what the store has read counts as read afresh", store),
    "quantized cache": ("8-bit caches are close", quantized_cache),
    "image": ("a picture is read", image),
    "audio": ("speech is heard", audio),
    "video": ("a film is seen", video),
    "tool call": ("a tool call parses", tool_call),
    "JSON": ("a form is kept to", json_answer),
}


def checked(name: str, subject: Subject) -> Finding:
    """What a check finds; an error is a finding too, of a model that does not run."""
    try:
        return CHECKS[name][1](subject)
    except (ValueError, RuntimeError, MemoryError, ImportError) as error:
        return Finding(False, f"{type(error).__name__}: {error}".splitlines()[0])
