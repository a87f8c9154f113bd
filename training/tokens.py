"""The demo's tokenizer: Gemma's control tokens, whole words of its world, and letters for all others."""

import json
import random
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from training import texts, tools
from training.films import film_item
from training.items import Item
from training.pictures import ENDS, NUMBER_ANSWER, SAME_COLOUR, SAME_KIND, SIDES, shapes_item
from training.rows import THOUGHTS
from training.sounds import DIGIT_ANSWER, beeps_item, still_item, tone_item
from training.world import (
    CLAUSE_FRAMES,
    CLOSINGS,
    COLOURS,
    DAYS,
    DIGITS,
    HEROES,
    MEDIA_NAMES,
    MONTHS,
    NAME_FRAMES,
    OPENINGS,
    PLACES,
    POINTERS,
    POLITE,
    SHAPES,
    THINGS,
    WORDINGS,
    plural,
)  # fmt: skip

CONTROL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>",
    48: "<|tool_call>", 49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>',
    98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
MEDIA = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")  # the last ids
TEMPLATE_WORDS = [
    "thought",
    "model",
    "user",
    "system",
    "declaration",
    "call",
    "response",
    "description",
    "parameters",
    "properties",
    "type",
    "required",
    "object",
    "string",
    "integer",
    "value",
    "STRING",
    "INTEGER",
    "NUMBER",
    "BOOLEAN",
    "ARRAY",
    "OBJECT",
    "enum",
    "true",
    "false",
    "null",
    "name",
    "get",
    "set",
    "turn",
    "send",
    "add",
    "play",
    "on",
]


def words_of(text: str) -> list[str]:
    """Words as the tokenizer splits them: with the space before them, written ▁."""
    return re.findall(r"▁?[A-Za-z]+", text.replace(" ", "▁"))


def vocabulary() -> list[str]:
    """Every word of the demo's world, as it stands at the beginning of a text and after a space."""
    found: set[str] = set()
    for text in phrases():
        plain = re.sub(r"\{\w*\}", "0", text)
        for form in (plain, plain[0].lower() + plain[1:]):
            found.update(words_of(form) + words_of(f" {form}"))
    return sorted(word for word in found if len(word.lstrip("▁")) > 1 or word in ("▁a", "▁A", "▁I"))


def phrases() -> Iterator[str]:
    """All that is asked and said in training but made-up words, values that differ each time and held-out wordings."""
    for split in (texts.UNKNOWN, *WORDINGS.values(), *(tool.wordings for tool in tools.TOOLS)):
        yield from (*split.train, *split.clauses, *split.names)
    yield from chain(CLAUSE_FRAMES, NAME_FRAMES, POLITE, *MEDIA_NAMES.values(), *POINTERS.values(), ("in this here",))
    yield from chain(COLOURS, SHAPES, DAYS, MONTHS, DIGITS, HEROES, THINGS, PLACES, TEMPLATE_WORDS, texts.WORDS)
    for kind in SHAPES:
        yield plural(kind)
    yield from ("There", "No")  # a question may begin so
    yield from chain(tools.NAMES.train, tools.PEOPLE.train, tools.ROOMS.train, tools.SKIES)
    yield from chain(OPENINGS, CLOSINGS, texts.OTHER_QUESTIONS, texts.GREETINGS)
    for tool in tools.TOOLS:
        for name in (tool.name, *tool.arguments, *tool.gives):
            yield from (name, f"The {name}.")
        yield from (*tool.descriptions, tool.answer)
    yield from (NUMBER_ANSWER, DIGIT_ANSWER, *THOUGHTS.values())
    yield from chain(*SIDES.values(), *ENDS.values(), SAME_KIND, SAME_COLOUR)
    rng = random.Random(0)
    for make in (shape_answers, beeps_item, tone_item, still_item, film_item, texts.text_item, texts.story_item):
        for _ in range(200):
            for question in make(rng, False).questions:
                if question.task not in ("letters", "spell", "reverse"):
                    yield from filter(None, (question.answer, question.thought))
    for question in (texts.greeting_question(rng), texts.unknown_question(rng)):
        yield from filter(None, (question.answer, question.thought))


def shape_answers(rng: random.Random, held_out: bool) -> Item:
    return shapes_item(rng, held_out)[0]


def media_ids(size: int) -> dict[str, int]:
    """The ids of the media's tokens in a vocabulary of this size."""
    return {token: size - len(MEDIA) + place for place, token in enumerate(MEDIA)}


def make_tokenizer() -> tuple[Tokenizer, int]:
    """The tokenizer and its size, a multiple of 64: unneeded ids are `<unused…>`."""
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + characters + vocabulary()
    fixed = CONTROL | {107: "\n"}
    size = -(-(len(pieces) + len(fixed) + len(MEDIA)) // 64) * 64
    fixed |= {place: token for token, place in media_ids(size).items()}
    rest = iter(pieces)
    vocab = {fixed[n] if n in fixed else next(rest, f"<unused{n}>"): n for n in range(size)}
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "ignore_merges": True}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model | {"vocab": vocab, "merges": []}}))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*CONTROL.values(), *MEDIA)])
    return tokenizer, size


def save_tokenizer(folder: Path) -> int:
    tokenizer, size = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    return size
