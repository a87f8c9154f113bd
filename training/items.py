"""An item: what is shown or played, and the questions asked about it with the answers that are right."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    task: str
    text: str
    answer: str  # as the model writes it after its prompt
    thought: str | None = None  # with thinking on
    tools: tuple[dict[str, Any], ...] = ()
    call: dict[str, Any] | None = None  # {"name", "arguments"}: the reply is this call
    response: dict[str, Any] | None = None  # what the tool gave: `answer` is said after it


@dataclass(frozen=True)
class Hint:
    """What a part of a medium shows. In training the soft tokens there learn to say one of the words."""

    run: int  # of the item's runs of soft tokens, in order: a picture, a frame of a film or a sound each
    box: tuple[float, float, float, float]  # left, top, right, bottom as fractions; of a sound: start, 0, end, 1
    words: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    group: str  # "image" | "audio" | "video" | "both" | "text" | "story" | "tool" | "unknown"
    questions: tuple[Question, ...]
    media: tuple[dict[str, Any], ...] = field(default=())  # parts of a chat message, in front of each question
    hints: tuple[Hint, ...] = ()
