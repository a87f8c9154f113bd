"""Chat messages -> a prompt: the template's text as token ids, and media read, with runs of soft tokens in place."""

import logging
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from mlx_gemma4.config import ModelConfig, read_bytes_of, read_json
from mlx_gemma4.errors import CheckpointError, TooLongError, a, check_flag, one_line, shown
from mlx_gemma4.media.source import unheard
from mlx_gemma4.prompt.messages import Part, check_messages, check_tools, media_parts, taken_up, without_sources
from mlx_gemma4.prompt.prompt import Prompt, SoftTokens, check_length
from mlx_gemma4.prompt.template import compile_template, joins_turns, render_shielded, template_turns
from mlx_gemma4.prompt.tools import argument_schemas, template_tools
from mlx_gemma4.reply.reply import CHANNEL_CLOSE, CHANNEL_OPEN, REPLY_ANCHORS, THOUGHT_LINE, Controls, ReplyParser

logger = logging.getLogger("mlx_gemma4")

# What the published processor_config.json and tokenizer_config.json say, for conversions that lack them.
IMAGE_BUDGET = 280  # soft tokens an image: image_processor.max_soft_tokens
VIDEO_BUDGET = 70  # soft tokens a frame: video_processor.max_soft_tokens
NUM_FRAMES = 32  # video_processor.num_frames
SAMPLING_RATE = 16000  # Hz: feature_extractor.sampling_rate
BOS_TOKEN = "<bos>"
# Of the above, what a file may ask for at most: an image's positions, a context full of frames, studio sound.
MOST_SOFT_TOKENS, MOST_FRAMES, MOST_SAMPLING_RATE = 1120, 2**18, 768_000

PACKAGED_TEMPLATE = Path(__file__).with_name("chat_template.jinja")  # as published on 2026-07-09
OLD_TEMPLATE_BYTES = 17466  # of its predecessor, which leaks thoughts and loops on tools

# The config's ids that each kind of media is written with: begin, soft token, end. A video is a row of images.
RUN_KEYS = {
    "image": ("boi_token_id", "image_token_id", "eoi_token_id"),
    "audio": ("boa_token_id", "audio_token_id", "eoa_token_id"),
    "video": ("boi_token_id", "video_token_id", "eoi_token_id"),
}


@dataclass(frozen=True)
class MediaSettings:
    """The checkpoint's own way to turn media into soft tokens."""

    image_budget: int = IMAGE_BUDGET
    video_budget: int = VIDEO_BUDGET  # a frame
    num_frames: int = NUM_FRAMES  # of a video
    sampling_rate: int = SAMPLING_RATE  # Hz


@dataclass(frozen=True)
class Run:
    """How a kind of media stands in the prompt: begin, n times token, end."""

    begin: int
    token: int
    end: int
    placeholder: str  # what the chat template writes for it
    size: int  # of a token: the side of its square in pixels, or its samples


@dataclass(frozen=True, eq=False)
class Loaded:
    """The soft tokens of one run before it has a place; a video has one for each frame."""

    values: np.ndarray
    positions: np.ndarray | None
    caption: str = ""  # text in front of it: a frame's time
    note: str = ""  # what its user should know


