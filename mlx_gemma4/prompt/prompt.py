"""What the model reads: token ids, and the media behind their runs of soft tokens."""

from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np

from mlx_gemma4.config import ModelConfig, VisionConfig
from mlx_gemma4.errors import TooLongError, a, shown
from mlx_gemma4.prompt.messages import check_string, check_tools

LONGEST = 2**20  # ids of what may never end; above any context


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

    Raises ValueError if there are no ids, if one is no integer or negative, and for other fields of another type. What
    hangs on the model (its vocabulary, its context, the shape of its media) is checked by who takes the prompt.
    """

    token_ids: list[int]
    media: tuple[SoftTokens, ...] = ()  # in the order of their tokens
    notes: tuple[str, ...] = ()  # what its user should know of how it was made, a line each: in its reply's notes
    begun: str = ""  # the reply's beginning, which its end holds
    tools: tuple[dict[str, Any], ...] = ()  # that it declares, as they were given: a reply's calls are read by them

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", check_ids(self.token_ids))
        object.__setattr__(self, "media", check_runs(self.media))
        object.__setattr__(self, "notes", check_notes(self.notes))
        object.__setattr__(self, "tools", tuple(check_tools(self.tools)))
        check_string(self.begun, "begun")

    def __len__(self) -> int:
        return len(self.token_ids)


def check_ids(ids: Any) -> list[int]:
    unfit = isinstance(ids, (str, bytes, bytearray, dict, set, frozenset))
    try:
        numbers = iter(() if unfit else ids)
    except TypeError:  # an array of no dimension too, though it says that it can be iterated
        unfit = True
    if unfit:
        raise ValueError(f"token_ids is {a(ids)}; expected a list of integers")
    checked = []
    # a list is as long as it is: that a context holds less of it is told by who knows the context
    for index, token in enumerate(numbers if isinstance(ids, list) else islice(numbers, LONGEST + 1)):
        if not is_whole(token) or token < 0:
            raise ValueError(f"token_ids[{index}] is {shown(token)}; expected an integer of at least 0")
        checked.append(int(token))
    if not checked:
        raise ValueError("token_ids is empty; expected at least one token")
    if len(checked) > LONGEST and not isinstance(ids, list):
        raise ValueError(f"token_ids has more than {LONGEST} tokens; expected no more than the context holds")
    return checked


def check_runs(media: Any) -> tuple[SoftTokens, ...]:
    if not isinstance(media, (list, tuple)):
        raise ValueError(f"media is {a(media)}; expected a tuple of SoftTokens")
    for index, run in enumerate(media):
        if not isinstance(run, SoftTokens):
            raise ValueError(f"media[{index}] is {a(run)}; expected SoftTokens(kind, start, values, positions)")
    return tuple(media)


def check_notes(notes: Any) -> tuple[str, ...]:
    if not isinstance(notes, (list, tuple)):
        raise ValueError(f"notes is {a(notes)}; expected a tuple of strings")
    return tuple(check_string(note, f"notes[{index}]") for index, note in enumerate(notes))


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_length(prompt: Prompt, config: ModelConfig) -> None:
    """ValueError if the model cannot take a prompt, or if no room is left for a reply."""
    limit = config.text.max_position_embeddings
    if isinstance(prompt, Prompt) and len(prompt) >= limit:
        raise TooLongError(len(prompt), limit)
    check_prompt(prompt, config)


def check_prompt(prompt: Prompt, config: ModelConfig) -> None:
    """ValueError if the model cannot take a prompt: MLX would read whatever lies behind its tables."""
    if not isinstance(prompt, Prompt):
        raise ValueError(f"the prompt is {a(prompt)}; expected Prompt(token_ids=[…]), or processor(messages)")
    if len(prompt) > config.text.max_position_embeddings:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; the context holds {config.text.max_position_embeddings}"
        )
    if (largest := max(prompt.token_ids)) >= config.text.vocab_size:
        raise ValueError(f"the prompt has the token id {shown(largest)}; the vocabulary has {config.text.vocab_size}")
    end = 0
    for index, run in enumerate(prompt.media):
        check_run(run, f"media[{index}]", prompt, config)
        if run.start < end:
            raise ValueError(f"media[{index}] starts at {run.start}; expected {end} or more, behind the run before it")
        end = run.start + len(run)


def check_run(run: SoftTokens, where: str, prompt: Prompt, config: ModelConfig) -> None:
    """ValueError for a run of soft tokens that the embedders cannot take, or that stands where it has no place."""
    if not isinstance(run.kind, str) or run.kind not in ("image", "video", "audio"):
        raise ValueError(f"{where} has the kind {shown(run.kind)}; expected image, video or audio")
    owner = config.audio if run.kind == "audio" else config.vision
    token = config.special_tokens.get(f"{run.kind}_token_id")
    if owner is None or token is None:
        raise ValueError(f"{where} is of the kind {run.kind}, which this checkpoint does not take")
    vision = isinstance(owner, VisionConfig)
    width = owner.patch_side**2 * 3 if isinstance(owner, VisionConfig) else owner.samples_per_token
    check_array(run.values, f"{where}.values", width, np.dtype(np.uint8 if vision else np.float32))
    if isinstance(owner, VisionConfig):
        check_array(run.positions, f"{where}.positions", 2, np.dtype(np.int32))
        check_positions(run, where, owner.mm_posemb_size)
    elif run.positions is not None:
        raise ValueError(f"{where} is a sound with positions; expected None")
    elif not np.isfinite(run.values).all():
        raise ValueError(f"{where}.values has samples that are NaN or infinite")
    if not is_whole(run.start) or not 0 <= run.start <= len(prompt) - len(run):
        raise ValueError(
            f"{where} has {len(run)} soft tokens and starts at {shown(run.start)}; expected it within the prompt's "
            f"{len(prompt)} tokens"
        )
    inside = prompt.token_ids[run.start : run.start + len(run)]
    wrong = next((index for index, found in enumerate(inside) if found != token), None)
    if wrong is not None:
        place = f"token_ids[{run.start + wrong}], inside of {where},"
        raise ValueError(f"{place} is {inside[wrong]}; expected {token}, the {run.kind} token")


def check_array(array: Any, where: str, width: int, dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{where} is {a(array)}; expected a numpy array [n, {width}] of {dtype}")
    if array.ndim != 2 or array.shape[1] != width or not len(array) or array.dtype != dtype:
        raise ValueError(
            f"{where} has the shape {list(array.shape)} and the type {array.dtype}; expected [n, {width}] of {dtype}"
        )


def check_positions(run: SoftTokens, where: str, size: int) -> None:
    positions = run.positions
    assert positions is not None  # checked before
    if len(positions) != len(run):
        raise ValueError(f"{where} has {len(run)} values and {len(positions)} positions; expected one for each")
    if positions.min() < 0 or positions.max() >= size:
        wrong = positions.min() if positions.min() < 0 else positions.max()
        raise ValueError(f"{where}.positions has {wrong}; expected 0 to {size - 1}")
