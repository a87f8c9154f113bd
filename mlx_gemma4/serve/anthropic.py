"""Anthropic's Messages: a request -> what is asked; pieces -> its events."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.engine.completion import thought_of
from mlx_gemma4.errors import shown
from mlx_gemma4.prompt.messages import Part, decode_base64
from mlx_gemma4.reply.reply import Piece, Reply, Stats
from mlx_gemma4.serve.ask import Ask, Body, Refused, checked, event, new_id
from mlx_gemma4.serve.turns import Turns, as_text, function_tool, sealed, text, unsealed

BILLING = "x-anthropic-billing-header:"  # Claude Code's first line of the system turn, another at every request
ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip


def as_blocks(content: Any) -> Any:
    return [text(content)] if isinstance(content, str) else content


Blocks = Annotated[list[Any], BeforeValidator(as_blocks)]
Name = Annotated[str, Field(min_length=1)]


# --- what a request has ------------------------------------------------------------------------


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: Blocks


class Thinking(Body):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Format(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class Output(Body):
    format: Format | None = None
    effort: str | None = None


class Request(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    system: Blocks | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: the prompt is read for those that follow
    stop_sequences: list[Name] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    thinking: Thinking | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Choice | None = None
    output_config: Output | None = None
    output_format: Format | None = None
    mcp_servers: list[Any] | None = None
    thread: dict[str, Any] | None = None


class TextBlock(Body):
    text: str


class Source(Body):
    type: Literal["base64", "url", "text", "content", "file"]
    data: str | None = None
    url: str | None = None
    content: Blocks | None = None


class MediaBlock(Body):
    source: Source
    title: str | None = None
    context: str | None = None


class ThinkingBlock(Body):
    thinking: str
    signature: str | None = None


class RedactedBlock(Body):
    data: str


class CallBlock(Body):
    id: Name
    name: Name
    input: dict[str, Any]


class ResultBlock(Body):
    tool_use_id: Name
    content: Blocks | None = None
    is_error: bool | None = None


class Tool(Body):
    name: Name
    input_schema: dict[str, Any]
    description: str | None = None


# --- a request -> what is asked ----------------------------------------------------------------


def conversation(request: Request) -> Turns:
    turns = Turns()
    add_system(turns, request.system or [], "system")
    for n, message in enumerate(request.messages):
        where = f"messages[{n}].content"
        if message.role == "assistant":
            for place, block in enumerate(message.content):
                add_assistant(turns, block, f"{where}[{place}]")
        elif message.role == "system":  # in its place: moved to the front, it would change all that has been read
            add_system(turns, message.content, where)
        else:
            add_user(turns, message.content, where)
    return turns


def add_system(turns: Turns, blocks: list[Any], where: str) -> None:
    """A system turn, without the line that says nothing to the model."""
    parts: list[Part] = []
    for place, block in enumerate(blocks):
        here = f"{where}[{place}]"
        kind = kind_of(block, here)
        if kind in ("image", "document"):
            raise Refused(f"{here}.type is {shown(kind)}; expected text")
        told = checked(TextBlock, block, here).text if kind == "text" else as_text(block)["text"]
        told = told.partition("\n")[2] if told.startswith(BILLING) else told
        parts += [text(told)] if told else []
    if parts:
        turns.add("system", parts)


def kind_of(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise Refused(f"{where} has no type; expected a block such as {{type: text, text: …}}")
    return kind


def add_assistant(turns: Turns, block: Any, where: str) -> None:
    kind = kind_of(block, where)
    turns.assistant()
    if kind == "text":
        turns.say(checked(TextBlock, block, where).text)
    elif kind == "thinking":
        thought = checked(ThinkingBlock, block, where)
        turns.think(thought.thinking or unsealed(thought.signature or ""))
    elif kind == "redacted_thinking":
        turns.think(unsealed(checked(RedactedBlock, block, where).data))
    elif kind == "tool_use":
        call = checked(CallBlock, block, where)
        turns.call(call.id, call.name, call.input)
    else:
        turns.say(as_text(block)["text"])


def add_user(turns: Turns, blocks: list[Any], where: str) -> None:
    parts: list[Part] = []
    for place, block in enumerate(blocks):
        here = f"{where}[{place}]"
        if kind_of(block, here) == "tool_result":
            result = checked(ResultBlock, block, here)
            found = parts_of(result.content or [], f"{here}.content")
            found = [text("Error:"), *found] if result.is_error else found
            turns.result(result.tool_use_id, found, f"{here}.tool_use_id")
        else:
            parts += part_of(block, here)
    if parts or not blocks:
        turns.add("user", parts)


def parts_of(blocks: list[Any], where: str) -> list[Part]:
    return [part for place, block in enumerate(blocks) for part in part_of(block, f"{where}[{place}]")]


def part_of(block: Any, where: str) -> list[Part]:
    kind = kind_of(block, where)
    if kind == "text":
        return [text(checked(TextBlock, block, where).text)]
    if kind not in ("image", "document"):
        return [as_text(block)]
    media = checked(MediaBlock, block, where)
    about = [text(line) for line in (media.title, media.context) if line]
    return [*about, *media_of(media.source, kind, f"{where}.source")]


def media_of(source: Source, kind: str, where: str) -> list[Part]:
    key = {"base64": "data", "text": "data", "file": "type"}.get(source.type, source.type)
    value = {"data": source.data, "url": source.url, "content": source.content}.get(key)
    if source.type == "file" or (kind == "image" and source.type in ("text", "content")):
        kinds = "base64 or url" if kind == "image" else "base64, url, text or content"
        raise Refused(f"{where}.type is {shown(source.type)}; expected {kinds}")
    if value is None:
        raise Refused(f"{where}.{key} is missing; expected a value", field=f"{where}.{key}")
    if isinstance(value, list):
        inner = [kind_of(block, f"{where}.content[{place}]") for place, block in enumerate(value)]
        if "document" in inner:
            raise Refused(f"{where}.content holds a document; expected texts and images")
        return parts_of(value, f"{where}.content")
    if source.type == "text":
        return [text(value)]
    part = "image" if kind == "image" else "pdf"
    return [{"type": part, part: decode_base64(value, f"{where}.data") if source.type == "base64" else value}]


def functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are described; the others, such as web_search_20250305, only their server or client could run."""
    found = []
    for n, tool in enumerate(tools):
        if tool.get("type") in (None, "custom"):
            told = checked(Tool, tool, f"tools[{n}]")
            found.append(function_tool(told.name, told.description, told.input_schema))
    return found


