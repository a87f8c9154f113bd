"""What the model reads: token ids, and the media behind their runs of soft tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_gemma4.config import ModelConfig
from mlx_gemma4.errors import article


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """One unbroken run of n soft tokens in a prompt: an image, a frame of a video, or a sound."""

    kind: str  # "image" | "video" | "audio"
    start: int  # index of its first token in token_ids
    values: np.ndarray  # image and video: [n, side * side * 3] uint8 pixels; audio: [n, samples_per_token] float32
    positions: np.ndarray | None = None  # image and video: [n, 2] int32 (x, y)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Prompt:
    """What the model reads. `Prompt(token_ids=[…])` is a text prompt as it stands; ids may be numpy's integers.

    Raises ValueError if there are no ids, or one is no integer or negative.
    """

    token_ids: list[int]
    media: tuple[SoftTokens, ...] = ()  # in the order of their tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", check_ids(self.token_ids))
        object.__setattr__(self, "media", tuple(self.media))

    def __len__(self) -> int:
        return len(self.token_ids)


def check_ids(ids: Any) -> list[int]:
    if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes, dict)):
        raise ValueError(f"token_ids is {article(type(ids).__name__)}; expected a list of integers")
    checked = []
    for index, token in enumerate(ids):
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool) or token < 0:
            raise ValueError(f"token_ids[{index}] is {token!r}; expected an integer of at least 0")
        checked.append(int(token))
    if not checked:
        raise ValueError("token_ids is empty; expected at least one token")
    return checked


def check_length(prompt: Prompt, config: ModelConfig) -> None:
    """ValueError if the model cannot take a prompt: no room is left for a reply, or an id is beyond the vocabulary."""
    limit = config.text.max_position_embeddings
    if len(prompt) >= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the context holds {limit}, the reply included")
    check_vocabulary(prompt, config)


def check_vocabulary(prompt: Prompt, config: ModelConfig) -> None:
    """ValueError for an id beyond the vocabulary: MLX would read whatever lies behind the table."""
    if (largest := max(prompt.token_ids)) >= config.text.vocab_size:
        raise ValueError(f"the prompt has the token id {largest}; the vocabulary has {config.text.vocab_size}")
