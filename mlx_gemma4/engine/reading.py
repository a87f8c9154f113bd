"""Reading a prompt from where a store has it, and giving back what was read."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_gemma4.decoding.round import learnt_of
from mlx_gemma4.decoding.store import VERSION, Held, PromptStore, fingerprint
from mlx_gemma4.model.cache import AHEAD, ROUND, Caches
from mlx_gemma4.model.model import CHUNK, Model
from mlx_gemma4.planner import memory_limit
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import TURN_OPEN
from mlx_gemma4.weights.load import parameters

logger = logging.getLogger("mlx_gemma4")

SHOWN = 8  # tokens that are quoted where two prompts part


@dataclass(eq=False)
class Opened:
    """The caches of a request, and what is known of their positions."""

    caches: Caches
    ids: list[int]  # of the prompt and of what has come of the reply
    total: int  # tokens of the prompt
    chunk: int
    held: Held | None  # what a store is to have back

    @property
    def known(self) -> list[int]:
        """The ids of all positions that have entries: of what came of the reply the newest has none, and a reading that
        was broken off has its own length."""
        written = len(self.ids) - 1 if len(self.ids) > self.total else self.caches.length
        return self.ids[:written]

    def keep(self) -> None:
        """Put aside what the next chunk overwrites."""
        if self.held is not None:
            self.held.store.keep(self.held, self.caches.length)

    def share(self) -> None:
        """Let others find the whole prompt, which has been read, while a reply to it is written."""
        if self.held is not None:
            self.held.store.share(self.held)

    def give(self) -> None:
        """Give all that is known back."""
        if self.held is not None:
            self.held.store.give(self.held, self.known)
            self.held = None

    def forget(self) -> None:
        """Give nothing back: the entries are lost."""
        if self.held is not None:
            self.held.store.drop(self.held)
            self.held = None


@contextmanager
def opened(
    store: PromptStore | None,
    model: Model,
    processor: Processor,
    prompt: Prompt,
    limit: int,
    needed: int,
    scope: str = "",
    adapter: int = 0,
) -> Iterator[Opened]:
    """Caches for reading a prompt and writing `limit` tokens; what was read goes to the store, if the reply is left in
    the middle too.

    needed: bytes of model and request, which the store leaves to them. scope: whose prompt it is; what others have read
    is not found, nor what was read with another adapter.
    """
    slots, held, room = len(prompt) + min(limit, AHEAD) + ROUND, None, memory_limit() - needed
    caches = model.caches(slots)
    if store is not None:
        space, turn = space_of(model, scope, adapter), processor.tokenizer.token_to_id(TURN_OPEN)
        held = store.take(space, prompt, slots, turn, caches, room)
        if not is_everywhere(model.group, held.cached):
            store.drop(held)
            held, caches = None, model.caches(slots)
        elif held.parted is not None:
            log_parting(processor, prompt, held.cached, *held.parted)
    # no more at once than a window, or the ring would have lost what is to be kept
    chunk = CHUNK if held is None else min(CHUNK, caches.window or CHUNK)
    reading = Opened(caches, list(prompt.token_ids), len(prompt), chunk, held)
    try:
        yield reading
    except GeneratorExit:
        raise
    except KeyboardInterrupt:
        # where in a round it came is not known: of the prompt all is sure that was read
        reading.ids = reading.ids[: reading.caches.length]
        raise
    except BaseException:
        reading.forget()
        raise
    finally:
        if store is not None and reading.held is not None:
            store.leave(room + reading.caches.full_bytes)  # which are the store's from now on
        reading.give()


def fingerprint_of(model: Model, adapter: int = 0) -> bytes:
    """128 bits of a model's weights, the drafter's not among them, or of one of the adapters by name alone; computed
    once."""
    known = learnt_of(model).fingerprints
    if adapter not in known:
        own = {path: array for path, array in parameters(model).items() if not path.startswith("drafter.")}
        if model.config.adapters:
            of_adapters = {path: own.pop(path) for path in [*own] if path.endswith((".lora_a", ".lora_b", ".gain"))}
            own = {path: array[adapter] for path, array in of_adapters.items()} if adapter else own
        known[adapter] = fingerprint(own)
    return known[adapter]


def space_of(model: Model, scope: str = "", adapter: int = 0) -> bytes:
    """What entries depend on beside what is read, and whose they are."""
    config = model.config
    described = repr(
        (VERSION, str(model.language_model.dtype), config.text, config.vision, config.audio, scope)
    ).encode()
    weights = fingerprint_of(model) + (fingerprint_of(model, adapter) if adapter else b"")
    return hashlib.blake2b(weights + described, digest_size=16).digest()


def is_everywhere(group: mx.distributed.Group | None, length: int) -> bool:
    """Whether all machines that share a model have found as much as this one."""
    if group is None:
        return True
    found = mx.distributed.all_gather(mx.array([length]), group=group)
    return bool((found == length).all())


def log_parting(processor: Processor, prompt: Prompt, cached: int, place: int, was: int) -> None:
    """Where a prompt stops being what was read, for whoever wonders why it is read again."""
    before, now = prompt.token_ids[max(0, place - SHOWN) : place], prompt.token_ids[place : place + SHOWN]
    texts = [processor.tokenizer.decode(ids, skip_special_tokens=False) for ids in (before, [was], now)]
    logger.debug(
        "%d of %d tokens are not read again; what was read goes on after token %d, %r, with %r, the prompt with %r",
        cached, len(prompt), place, *texts,
    )  # fmt: skip