def choice_of(choice: Choice | None, tools: list[dict[str, Any]]) -> str:
    if choice is None or choice.type in ("auto", "none"):
        return "auto" if choice is None else choice.type
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise Refused(f"tool_choice.type is {shown(choice.type)}; expected tools beside it", field="tools")
    if choice.type == "tool" and choice.name not in names:
        raise Refused(f"tool_choice.name is {shown(choice.name)}; expected the name of one of the tools")
    return "required" if choice.type == "any" else str(choice.name)


def asked(body: dict[str, Any]) -> tuple[Ask, Request]:
    request = checked(Request, body)
    if request.mcp_servers:
        raise Refused("mcp_servers is not empty; expected none: this server calls no others")
    if request.thread is not None:  # by this code clients know that they are to send all that was said, as before
        message = "thread is given; expected the whole conversation: this server keeps none"
        raise Refused(message, field="thread", code="thread_unsupported_request")
    turns = conversation(request)
    tools = functions(request.tools or [])
    output = request.output_config or Output()
    form = output.format or request.output_format
    thinking, (_, budget) = request.thinking, thought_of(output.effort, "output_config.effort")
    if thinking is not None and thinking.budget_tokens is not None:
        budget = thinking.budget_tokens
    if not turns.messages:
        raise Refused("messages say nothing; expected a text, an image or a document", field="messages")
    last = turns.messages[-1]
    if last.get("tool_calls"):
        raise Refused("messages end with a tool_use; expected its tool_result behind it", field="messages")
    ask = Ask(
        messages=turns.messages,
        tools=tools or None,
        tool_choice=choice_of(request.tool_choice, tools),
        parallel_tool_calls=not (request.tool_choice and request.tool_choice.disable_parallel_tool_use),
        response_format=None if form is None else form.schema_,
        thinking=None if thinking is None else thinking.type != "disabled",
        thinking_budget=budget,
        preserve_thinking=True,  # a client that gives thoughts back wants them read
        max_tokens=request.max_tokens,
        sampling=Sampling(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k),
        stop=tuple(request.stop_sequences or ()),
        continue_final_message=last["role"] == "assistant",
        stream=bool(request.stream),
    )
    return ask, request


# --- pieces -> events --------------------------------------------------------------------------


