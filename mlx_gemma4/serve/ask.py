"""What a client asks, whatever its protocol; and what a protocol is to the server."""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.errors import LONGEST, a, shown, unbroken
from mlx_gemma4.reply.reply import Piece, Reply

# What a message of ours begins with that names a field: `messages[2].content[0] is …`, `top_p is …`.
PLACE = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*) (?:is|has|holds)\b")
# What pydantic calls a type, and what a client calls it.
EXPECTED = {
    "string_type": "a string", "int_type": "a whole number", "int_parsing": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number",
    "bool_type": "true or false", "bool_parsing": "true or false", "list_type": "a list", "dict_type": "an object",
    "model_type": "an object", "model_attributes_type": "an object", "missing": "a value",
    "too_short": "at least one",
}  # fmt: skip


class Refused(ValueError):
    """A request that cannot be done; each protocol writes it in its own form. The message is one line."""

    def __init__(self, message: str, *, status: int = 400, field: str | None = None, code: str | None = None):
        """field: what is wrong, as the protocol names it; None: found in the message. code: for programs, such as
        "context_length_exceeded"."""
        super().__init__(unbroken(message))
        found = PLACE.match(message) if status == 400 else None
        self.message = unbroken(message)
        self.status, self.code = status, code
        self.field = found[1] if field is None and found is not None else field


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request for replies, in the words of `Engine.submit`.

    messages: our chat messages; beside their parts there is {"type": "pdf", "pdf": bytes or a data: URL}, which the
    server turns into images and text. Media sources are as the client wrote them, base64 as bytes or under `data`:
    which of them may be opened is the server's to say. prompts: in place of messages, texts or token ids to be gone on
    with as they stand.
    """

    messages: list[dict[str, Any]] | None = None
    prompts: tuple[str | list[int], ...] = ()
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    response_format: Any = None
    thinking: bool | None = None  # None: as the server was started
    thinking_budget: int | None = None
    preserve_thinking: bool = False
    max_tokens: int | None = None  # None: the rest of the context
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # so many alternatives beside each token's own
    logit_bias: dict[int, float] | None = None
    continue_final_message: bool = False
    image_budget: int | None = None
    draft_length: int | str = "auto"
    adapter: str | None = None  # of those by name
    n: int = 1  # replies to the messages, or to each of the prompts
    echo: bool = False  # a prompt is the first piece of its replies, with the logprobs of its tokens if these are asked
    stream: bool = False
    # What a stream says of how far the prompt is read: (tokens of it, not read again, read or not to be read).
    progress: Callable[[int, int, int], str] | None = None


class Writer(Protocol):
    """Writes the replies to one request; made for each. What it gives for a stream is whole server-sent events."""

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        """What is sent before anything of the reply is known; pings may have been before it."""

    def piece(self, piece: Piece, choice: int) -> Iterator[str]:
        """choice: which of the `n` replies it belongs to. The last piece of each has finish_reason and stats."""

    def end(self) -> Iterator[str]:
        """After the last piece of the last reply."""

    def failed(self, refused: Refused) -> Iterator[str]:
        """What went wrong after the reply had begun; nothing follows."""

    def ping(self) -> str:
        """Sent where nothing else has been for a while."""

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""


class Dialect(Protocol):
    """One of the protocols; the server has one object of each for all requests."""

    def parse(self, body: dict[str, Any], scope: str) -> tuple[Ask, Writer]:
        """scope: whose request it is; what others left here is not theirs. Refused if the body is wrong."""

    def error(self, refused: Refused) -> dict[str, Any]:
        """The body of an answer that says so."""


class Body(BaseModel):
    """What of a request's JSON matters; the rest is ignored. A wrong type is an error, a number never a string's."""

    model_config = ConfigDict(extra="ignore", strict=True, arbitrary_types_allowed=True)


Checked = TypeVar("Checked", bound=Body)


def checked(kind: type[Checked], body: dict[str, Any], where: str = "") -> Checked:
    """Refused, naming the field, for what is not of this kind. where: the place of what is not the whole body."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
        place = (where + keys).removeprefix(".")
        if first["type"] == "missing":
            raise Refused(f"{place} is missing; expected a value", field=place) from None
        got = (
            a(first["input"]) if first["input"] and isinstance(first["input"], (dict, list)) else shown(first["input"])
        )
        expected = EXPECTED.get(first["type"], first["msg"].removeprefix("Input should be ")[:LONGEST])
        raise Refused(f"{place} is {got}; expected {expected}", field=place) from None


def event(data: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def new_id(prefix: str) -> str:
    """One that no other request has: chatcmpl-…"""
    return prefix + secrets.token_hex(12)
