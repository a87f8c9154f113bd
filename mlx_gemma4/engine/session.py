"""A conversation that goes on: messages, and a store that keeps what has been read of them."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_gemma4.config import expanded
from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.generation import Reading, check_given, generation_events
from mlx_gemma4.engine.reading import fingerprint_of, space_of
from mlx_gemma4.engine.request import Options, Request, adapter_of
from mlx_gemma4.errors import TooLongError, a, one_line, shown
from mlx_gemma4.media.source import describe, read_source
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.split import SPLITS
from mlx_gemma4.planner import check_memory
from mlx_gemma4.prompt.messages import KIND_OF, MEDIA, check_messages, check_part, request_messages
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import Piece, Reply, collect
from mlx_gemma4.weights.load import footprint_of
from mlx_gemma4.weights.writing import beside, part_of, write_private

MESSAGES, ABOUT, MEDIA_FOLDER, STORE_FOLDER = "messages.json", "session.json", "media", "store"
FORMAT = 1
DEFAULTS = Options()


@dataclass(frozen=True)
class Settings:
    """What stays the same in a conversation, beside its messages."""

    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    image_budget: int | None = None
    adapter: str | None = None  # of the model's, by name


class Session:
    """A conversation with a model.

    `messages` is a plain list: edit it, and what is unchanged at its beginning is not read again. store: what has been
    read, shared with whoever has the same; None: one of its own. adapter: which of the model's, by name, it talks with;
    None: none of them.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        thinking: bool = False,
        image_budget: int | None = None,
        store: PromptStore | None = None,
        adapter: str | None = None,
    ) -> None:
        check_given(model, processor, store)
        adapter_of(model, adapter)
        self.model, self.processor = model, processor
        self.settings = Settings(tools, thinking, image_budget, adapter)
        self.store = PromptStore() if store is None else store
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def send(
        self,
        text: str | None = None,
        images: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_tokens: int = 1024,
        sampling: Sampling = Sampling(),
        draft_length: int | str = "auto",
        repetition_detection: str | Mapping[str, int] = "auto",
        *,
        stop: str | Sequence[str] = (),
        thinking_budget: int | None = None,
        continue_final_message: bool = False,
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        response_format: Any = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
    ) -> Reply:
        """The reply to a user turn, the media before its text; both are then in `messages`.

        text None, and no media: to the messages as they are, for instance after a tool's answer has been appended.
        continue_final_message: without a text, the reply goes on in the last message, which is the assistant's, and
        what is new joins it. ValueError if any of it is wrong, and the messages stay as they were.
        """
        return collect(
            self.stream(
                text, images, audios, videos, max_tokens, sampling, draft_length, repetition_detection, stop=stop,
                thinking_budget=thinking_budget, continue_final_message=continue_final_message, logprobs=logprobs,
                logit_bias=logit_bias, response_format=response_format, tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
            )
        )  # fmt: skip

    def stream(
        self,
        text: str | None = None,
        images: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_tokens: int = 1024,
        sampling: Sampling = Sampling(),
        draft_length: int | str = "auto",
        repetition_detection: str | Mapping[str, int] = "auto",
        *,
        stop: str | Sequence[str] = (),
        thinking_budget: int | None = None,
        continue_final_message: bool = False,
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        response_format: Any = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
    ) -> Iterator[Piece]:
        """As `send`, piece by piece. A reply that is left before its end leaves the messages as they were."""
        is_new = text is not None or images or audios or videos
        turn = request_messages(text or "", images, audios, videos) if is_new else []
        options = Options(
            max_tokens=max_tokens, sampling=sampling, draft_length=draft_length,
            repetition_detection=repetition_detection, stop=stop, thinking_budget=thinking_budget, logprobs=logprobs,
            logit_bias=logit_bias, response_format=response_format, tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
        )  # fmt: skip
        prompt, prepared = self.prompt(turn, options, continue_final_message)
        events = self.events(turn, prompt, prepared, options, continue_final_message)
        check_memory(footprint_of(self.model), len(prompt), options.max_tokens)
        return (event for event in events if isinstance(event, Piece))

    def prompt(
        self, turn: list[dict[str, Any]], options: Options = DEFAULTS, continue_final_message: bool = False
    ) -> tuple[Prompt, float]:
        """What the model reads with these messages added, and the seconds that making it took."""
        own = self.settings
        if not isinstance(self.messages, list):  # which the reply is to be added to
            raise ValueError(f"messages is {a(self.messages)}; expected a list of messages")
        request = Request(
            content=[*self.messages, *turn],
            tools=own.tools,
            thinking=options.thinks(own.thinking),
            image_budget=own.image_budget,
            continue_final_message=continue_final_message,
        )
        return request.timed_prompt(self.processor)

    def events(
        self,
        turn: list[dict[str, Any]],
        prompt: Prompt,
        prepared: float,
        options: Options,
        continue_final_message: bool = False,
    ) -> Iterator[Reading | Piece]:
        """What happens when these messages are added: how far their prompt is read, then the pieces of the reply."""
        options = replace(options, adapter=self.settings.adapter)
        events = generation_events(self.model, self.processor, prompt, options, prepared, self.store)
        return self.recorded(turn, events, continue_final_message)

    def recorded(
        self, turn: list[dict[str, Any]], events: Iterator[Reading | Piece], continues: bool
    ) -> Iterator[Reading | Piece]:
        pieces: list[Piece] = []
        for event in events:
            if isinstance(event, Piece):
                pieces.append(event)
                if event.finish_reason is not None:
                    message = collect(pieces).message
                    if continues:
                        message = continued(self.messages.pop(), message)
                    self.messages += [*turn, message]
            yield event

    def fork(self) -> "Session":
        """Another conversation that begins with the messages so far; what has been read of them serves both."""
        other = Session(self.model, self.processor, store=self.store)
        other.settings, other.messages = self.settings, copied(self.messages)
        return other

    # --- folders -------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the conversation to a folder, made if need be: its messages, copies of its media, and what was read.

        ValueError if messages or media cannot be written as they are; what was saved before is then still there.
        """
        folder = session_path(folder)
        self.save_messages(folder)
        if self.messages:  # of a store that conversations share, no more than this one's
            space = space_of(self.model, adapter=adapter_of(self.model, self.settings.adapter))
            with suppress(TooLongError):  # a reply that filled the context: what was read can be read again
                self.store.save(folder / STORE_FOLDER, (space, self.prompt([])[0]))

    def save_messages(self, folder: Path) -> None:
        """As `save`, without what was read: that is larger by far, and can be read again."""
        if self.messages:
            check_messages(self.messages)
        try:
            for made in (folder, folder / MEDIA_FOLDER):
                make_private(made)
            messages = [with_parts(message, saved_part, folder / MEDIA_FOLDER) for message in self.messages]
            own = self.model
            kept = {"weights": fingerprint_of(own).hex(), "dtype": str(own.language_model.dtype), "split": own.split}
            about = {"format": FORMAT, **kept, "settings": asdict(self.settings)}
            # both are there before either takes the place of an older one, the messages first
            with beside(folder / ABOUT) as part_of_about, beside(folder / MESSAGES) as part_of_messages:
                write_private(part_of_about, json_bytes(ABOUT, about))
                write_private(part_of_messages, json_bytes(MESSAGES, messages))
        except OSError as error:
            raise OSError(f"the session's folder {str(folder)!r} cannot be written: {one_line(error)}") from None

    @classmethod
    def load(
        cls, folder: str | Path, model: Model, processor: Processor, store: PromptStore | None = None
    ) -> "Session":
        """The conversation that `save` wrote. ValueError if the folder holds none, a torn one, or another model's."""
        saved = read_saved(folder)
        saved.check_model(model)
        own = cls(model, processor, store=session_store(saved.folder) if store is None else store)
        own.settings, own.messages = saved.settings, saved.messages
        return own