def usage(stats: Stats | None, prompt_tokens: int) -> dict[str, Any]:
    """What is not cached stands apart. Before the last piece the prompt's length is all that is known."""
    cached = 0 if stats is None else stats.cached_tokens
    counts = {
        "input_tokens": prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": 0 if stats is None else stats.generation_tokens,
    }
    return counts if stats is None else counts | {"output_tokens_details": {"thinking_tokens": stats.thinking_tokens}}


class Anthropic:
    """model: the name that stands in replies, whatever name was asked for."""

    def __init__(self, model: str):
        self.model = model

    def parse(self, body: dict[str, Any], scope: str) -> tuple[Ask, "MessageWriter"]:
        ask, request = asked(body)
        omits = request.thinking is not None and request.thinking.display == "omitted"
        return ask, MessageWriter(self.model, omits)

    def error(self, refused: Refused) -> dict[str, Any]:
        return {"type": "error"} | error_of(refused)


class MessageWriter:
    """omits: the client wants thoughts sealed only."""

    def __init__(self, model: str, omits: bool):
        self.omits = omits
        self.message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self.index = -1
        self.block: str | None = None  # the type of the one that is open
        self.thought = ""  # of that one
        self.name = ""  # of the call that has begun; its block does when something is known of its arguments
        self.last: Piece | None = None

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        ending = {"stop_reason": None, "stop_sequence": None, "usage": usage(None, prompt_tokens)}
        yield told("message_start", {"message": {**self.message, "content": [], **ending}})

    def piece(self, piece: Piece, choice: int) -> Iterator[str]:
        if piece.thinking:
            yield from self.opened("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self.thought += piece.thinking
            if not self.omits:
                yield self.delta({"type": "thinking_delta", "thinking": piece.thinking})
        if piece.text:
            yield from self.opened("text", text(""))
            yield self.delta({"type": "text_delta", "text": piece.text})
        for part in piece.calls:
            if part.name is not None:
                yield from self.closed()
                self.name = part.name
            if part.arguments:
                yield from self.opened("tool_use", call_block(self.name, {}))
                yield self.delta({"type": "input_json_delta", "partial_json": part.arguments})
        if piece.finish_reason is not None:
            self.last = piece

    def end(self) -> Iterator[str]:
        yield from self.closed()
        assert self.last is not None and self.last.stats is not None
        stats = self.last.stats
        yield told("message_delta", {"delta": ending(self.last), "usage": usage(stats, stats.prompt_tokens)})
        yield told("message_stop")

    def opened(self, kind: str, block: dict[str, Any]) -> Iterator[str]:
        if self.block == kind:
            return
        yield from self.closed()
        self.index += 1
        self.block = kind
        yield told("content_block_start", {"index": self.index, "content_block": block})

    def closed(self) -> Iterator[str]:
        if self.block == "thinking":
            yield self.delta({"type": "signature_delta", "signature": sealed(self.thought)})
        if self.block is not None:
            yield told("content_block_stop", {"index": self.index})
        self.block, self.thought = None, ""

    def delta(self, delta: dict[str, Any]) -> str:
        return told("content_block_delta", {"index": self.index, "delta": delta})

    def failed(self, refused: Refused) -> Iterator[str]:
        yield told("error", error_of(refused))

    def ping(self) -> str:
        return told("ping")

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        (reply,) = replies
        content: list[dict[str, Any]] = []
        if reply.thinking:
            shown = "" if self.omits else reply.thinking
            content.append({"type": "thinking", "thinking": shown, "signature": sealed(reply.thinking)})
        if reply.text:
            content.append(text(reply.text))
        content += [call_block(call["name"], call["arguments"]) for call in reply.tool_calls]
        stats = reply.stats
        return self.message | {"content": content, **ending(reply), "usage": usage(stats, stats.prompt_tokens)}


def told(kind: str, fields: dict[str, Any] | None = None) -> str:
    return event({"type": kind, **(fields or {})}, kind)


def error_of(refused: Refused) -> dict[str, Any]:
    details = {} if refused.code is None else {"details": {"error_code": refused.code}}
    return {"error": {"type": ERRORS.get(refused.status, "api_error"), "message": refused.message} | details}


def call_block(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": arguments}


def ending(last: Piece | Reply) -> dict[str, Any]:
    reason = "stop_sequence" if last.stop else "tool_use" if last.tool_calls else "end_turn"
    return {"stop_reason": reason if last.finish_reason == "stop" else "max_tokens", "stop_sequence": last.stop or None}
