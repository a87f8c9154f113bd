"""OpenAI's Responses: a request -> what is asked; pieces -> its events; what clients go on from by its id."""

import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.engine.completion import thought_of
from mlx_gemma4.errors import shown
from mlx_gemma4.prompt.messages import Part, decode_base64
from mlx_gemma4.prompt.template import strings
from mlx_gemma4.reply.reply import Piece, Reply, Stats
from mlx_gemma4.serve.ask import Ask, Body, Refused, checked, event, new_id
from mlx_gemma4.serve.chat import error_body
from mlx_gemma4.serve.turns import Turns, as_text, file_part, function_tool, sealed, text, unsealed

Item = dict[str, Any]

MOST_STORED = 128  # responses
MOST_CHARACTERS = 256_000_000  # of what was sent with them
SEALED_THOUGHTS, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"


def as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[list[Any], BeforeValidator(as_parts)]
Name = Annotated[str, Field(min_length=1)]


# --- what a request has ------------------------------------------------------------------------


class Reasoning(Body):
    effort: str | None = None
    summary: str | None = None


class Format(Body):
    type: Literal["text", "json_schema", "json_object"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class Text(Body):
    format: Format | None = None


class Request(Body):
    input: Annotated[list[Any], BeforeValidator(as_items)] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: Text | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None


class Message(Body):
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class Call(Body):
    call_id: Name
    name: Name
    namespace: Name | None = None


class FunctionCall(Call):
    arguments: str
    status: str | None = None


class CustomCall(Call):
    input: str


class Output(Body):
    call_id: Name
    output: Parts


class Told(Body):
    text: str


class Thought(Body):
    summary: list[Told] | None = None
    content: list[Told] | None = None
    encrypted_content: str | None = None


class Reference(Body):
    id: Name


class Image(Body):
    image_url: str


class Sound(Body):
    data: str


class Audio(Body):
    input_audio: Sound


class File(Body):
    file_data: str | None = None
    file_url: str | None = None
    filename: str | None = None


class MoreTools(Body):
    tools: list[dict[str, Any]]


class Namespace(MoreTools):
    name: Name


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Grammar(Body):
    type: str
    syntax: str = ""
    definition: str = ""


class Custom(Body):
    name: Name
    description: str | None = None
    format: Grammar | None = None


# --- a request -> what is asked ----------------------------------------------------------------


def add_item(turns: Turns, item: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise Refused(f"{where} is {shown(item)}; expected an item such as {{role: user, content: …}}")
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        add_message(turns, checked(Message, item, where), where)
    elif kind == "reasoning":
        thought = checked(Thought, item, where)
        told = [part.text for part in thought.content or ()] or [unsealed(thought.encrypted_content or "")]
        turns.think("\n".join(told if any(told) else [part.text for part in thought.summary or ()]))
    elif kind == "function_call":
        add_call(turns, checked(FunctionCall, item, where), f"{where}.arguments")
    elif kind == "custom_tool_call":
        custom = checked(CustomCall, item, where)
        turns.call(custom.call_id, joined_name(custom.namespace, custom.name), {"input": custom.input})
    elif kind in ("function_call_output", "custom_tool_call_output"):
        output = checked(Output, item, where)
        turns.result(output.call_id, parts_of(output.output, f"{where}.output"), f"{where}.call_id")
    else:
        turns.add("user", [as_text(item)])


def add_message(turns: Turns, message: Message, where: str) -> None:
    parts = parts_of(message.content, f"{where}.content")
    if message.role == "user":
        turns.add("user", parts)
        return
    if any(part["type"] != "text" for part in parts):
        kind = next(part["type"] for part in parts if part["type"] != "text")
        raise Refused(f"{where}.content holds {kind}; expected text in a message of the {message.role}")
    if message.role == "assistant":
        turns.say("".join(part["text"] for part in parts))
    else:  # in its place: moved to the front, it would change all that has been read
        turns.add("system", parts)


def add_call(turns: Turns, call: FunctionCall, where: str) -> None:
    try:
        arguments = json.loads(call.arguments) if call.arguments.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        turns.call(call.call_id, joined_name(call.namespace, call.name), arguments)
    elif call.status != "incomplete":  # one that was cut has never been made
        raise Refused(f"{where} is {shown(call.arguments)}; expected a JSON object")


def parts_of(content: list[Any], where: str) -> list[Part]:
    return [part_of(part, f"{where}[{place}]") for place, part in enumerate(content)]


def part_of(part: Any, where: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise Refused(f"{where} has no type; expected a part such as {{type: input_text, text: …}}")
    if kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
        return text(checked(Told, part, where).text)
    if kind in ("input_image", "input_file") and part.get("file_id") is not None:
        raise Refused(f"{where}.file_id is {shown(part['file_id'])}; expected what it holds: no files are kept here")
    if kind == "input_image":
        return {"type": "image", "image": checked(Image, part, where).image_url}
    if kind == "input_audio":
        data = checked(Audio, part, where).input_audio.data
        return {"type": "audio", "audio": decode_base64(data, f"{where}.input_audio.data")}
    return file_of(checked(File, part, where), where) if kind == "input_file" else as_text(part)


def file_of(file: File, where: str) -> Part:
    if file.file_data is None and file.file_url is None:
        raise Refused(f"{where}.file_data is missing; expected data:application/pdf;base64,…")
    if file.file_data is None:
        return {"type": "pdf", "pdf": file.file_url}
    return file_part(file.filename, file.file_data, f"{where}.file_data")


@dataclass(frozen=True)
class Offered:
    """What a client calls a tool, and whether that one takes any text."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def declared(
    tools: list[dict[str, Any]], where: str = "tools", namespace: str | None = None
) -> tuple[list[dict[str, Any]], dict[str, Offered]]:
    """Functions, and by the name that each has there what it is to the client. Tools of other kinds, such as
    web_search, are their servers' or clients' own to run."""
    functions, offered = list[dict[str, Any]](), dict[str, Offered]()
    for n, tool in enumerate(tools):
        kind, here = tool.get("type"), f"{where}[{n}]"
        if kind == "namespace" and namespace is None:
            group = checked(Namespace, tool, here)
            inner, told = declared(group.tools, f"{here}.tools", group.name)
            functions += inner
            offered |= told
        elif kind in ("function", "custom"):
            own = checked(Function, tool, here) if kind == "function" else checked(Custom, tool, here)
            name = joined_name(namespace, own.name)
            functions.append(function_tool(name, own.description, parameters_of(own)))
            offered[name] = Offered(own.name, namespace, kind == "custom")
    return functions, offered


def joined_name(namespace: str | None, name: str) -> str:
    """How the model calls a tool of a namespace, such as Codex makes of each MCP server: mcp__files__read."""
    return name if namespace is None else f"{namespace.removesuffix('__')}__{name}"


def parameters_of(tool: "Function | Custom") -> dict[str, Any]:
    if isinstance(tool, Function):
        return tool.parameters or schema_of({})
    return schema_of({"input": input_of(tool)}) | {"required": ["input"]}


def schema_of(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def input_of(tool: Custom) -> dict[str, Any]:
    if tool.format is None or tool.format.type != "grammar":
        return {"type": "string"}
    return {"type": "string", "description": f"Of this {tool.format.syntax} grammar:\n{tool.format.definition}"}


def chosen(choice: Any, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """tool_choice in our words, and the tools that it leaves."""
    if choice is None:
        return "auto", tools
    if choice in ("auto", "none", "required"):
        return choice, tools
    if not isinstance(choice, dict):
        raise Refused(f"tool_choice is {shown(choice)}; expected auto, none, required or an object")
    names = [tool["function"]["name"] for tool in tools]
    kind = choice.get("type")
    if kind == "allowed_tools":
        allowed = [tool.get("name") for tool in choice.get("tools") or () if isinstance(tool, dict)]
        return chosen(choice.get("mode"), [tool for tool in tools if tool["function"]["name"] in allowed])
    if kind not in ("function", "custom"):
        raise Refused(f"tool_choice.type is {shown(kind)}; expected function, custom or allowed_tools")
    if choice.get("name") not in names:
        raise Refused(f"tool_choice.name is {shown(choice.get('name'))}; expected the name of one of the tools")
    return str(choice["name"]), tools


def response_format(form: Format | None) -> Any:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return "json"
    if form.schema_ is None:
        raise Refused("text.format.schema is missing; expected a JSON schema")
    return form.schema_


# --- what is kept ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    items: list[Item]  # all that was said up to its end
    characters: int  # of what came with it


@dataclass
class Shelf:
    """The last responses, by whose they are and their id."""

    stored: "OrderedDict[tuple[str, str], Stored]" = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)

    def keep(self, scope: str, id: str, before: list[Item], new: list[Item]) -> None:
        with self.lock:
            self.stored[scope, id] = Stored([*before, *new], sum(map(len, strings(new))))
            while len(self.stored) > MOST_STORED or self.characters() > MOST_CHARACTERS:
                self.stored.popitem(last=False)

    def characters(self) -> int:
        return sum(one.characters for one in self.stored.values())

    def items(self, scope: str, id: str) -> list[Item]:
        with self.lock:
            if (scope, id) not in self.stored:
                message = f"Previous response with id {shown(id)} not found; expected one of the last {MOST_STORED}."
                raise Refused(message, status=404, field="previous_response_id", code="previous_response_not_found")
            self.stored.move_to_end((scope, id))
            return self.stored[scope, id].items

    def item(self, scope: str, id: str, where: str) -> Item:
        """One that a response had, whichever."""
        with self.lock:
            kept = [one.items for (whose, _), one in self.stored.items() if whose == scope]
        found = next((item for items in reversed(kept) for item in items if item.get("id") == id), None)
        if found is None:
            raise Refused(f"Item with id {shown(id)} not found.", status=404, field=where)
        return found


# --- pieces -> events --------------------------------------------------------------------------


class Responses:
    """model: the name that stands in replies. shelf: of what can be referred to."""

    def __init__(self, model: str, shelf: Shelf):
        self.model, self.shelf = model, shelf

    def parse(self, body: dict[str, Any], scope: str) -> tuple[Ask, "ResponseWriter"]:
        request = checked(Request, body)
        for key, value in (("background", request.background), ("prompt", request.prompt)):
            if value:
                raise Refused(f"{key} is {shown(value)}; expected none: this server has no such thing")
        if request.conversation is not None:
            raise Refused("conversation is given; expected previous_response_id")
        before = [] if request.previous_response_id is None else self.shelf.items(scope, request.previous_response_id)
        new = [self.referred(scope, item, f"input[{n}]") for n, item in enumerate(request.input)]
        turns = Turns()
        if request.instructions:
            turns.add("system", [text(request.instructions)])
        more: list[tuple[Item, str]] = []
        for n, item in enumerate([*before, *new]):
            where = f"input[{max(n - len(before), 0)}]"
            if isinstance(item, dict) and item.get("type") == "additional_tools":
                more.append((item, where))
            else:
                add_item(turns, item, where)
        if not turns.messages:
            raise Refused("input is empty; expected a text or items")
        tools, offered = declared(request.tools or [])
        for item, where in more:
            inner, told = declared(checked(MoreTools, item, where).tools, f"{where}.tools")
            tools, offered = [*tools, *inner], offered | told
        tool_choice, tools = chosen(request.tool_choice, tools)
        if LOGPROBS in (request.include or ()):
            raise Refused(f"include holds {LOGPROBS}; expected it in /v1/chat/completions")
        form = response_format(request.text.format if request.text else None)
        thinking, budget = thought_of(request.reasoning.effort if request.reasoning else None, "reasoning.effort")
        ask = Ask(
            messages=turns.messages,
            tools=tools or None,
            tool_choice=tool_choice,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            response_format=form,
            thinking=thinking,
            thinking_budget=budget,
            preserve_thinking=True,  # a client that gives thoughts back wants them read
            max_tokens=request.max_output_tokens,
            sampling=Sampling(temperature=request.temperature, top_p=request.top_p),
            stream=bool(request.stream),
        )
        return ask, ResponseWriter(self.model, request, body, offered, self.shelf, scope, before, new)

    def referred(self, scope: str, item: Any, where: str) -> Any:
        """The item that a reference names, or the item itself."""
        if not isinstance(item, dict):
            return item
        if item.get("type") == "item_reference" or (item.get("type") is None and item.keys() <= {"id", "type"}):
            return self.shelf.item(scope, checked(Reference, item, where).id, f"{where}.id")
        return item

    def error(self, refused: Refused) -> dict[str, Any]:
        return error_body(refused)


SAID = {"function_call": "arguments", "custom_tool_call": "input"}  # under which a call has what was said; else text
PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_", "custom_tool_call": "ctc_"}
EVENTS = {
    "reasoning": "response.reasoning_text", "summary": "response.reasoning_summary_text",
    "message": "response.output_text", "function_call": "response.function_call_arguments",
    "custom_tool_call": "response.custom_tool_call_input",
}  # fmt: skip


@dataclass
class Writing:
    """An item while it is written; said: its text, or its arguments as JSON."""

    kind: str
    said: str = ""
    name: str = ""
    namespace: str | None = None

    def __post_init__(self) -> None:
        self.id, self.call_id = new_id(PREFIXES[self.kind]), new_id("call_")

    @property
    def text(self) -> str:
        """What a custom tool gets is the one argument that we gave it."""
        if self.kind != "custom_tool_call" or not self.said:
            return self.said
        return str(json.loads(self.said if self.said.endswith("}") else self.said + "}").get("input", ""))


@dataclass
class ResponseWriter:
    """body: the request as it came, of which a response repeats what was asked; before and new: the items that were
    there and those that came with it; offered: the tools, by the names that the model has for them."""

    model: str
    request: Request
    body: dict[str, Any]
    offered: dict[str, Offered]
    shelf: Shelf
    scope: str
    before: list[Item]
    new: list[Item]

    def __post_init__(self) -> None:
        self.id, self.created_at = new_id("resp_"), int(time.time())
        reasoning = self.request.reasoning or Reasoning()
        self.summarized = reasoning.summary is not None  # clients show a summary where they asked for one
        self.seals = SEALED_THOUGHTS in (self.request.include or ())
        self.sent = 0  # events
        self.output: list[Item] = []
        self.open: Writing | None = None
        self.name = ""  # of the call that has begun, of whose arguments nothing is known
        self.last: Piece | None = None

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        if not self.sent:  # by a ping
            yield self.told("response.created", {"response": self.response("in_progress")})
        yield self.told("response.in_progress", {"response": self.response("in_progress")})

    def piece(self, piece: Piece, choice: int) -> Iterator[str]:
        for kind, said in (("reasoning", piece.thinking), ("message", piece.text)):
            if said:
                if self.open is None or self.open.kind != kind:
                    yield from self.opened(Writing(kind))
                yield from self.add(said)
        for part in piece.calls:
            if part.name is not None:
                yield from self.closed()
                self.name = part.name
            if part.arguments:
                if self.open is None:
                    yield from self.opened(self.call(self.name))
                yield from self.add(part.arguments)
        if piece.finish_reason is not None:
            self.last = piece

    def end(self) -> Iterator[str]:
        assert self.last is not None and self.last.stats is not None
        ending = "completed" if self.last.finish_reason == "stop" else "incomplete"
        yield from self.closed(ending)
        self.keep()
        yield self.told(f"response.{ending}", {"response": self.response(ending, usage(self.last.stats))})

    def failed(self, refused: Refused) -> Iterator[str]:
        code = refused.code or ("invalid_prompt" if refused.status < 500 else "server_error")
        response = self.response("failed") | {"error": {"code": code, "message": refused.message}}
        yield self.told("response.failed", {"response": response})

    def ping(self) -> str:
        return "".join(self.begin(0))  # no comment: clients count events

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        (reply,) = replies
        written = [Writing("reasoning", reply.thinking)] if reply.thinking else []
        written += [Writing("message", reply.text)] if reply.text else []
        written += [
            self.call(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in reply.tool_calls
        ]
        ending = "completed" if reply.finish_reason == "stop" else "incomplete"
        self.output = [self.item(one) for one in written]
        self.keep()
        return self.response(ending, usage(reply.stats))

    def keep(self) -> None:
        if self.request.store is not False:
            self.shelf.keep(self.scope, self.id, self.before, [*self.new, *self.output])

    # --- items

    def call(self, name: str, arguments: str = "") -> Writing:
        tool = self.offered.get(name, Offered(name))
        kind = "custom_tool_call" if tool.is_custom else "function_call"
        return Writing(kind, arguments, tool.name, tool.namespace)

    def opened(self, item: Writing) -> Iterator[str]:
        yield from self.closed()
        self.open = item
        yield self.told("response.output_item.added", {"item": self.item(item, "in_progress")} | self.place)
        yield from self.part("added", item, "")

    def add(self, said: str) -> Iterator[str]:
        assert self.open is not None
        self.open.said += said
        if self.open.kind != "custom_tool_call":  # what arrives is JSON, what goes out is not
            yield self.step("delta", self.open, {"delta": said})

    def closed(self, ending: str = "completed") -> Iterator[str]:
        item, self.name = self.open, ""
        if item is None:
            return
        if item.kind == "custom_tool_call":
            yield self.step("delta", item, {"delta": item.text})
        yield self.step("done", item, {SAID.get(item.kind, "text"): item.text})
        yield from self.part("done", item, item.text)
        self.output.append(self.item(item, ending))
        self.open = None
        yield self.told("response.output_item.done", {"item": self.output[-1], "output_index": len(self.output) - 1})

    @property
    def place(self) -> dict[str, Any]:
        return {"output_index": len(self.output)}

    def event(self, item: Writing) -> str:
        return EVENTS["summary" if item.kind == "reasoning" and self.summarized else item.kind]

    def within(self, item: Writing) -> dict[str, Any]:
        """Which part of its item is written: each has one."""
        if item.kind == "message":
            return {"content_index": 0, "logprobs": []}
        if item.kind == "reasoning":
            return {"summary_index" if self.summarized else "content_index": 0}
        return {}

    def step(self, name: str, item: Writing, said: dict[str, str]) -> str:
        return self.told(f"{self.event(item)}.{name}", {"item_id": item.id} | said | self.place | self.within(item))

    def part(self, ending: str, item: Writing, said: str) -> Iterator[str]:
        if item.kind in ("message", "reasoning"):
            name = "reasoning_summary_part" if item.kind == "reasoning" and self.summarized else "content_part"
            place = {key: value for key, value in self.within(item).items() if key != "logprobs"}
            part = {"part": self.text_part(item, said)}
            yield self.told(f"response.{name}.{ending}", {"item_id": item.id} | part | self.place | place)

    def text_part(self, item: Writing, said: str) -> dict[str, Any]:
        if item.kind == "message":
            return {"type": "output_text", "text": said, "annotations": [], "logprobs": []}
        return {"type": "summary_text" if self.summarized else "reasoning_text", "text": said}

    def item(self, item: Writing, status: str = "completed") -> Item:
        head = {"id": item.id, "type": item.kind, "status": status}
        parts = [] if status == "in_progress" else [self.text_part(item, item.said)]
        if item.kind == "message":
            return head | {"role": "assistant", "content": parts}
        if item.kind in SAID:
            place = {} if item.namespace is None else {"namespace": item.namespace}
            return head | {"call_id": item.call_id, "name": item.name, SAID[item.kind]: item.text} | place
        seal = sealed(item.said) if self.seals and parts else None
        summary, content = (parts, []) if self.summarized else ([], parts)
        return head | {"summary": summary, "content": content, "encrypted_content": seal}

    def response(self, status: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        request, repeated = self.request, ("instructions", "metadata", "previous_response_id", "temperature", "top_p")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": [] if status == "in_progress" else self.output,
            "max_output_tokens": request.max_output_tokens,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "reasoning": self.body.get("reasoning") or {"effort": None, "summary": None},
            "store": request.store is not False,
            "text": self.body.get("text") or {"format": {"type": "text"}},
            "tool_choice": self.body.get("tool_choice") or "auto",
            "tools": request.tools or [],
            "truncation": "disabled",
            "usage": usage,
            **{key: self.body.get(key) for key in repeated},
        }

    def told(self, kind: str, fields: dict[str, Any]) -> str:
        self.sent += 1
        return event({"type": kind, "sequence_number": self.sent - 1, **fields}, kind)


def usage(stats: Stats) -> dict[str, Any]:
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": stats.generation_tokens,
        "output_tokens_details": {"reasoning_tokens": stats.thinking_tokens},
        "total_tokens": stats.prompt_tokens + stats.generation_tokens,
    }