@dataclass(frozen=True, eq=False)
class Written:
    """A request as the chat template writes it, before its media are read."""

    text: str
    mark: str  # in the text, stands for nothing: see template.py
    media: tuple[Part, ...]  # in the order of their placeholders
    tools: tuple[dict[str, Any], ...]
    begun: str  # of the reply: what its last message already says


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text; `Tokenizer.encode` would stop all other threads, for seconds if it is a megabyte."""
    found: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return found


@dataclass(frozen=True, eq=False)
class ControlText:
    """Text with control tokens -> ids, where only the template's control tokens count as such."""

    ids: dict[str, int]  # of each control token
    plain: Tokenizer  # takes control tokens for text
    spelled: dict[int, list[int]]  # of a control token's id: those of its characters
    split: re.Pattern[str]  # matches a control token, in a group, so that re.split keeps it
    starts: re.Pattern[str]  # matches each character that a control token begins with

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "ControlText":
        added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
        plain = Tokenizer(tokenizer.model)  # shares the vocabulary; a copy through JSON takes a second
        if tokenizer.normalizer is not None:
            plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            plain.pre_tokenizer = tokenizer.pre_tokenizer
        plain.add_tokens(list(added.values()))
        plain.encode_special_tokens = True
        ids = {token.content: index for index, token in added.items() if token.special}
        spelled = {
            index: [part for character in text for part in plain.encode(character, add_special_tokens=False).ids]
            for text, index in ids.items()
        }
        longest_first = sorted(ids, key=len, reverse=True)  # as the tokenizer matches them
        return cls(
            ids=ids,
            plain=plain,
            spelled=spelled,
            split=re.compile(f"({'|'.join(map(re.escape, longest_first))})"),
            starts=re.compile("|".join(sorted({re.escape(token[0]) for token in ids}))),
        )

    def encode(self, text: str) -> list[int]:
        """The ids of text in which nothing is a control token."""
        found = encoded(self.plain, text) if text else []
        if self.spelled.keys().isdisjoint(found):
            return found
        # A model that looks for whole words first (`ignore_merges`) finds control tokens in its vocabulary.
        return [part for index in found for part in self.spelled.get(index, [index])]


