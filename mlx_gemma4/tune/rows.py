"""Examples -> rows of tokens: what inference reads, and behind it what the model is to say.

Each assistant message is learnt as a reply to what inference would read before it. What such branches begin with in
common stands in a row once: a passage is a tree of tokens, and a token sees those it comes from. Several passages share
a row without seeing each other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_gemma4.errors import FetchError, TooLongError
from mlx_gemma4.model.mask import attention_mask
from mlx_gemma4.prompt.messages import MEDIA, Part
from mlx_gemma4.prompt.processor import Loaded, Processor
from mlx_gemma4.prompt.prompt import Prompt, check_length
from mlx_gemma4.prompt.said import asked_and_said
from mlx_gemma4.prompt.template import check_unicode
from mlx_gemma4.reply.reply import END_OF_TEXT
from mlx_gemma4.tune.data import Example, source_of

MULTIPLE = 64  # of a row's length: kernels are made for few shapes
BARE = 512  # tokens that are gathered in a row, if examples are shorter: a device is busy with so many


@dataclass(frozen=True)
class Run:
    """A run of soft tokens whose values are read when their row's turn comes."""

    start: int
    count: int
    kind: str
    part: int  # of its example's media
    number: int  # of the runs of that part


@dataclass(frozen=True)
class Branch:
    """One reply and all that is read before it."""

    ids: list[int]
    start: int  # index of the first id that is learnt
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True, eq=False)
class Passage:
    """Branches of one example, what they share only once. T tokens in S segments, N learnt."""

    where: str
    ids: np.ndarray  # [T] int32
    positions: np.ndarray  # [T] int32
    segments: np.ndarray  # [T] int32
    before: np.ndarray  # [S, T] bool: which tokens a segment comes from
    places: np.ndarray  # [N] int32: of tokens whose next is learnt
    targets: np.ndarray  # [N] int32
    runs: tuple[Run, ...]
    media: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def seen(self) -> np.ndarray:
        """[T, T] bool: whether a token comes from another, or is it."""
        order, own = np.arange(len(self)), self.segments
        return self.before[own] | ((own[:, None] == own[None, :]) & (order[:, None] >= order[None, :]))


# --- an example to branches --------------------------------------------------------------------


def branches(
    processor: Processor, example: Example, image_budget: int | None = None
) -> tuple[list[Branch], tuple[Part, ...]]:
    """The replies of an example, and its media, all of which are read once to see that they can be.

    ValueError that names the example if it is wrong, or if nothing of it is learnt; TooLongError if it fits no context.
    """
    budget = processor.image_budget(image_budget)
    try:
        if example.text is not None:
            return [text_branch(processor, example.text)], ()
        found, media = replies(processor, example, budget)
    except FetchError as error:
        raise FetchError(f"{example.where}: {error}") from None
    except TooLongError as error:
        raise TooLongError(error.tokens, error.limit, f"{example.where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{example.where}: {error}") from None
    if not found:
        raise ValueError(f"{example.where}: the example has no token to learn; expected an assistant message")
    return found, media


def text_branch(processor: Processor, text: str) -> Branch:
    check_unicode(text)
    ids = processor.ids(text)
    begin, end = processor.control.ids[processor.bos_token], processor.control.ids.get(END_OF_TEXT)
    ids = ids if ids[:1] == [begin] else [begin, *ids]
    if end is not None and ids[-1] not in processor.config.generation.eos_token_ids:
        ids.append(end)
    if placed := next((kind for kind, run in processor.runs.items() if run.token in ids), None):
        raise ValueError(f"text has a place for {placed}; expected media in messages")
    check_length(Prompt(ids), processor.config)
    return Branch(ids, 1)


