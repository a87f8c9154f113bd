"""Rounds one after the other, and the same computed from scratch, without caches that last."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from golden_cases import generator, lay_out
from toy_checkpoint import Shape

from mlx_gemma4 import Prompt
from mlx_gemma4.decoding.round import Round, State, first_state, launch, make_round
from mlx_gemma4.decoding.sampling import Sampler, Sampling
from mlx_gemma4.model.cache import ROUND
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.prompt import SoftTokens

GREEDY = Sampling(temperature=0)


def made_prompt(runs: list[tuple[Any, ...]], shape: Shape, seed: str = "") -> Prompt:
    """Random tokens and media of a layout as golden_cases.py has them."""
    ids, media = lay_out(runs, shape, generator(seed))
    return Prompt(ids, tuple(SoftTokens(run.kind, run.start, run.values, run.positions) for run in media))


def make_sampler(model: Model, sampling: Sampling) -> Sampler:
    return Sampler(sampling, model.config.generation, model.config.text.vocab_size)


@dataclass
class Rounds:
    """What `decode` does, but the host looks at each round before it hands over the next."""

    model: Model
    sampler: Sampler
    prompt: Prompt
    seed: int = 0
    longest: int = 7
    room: int = 64  # slots of full layers beyond the prompt, at first
    tokens: list[int] = field(default_factory=list)
    compiled: dict[int, Round] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.caches = self.model.caches(len(self.prompt) + self.room)
        *_, hidden = self.model.read(self.prompt, self.caches)
        self.state: State = first_state(self.model, self.sampler, self.prompt.token_ids, hidden[:, -1:], self.seed)
        self.tokens += self.state["token"].tolist()

    @property
    def ids(self) -> list[int]:
        """All tokens known; the last one, the newest, has no keys yet."""
        return [*self.prompt.token_ids, *self.tokens]

    @property
    def grown(self) -> Prompt:
        return Prompt(self.ids, self.prompt.media)

    def run(self, length: int, fresh: bool = False) -> list[int]:
        """One round of `length` drafts: its tokens. `fresh`: trace it anew, for the model has changed."""
        if fresh or length not in self.compiled:
            self.compiled[length] = make_round(self.model, self.sampler.stages, length)
        committed = len(self.ids) - 1
        self.caches.reserve(committed + ROUND)
        assert committed + length < self.caches.slots  # MLX writes anywhere
        tokens, self.state = launch(self.compiled[length], self.state, self.caches)
        assert tokens.shape == (1, length + 1)
        [ids] = tokens.tolist()
        count = sum(token >= 0 for token in ids)
        assert count >= 1 and ids[count:] == [-1] * (length + 1 - count)
        self.tokens += ids[:count]
        return ids[:count]


def hidden_states(model: Model, prompt: Prompt) -> np.ndarray:
    """[L, hidden], from a fresh cache."""
    return np.array(mx.concatenate(list(model.read(prompt, model.caches(len(prompt)))), axis=1))[0]


def chosen(model: Model, logits: np.ndarray, seen: list[int], penalty: float) -> int:
    """The greedy choice of one row of logits."""
    row = logits.astype(np.float64)
    known = sorted(set(seen))
    row[known] = np.where(row[known] > 0, row[known] / penalty, row[known] * penalty)
    row[list(model.config.generation.suppress_tokens)] = -np.inf
    return int(row.argmax())


def reference_drafts(model: Model, prompt: Prompt, length: int, penalty: float = 1.0) -> list[int]:
    """The drafter's greedy proposals after a prompt, whose last token is the newest."""
    committed = Prompt(prompt.token_ids[:-1], prompt.media)
    caches = model.caches(len(committed))
    *_, hidden = model.read(committed, caches)
    last = mx.array([len(committed) - 1])
    masks = model.masks(caches, last, 1)
    hidden, drafts = hidden[:, -1:], []
    for _ in range(length):
        token = mx.array([[[*prompt.token_ids, *drafts][-1]]])
        logits, hidden = model.drafter(model.language_model.embed(token), hidden, last, masks, caches.last)
        drafts.append(chosen(model, np.array(logits)[0, 0], [*prompt.token_ids, *drafts], penalty))
    return drafts


def reference_round(model: Model, prompt: Prompt, drafts: list[int], penalty: float = 1.0) -> list[int]:
    """The tokens that a greedy round with these drafts gives: those that the target would have chosen, and one more."""
    logits = np.array(model.logits(Prompt([*prompt.token_ids, *drafts], prompt.media)))[0, len(prompt) - 1 :]
    tokens: list[int] = []
    for i in range(len(drafts) + 1):
        tokens.append(chosen(model, logits[i], [*prompt.token_ids, *drafts[:i]], penalty))
        if i < len(drafts) and drafts[i] != tokens[i]:
            break
    return tokens