def session_path(folder: Any) -> Path:
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder is {a(folder)}; expected a session's folder")
    return expanded(folder)


def session_store(folder: Path) -> PromptStore:
    """What was read of the session in a folder, which is made if need be; ValueError if it cannot be."""
    try:
        make_private(folder)
    except OSError as error:
        raise ValueError(f"the session's folder {str(folder)!r}: {one_line(error)}; expected one to write to") from None
    return PromptStore(folder=folder / STORE_FOLDER)


def make_private(folder: Path) -> None:
    """One that is there stays as its owner has it."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def copied(value: Any) -> Any:
    """Messages of one's own, down to their media, which are shared: an edit here is none there."""
    if isinstance(value, dict):
        return {key: copied(own) for key, own in value.items()}
    return [copied(own) for own in value] if isinstance(value, list) else value


def continued(message: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """An assistant message with what has been written on."""
    content, text = message["content"], more["content"]
    whole = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return more | message | {"content": whole}


@dataclass(frozen=True)
class Saved:
    """A conversation in a folder."""

    folder: Path
    weights: str
    dtype: Any  # in which these were read; None: not said
    settings: Settings
    messages: list[dict[str, Any]]
    split: str | None  # how machines shared the model, of which the weights are a part

    def check_model(self, model: Model) -> None:
        # in another computing type the same weights are other numbers; what was read is not found then
        is_same = self.dtype in (None, str(model.language_model.dtype))
        if is_same and self.weights != fingerprint_of(model).hex():
            raise ValueError(f"{str(self.folder)!r} holds a session with other weights; expected those it began with")
        if (name := self.settings.adapter) is not None and name not in model.config.adapters:
            there = ", ".join(model.config.adapters) or "it to be loaded by name"
            raise ValueError(f"{str(self.folder)!r} holds a session with the adapter {shown(name)}; expected {there}")


def is_session(folder: Path) -> bool:
    """Whether a folder holds one, whole or not; ValueError if it is no folder, or one of something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"session is {str(folder)!r}, a file; expected a folder")
    names = {entry.name for entry in folder.iterdir() if entry.name[0] != "."} if folder.is_dir() else set()
    if names & {ABOUT, MESSAGES}:
        return True
    if names - {STORE_FOLDER, MEDIA_FOLDER}:
        raise ValueError(f"session is {str(folder)!r}, which holds other files; expected a session, or a new folder")
    return False


def read_saved(folder: str | Path) -> Saved:
    """ValueError if there is no session in the folder, or not a whole one."""
    folder = session_path(folder)
    about, messages = (read_part(folder, name) for name in (ABOUT, MESSAGES))
    is_ours = isinstance(about, dict) and about.get("format") == FORMAT and isinstance(about.get("weights"), str)
    found = about.get("settings") if is_ours else None
    if isinstance(found, dict):
        found = {"adapter": None} | found  # which sessions before there were any do not say
    if not isinstance(found, dict) or set(found) != set(asdict(Settings())):
        raise ValueError(f"{str(folder / ABOUT)!r} is not of this version; expected what Session.save writes")
    if not isinstance(messages, list):
        raise ValueError(f"{str(folder / MESSAGES)!r} holds {a(messages)}; expected a list of messages")
    settings = Settings(**found)
    right = {
        "tools": (list, type(None)), "thinking": (bool,), "image_budget": (int, type(None)),
        "adapter": (str, type(None)),
    }  # fmt: skip
    for name, types in right.items():
        if not isinstance(found[name], types):
            raise ValueError(
                f"{str(folder / ABOUT)!r} has {name} {shown(found[name])}; expected what Session.save writes"
            )
    loaded = [with_parts(message, loaded_part, folder) for message in messages]
    if loaded:
        check_messages(loaded)
    if (split := about.get("split")) not in (None, *SPLITS):
        raise ValueError(f"{str(folder / ABOUT)!r} has split {shown(split)}; expected what Session.save writes")
    return Saved(folder, about["weights"], about.get("dtype"), settings, loaded, split)


def read_part(folder: Path, name: str) -> Any:
    file = folder / name
    try:
        whole = file if file.exists() else part_of(file)  # which a kill may have left of the first saving
        return json.loads(whole.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(folder)!r} holds no session: {name}: {one_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {one_line(error)}; expected what Session.save writes") from None


def json_bytes(name: str, value: Any) -> bytes:
    """ValueError that names the file if it cannot hold a value."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot hold the messages: {one_line(error)}; expected what JSON can hold") from None