def replies(processor: Processor, example: Example, budget: int) -> tuple[list[Branch], tuple[Part, ...]]:
    found: list[Branch] = []
    parts: list[Part] = []
    loaded: list[tuple[str, list[Loaded]]] = []
    for index, message in enumerate(example.messages):
        is_reply = isinstance(message, dict) and message.get("role") == "assistant"
        if not is_reply or not example.weights[index]:
            continue
        written, said = asked_and_said(processor, example.messages[: index + 1], example.tools)
        for part in written.media[len(parts) :]:
            kind = part["type"]
            parts.append(part | {kind: source_of(part[kind], example.folder)})
            loaded.append((kind, processor.read(parts[-1], budget)))
        prompt = processor.assemble(written.text, written.mark, loaded[: len(written.media)])
        whole = Prompt([*prompt.token_ids, *said], prompt.media)
        check_length(whole, processor.config)
        numbers = run_numbers(loaded)
        runs = tuple(Run(run.start, len(run), run.kind, *next(numbers[run.kind])) for run in prompt.media)
        found.append(Branch(whole.token_ids, len(prompt), runs))
    return found, tuple(parts)


def run_numbers(loaded: Sequence[tuple[str, list[Loaded]]]) -> dict[str, Iterator[tuple[int, int]]]:
    """(part, number of the run in it) by kind, in the order in which the prompt has them."""
    return {
        kind: iter(
            [(part, n) for part, (own, runs) in enumerate(loaded) if own == kind for n in range(len(runs))]
        )
        for kind in MEDIA
    }  # fmt: skip


# --- branches to passages ----------------------------------------------------------------------


def passages(where: str, found: Sequence[Branch], media: tuple[Part, ...], limit: int) -> list[Passage]:
    """The branches as few passages of at most `limit` tokens; ValueError if one is longer."""
    made: list[Passage] = []
    group: list[Branch] = []
    for branch in found:
        if len(branch.ids) > limit:
            raise ValueError(
                f"{where}: the example has {len(branch.ids)} tokens; expected at most {limit}: a larger "
                "--max-seq-length, or --drop-long"
            )
        if group and len(joined := passage(where, [*group, branch], media)) <= limit:
            group, made[-1] = [*group, branch], joined
        else:
            group = [branch]
            made.append(passage(where, group, media))
    return made


def passage(where: str, found: Sequence[Branch], media: tuple[Part, ...]) -> Passage:
    """Each branch goes along those before it as far as it is the same; behind that it is a segment of its own."""
    places: dict[tuple[int, int, int], int] = {}  # of a token: behind which it stands, its id, its soft token's number
    ids: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    hangs: list[list[int]] = []  # of each segment, the tokens that it comes from
    runs: list[Run] = []
    learnt: dict[tuple[int, int], None] = {}
    for branch in found:
        soft = {
            run.start + n: 1 + run.part * 2**40 + run.number * 2**20 + n
            for run in branch.runs
            for n in range(run.count)
        }
        starts = {run.start: run for run in branch.runs}
        path: list[int] = []
        is_new = False
        for index, token in enumerate(branch.ids):
            last = path[-1] if path else -1
            key = (last, token, soft.get(index, 0))
            place = places.setdefault(key, len(ids))
            if place == len(ids):
                if not is_new:
                    hangs.append(list(path))
                    is_new = True
                ids.append(token)
                positions.append(index)
                segments.append(len(hangs) - 1)
                if index in starts:
                    runs.append(replace(starts[index], start=place))
            path.append(place)
            if index >= branch.start:
                learnt[last, token] = None
    before = np.zeros((len(hangs), len(ids)), bool)
    for segment, path in enumerate(hangs):
        before[segment, path] = True
    at, targets = np.array(list(learnt), np.int32).reshape(-1, 2).T
    own = [np.array(values, np.int32) for values in (ids, positions, segments)]
    return Passage(where, own[0], own[1], own[2], before, at, targets, tuple(runs), media)