@dataclass(frozen=True, eq=False, repr=False)
class Processor:
    """Turns chat messages into prompts; made by `load_processor`."""

    tokenizer: Tokenizer
    config: ModelConfig
    template: Template
    joins_turns: bool  # of the template: see template.joins_turns
    bos_token: str
    control: ControlText
    settings: MediaSettings
    runs: dict[str, Run]  # by kind of media, of those that the checkpoint takes

    def __repr__(self) -> str:
        kinds = ", ".join(["text", *self.runs])
        return f"Processor({self.config.text.vocab_size} tokens, {self.settings.image_budget} an image; {kinds})"

    def __call__(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        thinking: bool = False,
        image_budget: int | None = None,
        preserve_thinking: bool = False,
        continue_final_message: bool = False,
    ) -> Prompt:
        """The prompt that asks for the reply to `messages`, media read and their placeholders expanded.

        messages and tools are in Hugging Face's or OpenAI's spelling, or tools in Anthropic's. `image_budget`: the most
        soft tokens for each image, None for the checkpoint's own. preserve_thinking: the thoughts before earlier calls
        are kept, as the template's option of this name does. continue_final_message: the last message is the
        assistant's, text alone, and the reply goes on in it. A control token typed in any message or tool stays text.
        Raises ValueError, in one line, if the request, its media or the prompt's length is wrong.
        """
        budget = self.image_budget(image_budget)
        written = self.write(messages, tools, thinking, preserve_thinking, continue_final_message)
        loaded = [(part["type"], self.read(part, budget)) for part in written.media]
        prompt = replace(self.assemble(written.text, written.mark, loaded), tools=written.tools, begun=written.begun)
        check_length(prompt, self.config)
        return prompt

    def write(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        thinking: bool = False,
        preserve_thinking: bool = False,
        continue_final_message: bool = False,
    ) -> Written:
        """The prompt's text; no media are read yet. Takes and raises what a call of the processor does."""
        check_flag(thinking, "thinking")
        check_flag(preserve_thinking, "preserve_thinking")
        check_flag(continue_final_message, "continue_final_message")
        checked, functions = check_messages(messages), check_tools(tools)
        begun = taken_up(checked) if continue_final_message else None
        turns = template_turns(checked, self.joins_turns)
        media = media_parts(turns)
        for part in media:
            if part["type"] not in self.runs:
                takes = ", ".join(["text", *self.runs])
                raise ValueError(f"this checkpoint takes no {part['type']}; it takes {takes}")
        text, mark = render_shielded(
            self.template,
            without_sources(turns),
            template_tools(functions),
            self.control.starts,
            thinking,
            preserve_thinking,
            self.bos_token,
            begun,
        )
        self.check_placeholders(text, media)
        self.check_text(text.replace(mark, ""))
        return Written(text, mark, tuple(media), tuple(functions), "" if begun is None else begun["content"])

    def ids(self, text: str) -> list[int]:
        """Of a text as it stands, in which control tokens are such. TooLongError if it cannot fit the context."""
        self.check_text(text)
        return encoded(self.tokenizer, text)

    def check_text(self, text: str) -> None:
        """TooLongError for more than the context holds of the longest tokens: to count its own may take minutes."""
        limit = self.config.text.max_position_embeddings
        if len(text) < limit:
            return
        least = len(text) // max(map(len, self.tokenizer.get_vocab()))
        if least >= limit:
            raise TooLongError(least, limit, least=True)

    def parse_response(self, text: str, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The assistant message that a reply's text, control tokens and all, amounts to, whoever wrote it.

        {"role": "assistant", "content": str, "reasoning": str or None, "tool_calls": list}. text: one reply, to its
        first end; what comes before it in a conversation is skipped. With the tools, calls that are nearly right are
        read by their schemas. A call that is not understood stays in the content.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is {a(text)}; expected the text of a reply")
        start = max(text.rfind(anchor) + len(anchor) if anchor in text else 0 for anchor in REPLY_ANCHORS)
        schemas = argument_schemas(check_tools(tools))
        parser = ReplyParser(self.tokenizer, Controls.from_tokenizer(self.tokenizer), (), schemas)
        pieces = self.control.split.split(text[start:])
        channels = [piece for piece in pieces[1::2] if piece in (CHANNEL_OPEN, CHANNEL_CLOSE)]
        if channels[:1] == [CHANNEL_CLOSE]:  # the prompt opened the thought, or nothing did
            parser.think()
            pieces[0] = pieces[0].removeprefix(THOUGHT_LINE)
        for index, piece in enumerate(pieces):
            token = self.control.ids[piece] if index % 2 else None
            if token is not None and parser.would_end(token):
                break
            parser.feed([piece if token is None else token])
        parser.finish()
        return {"role": "assistant", "content": "", "reasoning": None, "tool_calls": []} | parser.message

    def image_budget(self, asked: int | None) -> int:
        if asked is None:
            return self.settings.image_budget
        from mlx_gemma4.media.image import check_budget  # here: it imports Pillow, which a text prompt does not need

        check_budget(asked)
        return int(asked)

    def check_placeholders(self, text: str, media: list[Part]) -> None:
        for kind, run in self.runs.items():
            given, written = sum(part["type"] == kind for part in media), text.count(run.placeholder)
            if given != written:
                raise ValueError(f"the messages hold {given} {kind} parts; the chat template has places for {written}")

    def read(self, part: Part, image_budget: int) -> list[Loaded]:
        """The soft tokens of a media part, one entry for each run."""
        size = self.runs[part["type"]].size
        if part["type"] == "audio":  # the imports are here: Pillow and soundfile are of no use to a text prompt
            from mlx_gemma4.media.audio import audio_frames, length_note, read_audio

            rate = self.settings.sampling_rate
            samples = read_audio(part["audio"], rate)
            return [Loaded(audio_frames(samples, size), None, note=length_note(part["audio"], samples, rate))]
        from mlx_gemma4.media.image import cut, fitted, read_image

        if part["type"] == "image":
            return [Loaded(*cut(fitted(read_image(part["image"]), image_budget, size), size))]
        from mlx_gemma4.media.video import read_video, timestamp

        smaller = partial(fitted, budget=self.settings.video_budget, side=size)
        video = read_video(part["video"], part.get("fps"), self.settings.num_frames, smaller)
        pairs = zip(video.frames, video.seconds, strict=True)
        return [Loaded(*cut(frame, size), caption=f"{timestamp(seconds)} ") for frame, seconds in pairs]

    def assemble(self, text: str, mark: str, media: list[tuple[str, list[Loaded]]]) -> Prompt:
        """Rendered text -> ids, the mark removed, the media put in at their placeholders in this order."""
        if "video" in self.runs:
            # The times are text, encoded as one with the text around them: they go in before it is split.
            placeholder = self.runs["video"].placeholder
            rows = iter([frames for kind, frames in media if kind == "video"])
            text = re.sub(
                re.escape(placeholder),
                lambda _: " ".join(frame.caption + placeholder for frame in next(rows)),
                text,
            )
        waiting = {kind: iter([loaded for own, part in media if own == kind for loaded in part]) for kind in self.runs}
        kinds = {run.placeholder: kind for kind, run in self.runs.items()}
        ids: list[int] = []
        soft_tokens: list[SoftTokens] = []
        for index, piece in enumerate(self.control.split.split(text)):
            if index % 2 == 0:  # between control tokens
                ids += self.control.encode(piece.replace(mark, ""))
            elif piece in kinds:
                kind, run = kinds[piece], self.runs[kinds[piece]]
                loaded = next(waiting[kind])
                soft_tokens.append(SoftTokens(kind, len(ids) + 1, loaded.values, loaded.positions))
                ids += [run.begin, *[run.token] * len(loaded.values), run.end]
            else:
                ids.append(self.control.ids[piece])
        notes = tuple(loaded.note for _, part in media for loaded in part if loaded.note)
        return Prompt(ids, tuple(soft_tokens), notes)


# --- loading -----------------------------------------------------------------------------------


def load_processor(folder: Path, config: ModelConfig) -> Processor:
    """The processor of a model folder, of its tokenizer.json and, if they are there, its other files.

    Raises CheckpointError in one line for a file that is missing or damaged. Warns if the folder has no chat template,
    when the packaged one is used, or an old one.
    """
    names = optional_json(folder / "tokenizer_config.json")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    runs = media_runs(tokenizer, config)
    bos_token = token_text(names.get("bos_token")) or BOS_TOKEN
    mark_special(tokenizer, named_tokens(names) | {bos_token} | {run.placeholder for run in runs.values()})
    control = ControlText.from_tokenizer(tokenizer)
    if bos_token not in control.ids:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has no token {shown(bos_token)}; expected Gemma 4's tokenizer"
        )
    template = read_template(folder, names)
    return Processor(
        tokenizer=tokenizer,
        config=config,
        template=template,
        joins_turns=joins_turns(template),
        bos_token=bos_token,
        control=control,
        settings=read_settings(folder),
        runs=runs,
    )


