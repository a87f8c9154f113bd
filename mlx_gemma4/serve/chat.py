"""OpenAI's chat completions: a request -> what is asked; pieces -> its chunks."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.engine.completion import finish_reason, thought_of, tool_choice, usage
from mlx_gemma4.errors import shown
from mlx_gemma4.prompt.messages import KIND_OF, Part
from mlx_gemma4.reply.opening import as_json
from mlx_gemma4.reply.reply import Piece, Reply, Stats
from mlx_gemma4.serve.ask import Ask, Body, Refused, checked, event, new_id
from mlx_gemma4.serve.turns import as_text, file_part

ERRORS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
MOST_CHOICES = 16
DONE = "data: [DONE]\n\n"
PING = ": ping\n"  # not two line breaks, at which some clients look for an event

TokenBytes = Callable[[int], bytes]
Count = Annotated[int, Field(ge=1)]


def as_texts(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


# --- what a request has ------------------------------------------------------------------------


class StreamOptions(Body):
    include_usage: bool | None = None


class Thinking(Body):
    type: str | None = None
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class Allowed(Body):
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class AllowedTools(Body):
    allowed_tools: Allowed


class TemplateOptions(Body):
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None


class Drawn(Body):
    """What chat and text completions have in common."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(as_texts)] = None
    logit_bias: dict[str, float] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty, seed=None if self.seed is None else self.seed % 2**64,
        )  # fmt: skip

    @property
    def bias(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        wrong = next((key for key in self.logit_bias if not key.isdecimal() or len(key) > 9), None)
        if wrong is not None:
            raise Refused(f"logit_bias has the key {shown(wrong)}; expected token ids")
        return {int(key): value for key, value in self.logit_bias.items()}

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Request(Drawn):
    messages: Annotated[list[Any], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: bool | None = None
    return_progress: bool | None = None  # as llama.cpp's server has it
    draft_length: int | None = None  # these two are our own
    image_budget: int | None = None


# --- a request -> what is asked ----------------------------------------------------------------


def conversation(messages: list[Any]) -> list[Any]:
    """The messages with what only chat completions have put into our words; what is wrong is found when they are
    read."""
    return [turn(message, f"messages[{index}]") for index, message in enumerate(messages)]


def turn(message: Any, where: str) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        parts = [part_of(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
        return message | {"content": parts}
    return message | {"content": ""} if content is None and message.get("role") == "assistant" else message


def part_of(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind in KIND_OF:
        return part
    return file_of(part.get("file"), f"{where}.file") if kind == "file" else as_text(part)


def file_of(file: Any, where: str) -> Part:
    if not isinstance(file, dict) or not isinstance(file.get("file_data"), str):
        raise Refused(f"{where} has no file_data; expected data:application/pdf;base64,…", field=f"{where}.file_data")
    return file_part(file.get("filename"), file["file_data"], f"{where}.file_data")


def chosen(choice: Any, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """tool_choice in our words, and the tools that it leaves."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = checked(AllowedTools, choice, "tool_choice").allowed_tools
        names = [tool_choice(tool) for tool in allowed.tools]
        tools = [tool for tool in tools if tool_choice(tool) in names]
        choice = allowed.mode
    return choice_of(choice, tools), tools


def choice_of(choice: Any, tools: list[dict[str, Any]]) -> str:
    """tool_choice in our words; ValueError for a name that no tool has comes with the tools."""
    if choice is None or choice in ("auto", "none"):
        return choice or "auto"
    name = tool_choice(choice) if isinstance(choice, dict) else None
    if choice != "required" and not isinstance(name, str):
        got = shown(choice)
        raise Refused(f"tool_choice is {got}; expected auto, none, required or a function's name")
    if not tools:
        raise Refused("tool_choice asks for a call; expected tools beside it", field="tool_choice")
    return "required" if name is None else name


def thinking_of(request: Request) -> tuple[bool | None, int | None]:
    """Whether to think, None where the request does not say, and for how many tokens."""
    options = request.chat_template_kwargs or TemplateOptions()
    if request.thinking is not None and request.thinking.type is not None:
        return request.thinking.type != "disabled", request.thinking.budget_tokens
    if options.enable_thinking is not None:
        return options.enable_thinking, None
    return thought_of(request.reasoning_effort, "reasoning_effort")


def asked(request: Request) -> Ask:
    if request.functions:  # unheard, they would never be called
        raise Refused("functions is not empty; expected none, and tools in their place")
    if "audio" in (request.modalities or ()):
        raise Refused("modalities has audio; expected text alone")
    tools = [tool for tool in request.tools or () if tool.get("type", "function") == "function"]  # ours to call
    choice, tools = chosen(request.tool_choice, tools)
    thinking, budget = thinking_of(request)
    options = request.chat_template_kwargs or TemplateOptions()
    return Ask(
        messages=conversation(request.messages),
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        response_format=request.response_format,
        thinking=thinking,
        thinking_budget=budget,
        preserve_thinking=options.preserve_thinking is not False,  # who gives thoughts back wants them read
        max_tokens=request.max_completion_tokens or request.max_tokens,
        sampling=request.sampling,
        stop=tuple(request.stop or ()),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        logit_bias=request.bias,
        continue_final_message=bool(request.continue_final_message),
        image_budget=request.image_budget,
        draft_length="auto" if request.draft_length is None else request.draft_length,
        n=request.n or 1,
        stream=bool(request.stream),
    )


# --- pieces -> chunks --------------------------------------------------------------------------


def error_body(refused: Refused) -> dict[str, Any]:
    kind = ERRORS.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    return {"error": {"message": refused.message, "type": kind, "param": refused.field, "code": refused.code}}


class OpenAI:
    """model: the name that stands in replies, whatever name was asked for. token_bytes: what a token stands for."""

    def __init__(self, model: str, token_bytes: TokenBytes):
        self.model, self.token_bytes = model, token_bytes

    def error(self, refused: Refused) -> dict[str, Any]:
        return error_body(refused)


class OpenAIWriter:
    """Of chat or text completions; kind: of the object that a chunk is."""

    def __init__(self, dialect: OpenAI, request: Drawn, prefix: str, kind: str):
        self.token_bytes, self.request, self.kind = dialect.token_bytes, request, kind
        self.head = {"id": new_id(prefix), "created": int(time.time()), "model": dialect.model}
        self.stats: list[Stats] = []

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event(self.head | {"object": self.kind, "choices": choices} | more)

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")

    def end(self) -> Iterator[str]:
        if self.request.include_usage:
            yield self.chunk([], usage=usage(self.stats))
        yield DONE

    def failed(self, refused: Refused) -> Iterator[str]:
        yield event(error_body(refused))
        yield DONE

    def ping(self) -> str:
        return PING


class Chat(OpenAI):
    def parse(self, body: dict[str, Any], scope: str) -> tuple[Ask, "ChatWriter"]:
        request = checked(Request, body)
        writer = ChatWriter(self, request, "chatcmpl-", "chat.completion.chunk")
        return replace(asked(request), progress=writer.progress if request.return_progress else None), writer


class ChatWriter(OpenAIWriter):
    def delta(self, choice: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        return self.chunk([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        for choice in range(self.request.n or 1):
            yield self.delta(choice, {"role": "assistant", "content": ""})

    def piece(self, piece: Piece, choice: int) -> Iterator[str]:
        said = (thought(piece.thinking) if piece.thinking else {}) | ({"content": piece.text} if piece.text else {})
        if said or piece.logprobs:
            yield self.delta(choice, said, logprobs=self.logprobs(piece))
        for part in piece.calls:
            yield self.delta(choice, {"tool_calls": [call_delta(part.index, part.name, part.arguments)]})
        if piece.stats is not None:
            self.stats.append(piece.stats)
            yield self.delta(choice, {}, finish_reason(piece))

    def progress(self, total: int, cached: int, done: int) -> str:
        return self.chunk([], prompt_progress={"total": total, "cache": cached, "processed": done})

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        choices = [
            {"index": index, "message": message(reply), "logprobs": self.logprobs(reply)}
            | {"finish_reason": finish_reason(reply)}
            for index, reply in enumerate(replies)
        ]
        told = usage([reply.stats for reply in replies])
        return self.head | {"object": "chat.completion", "choices": choices, "usage": told}

    def logprobs(self, said: Piece | Reply) -> dict[str, Any] | None:
        if said.logprobs is None:
            return None
        content = [
            self.token(entry["token_id"], entry["logprob"])
            | {"top_logprobs": [self.token(index, value) for index, value in entry["top"].items()]}
            for entry in said.logprobs
        ]
        return {"content": content, "refusal": None}

    def token(self, index: int, logprob: float) -> dict[str, Any]:
        return {"token": self.token_text(index), "logprob": logprob, "bytes": list(self.token_bytes(index))}


def thought(said: str) -> dict[str, str]:
    return {"reasoning_content": said, "reasoning": said}  # clients look for one or the other


def call_delta(index: int, name: str | None, arguments: str) -> dict[str, Any]:
    if name is None:
        return {"index": index, "function": {"arguments": arguments}}
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": new_id("call_"), "type": "function", "function": function}


def message(reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = {"role": "assistant", "content": reply.text or (None if reply.tool_calls else "")}
    if reply.thinking:
        found |= thought(reply.thinking)
    if reply.tool_calls:
        found["tool_calls"] = [
            {"id": new_id("call_"), "type": "function", "function": own | {"arguments": as_json(own["arguments"])}}
            for own in reply.tool_calls
        ]
    return found
