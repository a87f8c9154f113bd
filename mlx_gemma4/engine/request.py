"""What a caller asks for, as one value: checked, and free of the model."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_gemma4.decoding.controller import check_draft_length
from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.errors import a, shown
from mlx_gemma4.prompt.messages import request_messages
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt, is_whole
from mlx_gemma4.reply.repetition import parse_repetition_detection


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a reply is to be written, whatever is asked. ValueError that names the option if one is wrong."""

    max_tokens: int = 1024
    sampling: Sampling = Sampling()
    draft_length: int | str = "auto"
    repetition_detection: str | Mapping[str, int] = "auto"
    scope: str = ""  # whose request it is: what has been read for others is not found in a store

    def __post_init__(self) -> None:
        if not is_whole(self.max_tokens) or not 1 <= self.max_tokens < 2**63:
            raise ValueError(f"max_tokens is {shown(self.max_tokens)}; expected a whole number, 1 or more")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling is {shown(self.sampling)}; expected Sampling(…)")
        check_draft_length(self.draft_length)
        parse_repetition_detection(self.repetition_detection)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked: a string (one user turn, the media placed before it), chat messages, or a `Prompt`."""

    content: str | list[dict[str, Any]] | Prompt
    images: Sequence[Any] = ()
    audios: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    image_budget: int | None = None
    preserve_thinking: bool = False

    def timed_prompt(self, processor: Processor) -> tuple[Prompt, float]:
        """The prompt, and the seconds that making it took."""
        started = time.perf_counter()
        return self.prompt(processor), time.perf_counter() - started

    def prompt(self, processor: Processor) -> Prompt:
        """ValueError if any of it is wrong."""
        content, media = self.content, (self.images, self.audios, self.videos)
        if not isinstance(processor, Processor):
            raise ValueError(f"processor is {a(processor)}; expected what load returns beside the model")
        if isinstance(content, str):
            content = request_messages(content, self.images, self.audios, self.videos, self.system)
        elif not isinstance(content, (list, tuple, Prompt)):
            raise ValueError(f"request is {a(content)}; expected a string, a list of messages or a Prompt")
        elif self.system is not None or not all(isinstance(given, (list, tuple)) and not given for given in media):
            raise ValueError(
                "images, audios, videos and system go with a request that is a string; put them in the messages"
            )
        if isinstance(content, Prompt):
            if self.tools or self.thinking is not False or self.image_budget is not None or self.preserve_thinking:
                raise ValueError(
                    "tools, thinking, preserve_thinking and image_budget go with messages; a Prompt is taken as it "
                    "stands"
                )
            return content
        return processor(
            content,
            tools=self.tools,
            thinking=self.thinking,
            image_budget=self.image_budget,
            preserve_thinking=self.preserve_thinking,
        )