def read_tokenizer(path: Path) -> Tokenizer:
    raw = read_bytes_of(path)
    try:
        with unheard(2):  # before an error of its Rust can be caught, it has written lines there
            tokenizer = Tokenizer.from_buffer(raw)
            tokenizer.no_truncation()  # some are saved with the settings of their training
            tokenizer.no_padding()
            tokenizer.encode("a ü", add_special_tokens=False)  # some panic only then
    except BaseException as error:  # tokenizers raises nothing narrower; a panic of its Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"{path} is not a tokenizer: {one_line(error)}") from None
    if not isinstance(tokenizer.model, BPE):
        raise CheckpointError(f"{path} holds a {type(tokenizer.model).__name__}; expected Gemma 4's tokenizer, a BPE")
    unknown = tokenizer.model.unk_token
    if unknown is not None and tokenizer.token_to_id(unknown) is None:
        raise CheckpointError(f"{path} lacks its own unknown token, {shown(unknown)}; expected Gemma 4's tokenizer")
    return tokenizer


def mark_special(tokenizer: Tokenizer, tokens: set[str]) -> None:
    """Make control tokens of those that tokenizer.json has only as pieces, or as added tokens without that mark."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    missing = sorted(token for token in tokens - special if tokenizer.token_to_id(token) is not None)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def named_tokens(names: dict[str, Any]) -> set[str]:
    """The tokens that tokenizer_config.json gives a role: its …_token keys, and lists of more."""
    values = [value for key, value in names.items() if key.endswith("_token")]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        more = names.get(key) or []
        values += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return {text for text in map(token_text, values) if text}


def token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or in older files an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        return None
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise CheckpointError(f"tokenizer_config.json has the token {shown(text)}; expected valid Unicode")
    return text


def media_runs(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Run]:
    """The kinds of media that the checkpoint takes, and the tokens it writes them with."""
    side = config.vision.patch_side if config.vision else None
    sizes = {"image": side, "audio": config.audio.samples_per_token if config.audio else None, "video": side}
    runs = {}
    for kind, keys in RUN_KEYS.items():
        size = sizes[kind]
        if size is None or not all(key in config.special_tokens for key in keys):
            continue
        begin, token, end = (config.special_tokens[key] for key in keys)
        for key, index in zip(keys, (begin, token, end), strict=True):
            if tokenizer.id_to_token(index) is None:
                raise CheckpointError(f"config.json's {key} is {index}; tokenizer.json has no such id")
        runs[kind] = Run(begin, token, end, placeholder=str(tokenizer.id_to_token(token)), size=size)
    return runs


def read_template(folder: Path, names: dict[str, Any]) -> Template:
    """The checkpoint's chat template, or else the packaged one, compiled."""
    source, origin = find_template(folder, names)
    if source is None:
        logger.warning("%s has no chat template; the packaged one of 2026-07-09 is used", folder)
        source, origin = PACKAGED_TEMPLATE.read_text(encoding="utf-8"), PACKAGED_TEMPLATE
    elif len(source.encode()) == OLD_TEMPLATE_BYTES:
        logger.warning(
            "%s holds the old chat template, which leaks thoughts and loops on tools; "
            "replace it with the chat_template.jinja of google/gemma-4-12B-it, or with %s",
            origin,
            PACKAGED_TEMPLATE,
        )
    try:
        return compile_template(source)
    except (TemplateError, RecursionError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{origin} holds no valid chat template: {one_line(error)}") from None


def find_template(folder: Path, names: dict[str, Any]) -> tuple[str | None, Path]:
    """The template's source and the file it is from, in the order in which transformers looks."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return read_bytes_of(path).decode(), path  # not read_text: line ends count in its size
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}") from None
    for path, holder in (
        (folder / "tokenizer_config.json", names),
        (folder / "chat_template.json", optional_json(folder / "chat_template.json")),
    ):
        found = holder.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get(
                "default"
            )
        if isinstance(found, str) and found:
            return found, path
    return None, folder


def read_settings(folder: Path) -> MediaSettings:
    """What processor_config.json says of media, or the older preprocessor_config.json; else as published."""
    current, older = (optional_json(folder / name) for name in ("processor_config.json", "preprocessor_config.json"))

    def setting(section: str, key: str, default: int, most: int) -> int:
        holders = [current.get(section), older.get(section)]
        if section != "video_processor":
            holders.append(older)  # the older file is often that of the images and sounds alone, without sections
        found = next((h[key] for h in holders if isinstance(h, dict) and h.get(key) is not None), default)
        if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= most:
            raise CheckpointError(
                f"{folder}: {key} of {section} is {shown(found)}; expected a whole number above 0, at most {most}"
            )
        return found

    length = current.get("image_seq_length") or older.get("image_seq_length") or IMAGE_BUDGET
    return MediaSettings(
        image_budget=setting("image_processor", "max_soft_tokens", length, MOST_SOFT_TOKENS),
        video_budget=setting("video_processor", "max_soft_tokens", VIDEO_BUDGET, MOST_SOFT_TOKENS),
        num_frames=setting("video_processor", "num_frames", NUM_FRAMES, MOST_FRAMES),
        sampling_rate=setting("feature_extractor", "sampling_rate", SAMPLING_RATE, MOST_SAMPLING_RATE),
    )


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