def with_parts(message: Any, change: Callable[[Any, Path], Any], folder: Path) -> Any:
    """A message with each part of its content changed."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, (list, tuple)):
        return message
    return message | {"content": [change(part, folder) for part in content]}


def saved_part(part: Any, media: Path) -> Any:
    """A part whose medium is a file in the folder `media`."""
    kind = KIND_OF.get(part["type"]) if isinstance(part, dict) and isinstance(part.get("type"), str) else None
    if kind not in MEDIA:
        return part
    part = check_part(part, "the message's part")  # in the one spelling
    source = part[kind]
    if isinstance(source, (list, tuple)) and kind == "video":
        return part | {kind: [saved_source(frame, "image", media) for frame in source]}
    return part | {kind: saved_source(source, kind, media)}


def saved_source(source: Any, kind: str, media: Path) -> str:
    """Where a copy of a medium lies, relative to the session's folder."""
    data, suffix = media_bytes(source, kind)
    name = hashlib.blake2b(data, digest_size=16).hexdigest() + suffix
    if not (media / name).exists():
        with beside(media / name) as part:
            write_private(part, data)
    return f"{MEDIA_FOLDER}/{name}"


def media_bytes(source: Any, kind: str) -> tuple[bytes, str]:
    """The bytes of a medium, as they are or, where there are none, in a format that keeps every bit; and a suffix."""
    if isinstance(source, (str, Path, bytes)):
        suffix = Path(str(source)[-64:]).suffix if not isinstance(source, bytes) else ""
        return read_source(source, kind), suffix if suffix[1:].isalnum() else ""
    made = io.BytesIO()
    if kind == "image":
        from PIL import Image

        if isinstance(source, Image.Image):
            source.save(made, "PNG" if source.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF")
            return made.getvalue(), ""
    if kind == "audio" and isinstance(source, tuple) and len(source) == 2:
        import numpy as np
        import soundfile

        soundfile.write(made, np.asarray(source[0], np.float32), int(source[1]), format="WAV", subtype="FLOAT")
        return made.getvalue(), ".wav"
    raise ValueError(f"the {kind} {shown(source)} cannot be saved; expected a path, a URL, bytes or decoded media")


def loaded_part(part: Any, folder: Path) -> Any:
    """A part whose medium lies in the session's folder, wherever that is now."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in MEDIA or kind not in part:
        return part
    source = part[kind]
    if isinstance(source, list):
        return part | {kind: [loaded_source(frame, folder) for frame in source]}
    return part | {kind: loaded_source(source, folder)}


def loaded_source(source: Any, folder: Path) -> str:
    text = str(source)
    if not text.startswith(f"{MEDIA_FOLDER}/") or "/" in text.removeprefix(f"{MEDIA_FOLDER}/"):
        raise ValueError(f"the session in {str(folder)!r} names {describe(text, 'a medium')}; expected one of its own")
    if not (folder / text).is_file():
        raise ValueError(f"the session in {str(folder)!r} lacks {text}; expected its media beside it")
    return str(folder / text)