def capacity(lengths: Sequence[int], limit: int) -> int:
    """How many tokens a row gathers."""
    return min(limit, max(BARE, *lengths))


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which passages share a row, the longest first, each where there is still room."""
    rows: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for n, (used, row) in enumerate(rows):
            if used + lengths[index] <= room:
                rows[n] = (used + lengths[index], [*row, index])
                break
        else:
            rows.append((lengths[index], [index]))
    return [row for _, row in rows]


# --- passages to a row -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Row:
    """What one pass reads: T places, some of them empty; N learnt tokens; P patches, F frames of sound."""

    where: tuple[str, ...]  # of its passages
    ids: np.ndarray  # [T] int32
    positions: np.ndarray  # [T] int32
    full: np.ndarray  # [T, T] bool: what is seen in full layers
    sliding: np.ndarray  # [T, T] bool: and in sliding ones
    soft: np.ndarray  # [T] int32: 0 for a token of text, else 1 + its row in (patches, frames)
    patches: np.ndarray  # [P, side * side * 3] uint8
    patch_positions: np.ndarray  # [P, 2] int32 (x, y)
    frames: np.ndarray  # [F, samples] float32
    places: np.ndarray  # [N] int32: of tokens whose next is learnt
    targets: np.ndarray  # [N] int32
    owners: np.ndarray  # [N] int32: whose they are, index in `where`
    weights: np.ndarray  # [N] float32: how much they count
    tokens: int  # without the empty places


def row(members: Sequence[Passage], window: int, read: Callable[[Part], list[Loaded]], multiple: int = MULTIPLE) -> Row:
    """Passages side by side. read: a medium's soft tokens. An empty place sees itself alone."""
    tokens = sum(map(len, members))
    length = -(-tokens // multiple) * multiple
    ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    blocks, soft = np.full(length, -1, np.int32), np.zeros(length, np.int32)
    seen = np.eye(length, dtype=bool)
    patches: list[Loaded] = []
    frames: list[Loaded] = []
    placed: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (start, count) of images, and of sounds
    at = 0
    for member in members:
        end = at + len(member)
        ids[at:end], positions[at:end], seen[at:end, at:end] = member.ids, member.positions, member.seen()
        parts = {part: read(member.media[part]) for part in {run.part for run in member.runs}}
        for run in member.runs:
            loaded = parts[run.part][run.number]
            is_image = loaded.positions is not None
            if len(loaded.values) != run.count:
                raise ValueError(f"{member.where}: its {run.kind} has changed since it was looked at")
            (patches if is_image else frames).append(loaded)
            placed[is_image].append((at + run.start, run.count))
            if is_image:
                blocks[at + run.start : at + run.start + run.count] = len(patches)
        at = end
    number = 1
    for start, count in placed[True] + placed[False]:
        soft[start : start + count] = np.arange(number, number + count)
        number += count
    block = (blocks[:, None] == blocks[None, :]) & (blocks[:, None] >= 0)
    at_, of = mx.array(positions)[None], mx.array(blocks)
    law = np.array(attention_mask(at_, at_, window, of, of))[0]  # as inference has it
    starts = np.cumsum([0, *map(len, members)])[:-1]
    return Row(
        where=tuple(member.where for member in members),
        ids=ids,
        positions=positions,
        full=seen,
        sliding=law & (seen | block),
        soft=soft,
        patches=np.concatenate([own.values for own in patches]) if patches else np.zeros((0, 0), np.uint8),
        patch_positions=np.concatenate([own.positions for own in patches if own.positions is not None])
        if patches
        else np.zeros((0, 2), np.int32),
        frames=np.concatenate([own.values for own in frames]) if frames else np.zeros((0, 0), np.float32),
        places=np.concatenate([member.places + start for member, start in zip(members, starts, strict=True)]),
        targets=np.concatenate([member.targets for member in members]),
        owners=np.repeat(np.arange(len(members), dtype=np.int32), [len(member.places) for member in members]),
        weights=np.ones(sum(len(member.places) for member in members), np.float32),
        tokens=tokens,
    )
