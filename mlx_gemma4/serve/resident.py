"""The model that is served: loaded when it is needed, given back when nobody has asked for a while."""

import gc
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Timer
from typing import Any

import mlx.core as mx

from mlx_gemma4.config import computing_type, expanded
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.engine import Engine, Work, check_max_batch
from mlx_gemma4.engine.request import adapter_named
from mlx_gemma4.errors import shown
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.serve.ask import Refused
from mlx_gemma4.serve.media import NOTHING, Allowed
from mlx_gemma4.weights.load import (
    Checkpoint,
    check_split,
    find_adapter,
    find_drafter,
    find_folder,
    load_values,
    open_checkpoint,
)
from mlx_gemma4.weights.peers import follows, give_up, hear, lead, release, tell

logger = logging.getLogger("mlx_gemma4.serve")

LAST_WORDS = 1  # seconds to send what is said last
RETRY_SECONDS = 5  # after which a client that found the queue full may try again


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the model is to be served. ValueError if any of it is wrong."""

    model: str
    drafter: str | None = "auto"
    dtype: str | None = None
    kv_bits: int | None = None
    split: str | None = None
    adapter: str | Path | Mapping[str, str | Path] | None = None  # by name: requests choose from them
    max_batch: int = 8
    max_queue: int = 64  # replies that wait for a row
    store: Path | None = None
    store_bytes: int | None = None
    unload_after: float | None = None  # seconds
    thinking: bool = False  # where a request does not say
    allowed: Allowed = NOTHING

    def __post_init__(self) -> None:
        check_max_batch(self.max_batch)
        check_split(self.split)
        if self.max_queue < 0:
            raise ValueError(f"max_queue is {shown(self.max_queue)}; expected a whole number, 0 or more")
        if self.unload_after is not None and not 0 < self.unload_after < 1e9:
            raise ValueError(f"unload_after is {shown(self.unload_after)}; expected seconds, above 0")


class Resident:
    """A model, its engine and its store. Any thread may use it.

    A checkpoint that is wrong is found when this is made; weights are loaded by the first use, or `load`.
    """

    def __init__(self, settings: Settings, group: mx.distributed.Group | None = None):
        """group: of machines that share the model, each of which makes a Resident; all but the first `follow`."""
        self.settings, self.group = settings, group
        self.store = self.new_store()
        folder = find_folder(settings.model)
        self.folder, self.adapter = folder, find_adapter(settings.adapter)
        self.choice = find_drafter(settings.model, folder, settings.drafter, adapter=self.adapter)
        checkpoint = self.look()
        self.processor = load_processor(folder, checkpoint.config)
        self.context = checkpoint.config.text.max_position_embeddings
        is_path = settings.model != "demo" and expanded(settings.model) == folder
        self.name = folder.resolve().name if is_path else settings.model
        self.adapters = checkpoint.config.adapters
        if self.name in self.adapters:
            raise ValueError(f"an adapter is named {self.name}, as the model; expected another name")
        self.checkpoint: Checkpoint | None = checkpoint
        self.engine: Engine | None = None
        self.is_ready = False  # it has been loaded once; what is given back is loaded again
        self.lock = Lock()  # of what is loaded
        self.quiet = Lock()  # of what follows
        self.asked = 0  # replies that are on their way
        self.timer: Timer | None = None

    def look(self) -> Checkpoint:
        dtype = computing_type(self.settings.dtype)
        bits, split = self.settings.kv_bits, self.settings.split
        return open_checkpoint(self.folder, self.choice, dtype, bits, self.adapter, self.group, split)

    def chosen(self, model: Any) -> str | None:
        """The adapter that a request's `model` is; None: the model itself. Refused, 404, for what is neither."""
        try:
            return adapter_named(model, self.adapters, self.name)
        except ValueError as error:
            raise Refused(str(error), status=404, field="model", code="model_not_found") from None

    def new_store(self) -> PromptStore:
        return PromptStore(max_bytes=self.settings.store_bytes, folder=self.settings.store)

    def load(self) -> Engine:
        """The engine, once the weights are there. A thread that calls this ends with `mx.clear_streams()`."""
        with self.lock:
            if self.engine is None:
                if self.is_ready and self.group is not None and not follows(self.group):
                    lead()
                    tell(True)  # those that follow load it again too
                checkpoint, self.checkpoint = self.checkpoint or self.look(), None
                for _ in load_values(checkpoint):
                    pass
                self.engine = Engine(checkpoint.model, self.processor, self.settings.max_batch, self.store)
                self.is_ready = True
                logger.info("%s is loaded", self.name)
            return self.engine

    def follow(self) -> None:
        """On the machines behind the first: answer with it, load and give back when it does, until it closes."""
        while True:
            self.load().follow()
            self.give_back()
            if hear() is None:
                return
            lead()  # as there, so that none goes on loading without the others

    def load_ahead(self) -> None:
        """As a thread of its own."""
        try:
            self.load()
        except Exception as error:  # the first request meets it again, and its client is told
            logger.error("%s cannot be loaded: %s", self.name, error)
            if self.group is not None:
                give_up()  # the others have gone on
        self.release(0)  # nobody may ask at all
        mx.clear_streams()

    @property
    def most(self) -> int:
        """Replies that are on their way at once."""
        return self.settings.max_batch + self.settings.max_queue

    def admit(self, replies: int) -> None:
        """Count so many replies as asked for, until `release`. Refused: 429 if too many are, 400 if it never fits."""
        if replies > self.most:
            raise Refused(f"the request asks for {replies} replies; expected at most {self.most}")
        with self.quiet:
            if self.asked + replies > self.most:
                raise Refused(f"{self.asked} replies are asked for already; try again later", status=429)
            self.asked += replies
            if self.timer is not None:
                self.timer.cancel()

    def release(self, replies: int) -> None:
        with self.quiet:
            self.asked -= replies
            if not self.asked and self.settings.unload_after is not None:
                if self.timer is not None:
                    self.timer.cancel()
                self.timer = Timer(self.settings.unload_after, self.unload)
                self.timer.daemon = True
                self.timer.start()

    @contextmanager
    def admitted(self, replies: int) -> Iterator[None]:
        self.admit(replies)
        try:
            yield
        finally:
            self.release(replies)

    def works(self) -> list[Work]:
        engine = self.engine
        return [] if engine is None else [*engine.works, *engine.asked]

    def states(self) -> tuple[int, int, int]:
        """How many replies wait, are being read for, and are being written."""
        works = self.works()
        waiting = sum(work.reading is None for work in works)
        writing = sum(work.seat is not None for work in works)
        return waiting, len(works) - waiting - writing, writing

    def abandon(self) -> None:
        """Tell those who wait that nothing follows, and give what tells them a moment: the process ends."""
        for work in self.works():
            work.pieces.put(Refused("a machine that shares the model is gone", status=503))
        time.sleep(LAST_WORDS if self.asked else 0)

    def unload(self) -> None:
        """Give the memory back, if nobody asks just now."""
        with self.lock:
            with self.quiet:
                engine = None if self.asked else self.engine
            if engine is not None:
                engine.close()
                del engine
                self.give_back()
                logger.info("%s is given back", self.name)
        mx.clear_streams()

    def give_back(self) -> None:
        self.engine = None
        if self.settings.store is not None:
            self.store.save()
        self.store = self.new_store()
        gc.collect()
        mx.clear_cache()

    def close(self) -> None:
        """End what is not finished. While weights are being loaded or given back this waits for it."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()  # the process ends, and MLX aborts it where a thread has not done with its streams
        with self.lock:
            if self.engine is not None:
                self.engine.close()
                self.engine = None
            release(self.group)  # for good
