"""Chat messages as people write them -> messages in the one spelling that the chat template takes."""

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from mlx_gemma4.errors import a, article, shown
from mlx_gemma4.media.source import url_scheme
from mlx_gemma4.reply.toolcall import MAX_DEPTH

Message = dict[str, Any]  # checked: role and content, content a string or parts
Part = dict[str, Any]  # checked: {"type": "text", "text": str} or {"type": kind, kind: source}
Source = tuple[dict[str, Any], tuple[str, ...], str]  # what holds a media part's value, under which keys, and its place

ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("image", "audio", "video")
SLOWEST, FASTEST = 1e-6, 1e6  # images a second: from one in 11 days to any camera
KIND_OF = {
    "text": "text", "input_text": "text", "output_text": "text", "input_image": "image", "input_audio": "audio",
    **{f"{kind}_url": kind for kind in MEDIA}, **{kind: kind for kind in MEDIA},
}  # fmt: skip
LONGEST_PATH = 1000  # characters of base64's alphabet that may be a path
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
# A thought as a reply begins with it, where another engine left it in the text: a mention in a sentence is none.
LEADING_THOUGHT = re.compile(r"\s*(?:<\|channel>(?=\w|\n).*?<channel\|>|<\|channel>thought\n.*\Z)\s*", re.DOTALL)


def request_messages(
    request: str,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
) -> list[Message]:
    """One user turn, the media before the text as the model card recommends, behind a system message if one is given.

    Raises ValueError if there is nothing to ask, if media are given as anything but a list or a tuple, or if text or
    system message is no string.
    """
    given = {"image": images, "audio": audios, "video": videos}
    for kind, sources in given.items():
        if not isinstance(sources, (list, tuple)):
            raise ValueError(f"{kind}s is {a(sources)}; expected a list, with one entry for each {kind}")
    if not isinstance(request, str):
        raise ValueError(f"the prompt is {a(request)}; expected a string")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system is {a(system)}; expected a string")
    parts: list[Part] = [{"type": kind, kind: source} for kind, sources in given.items() for source in sources]
    if not request.strip() and not parts:
        raise ValueError("the prompt is empty; expected a text, an image, an audio or a video")
    text: list[Part] = [{"type": "text", "text": request}] if request.strip() else []
    user: Message = {"role": "user", "content": parts + text if parts else request}
    return [{"role": "system", "content": system}, user] if system else [user]


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not empty; ValueError that names the line if one is not JSON."""
    try:
        texts = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at U+2028 in a string too
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {number}, is not UTF-8: {error.reason}") from None
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}, is not JSON: {error}") from None
        yield number, value


def check_messages(messages: Any) -> list[Message]:
    """Messages in Hugging Face's or OpenAI's spelling -> new messages in the one that the template takes.

    A media part becomes {"type": kind, kind: source}, its source as given, base64 as bytes; a tool call's arguments
    become a dict; a tool's result that is JSON and no text goes to the key result; a thought that an assistant's
    content begins with is dropped. The caller's objects are not changed.
    Raises ValueError that names the place, what was got and what is expected.
    """
    if isinstance(messages, str):
        raise ValueError('messages is a str; expected a list of messages, or generate(model, processor, "text")')
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages is {a(messages)}; expected a list of messages")
    if not messages:
        raise ValueError("messages is empty; expected at least one message")
    checked = [check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    check_tool_order(checked)
    return checked


def check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {a(message)}; expected a dict with role and content")
    message = as_now(message, where)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where} has the role {shown(role)}; expected system, developer, user, assistant or tool")
    check_no_media(message, (*MEDIA, *(f"{kind}s" for kind in MEDIA)), where)
    checked: Message = {"role": role, "content": ""}
    extras = check_assistant(message, where)
    if extras and role != "assistant":
        raise ValueError(f"{where} is a {role} message with {min(extras)}; expected that in an assistant message")
    content = message.get("content")
    if role == "tool" and is_result(content):
        checked["result"] = check_json(content, f"{where}.content")
    elif content is not None or not extras:  # OpenAI writes None beside tool_calls
        checked["content"] = check_content(content, role, where)
    named = strings_of(message, ("name", "tool_call_id"), where) if role == "tool" else {}
    return checked | named | extras


def as_now(message: Any, where: str) -> Any:
    """A message whose call, result or thought is spelled as OpenAI did before, or as Ollama does."""
    if not isinstance(message, dict):
        return message
    called, thought = message.get("function_call"), message.get("thinking")
    found = {key: value for key, value in message.items() if key not in ("function_call", "thinking")}
    if found.get("role") == "function":
        found["role"] = "tool"
    if found.get("name") is None and found.get("tool_name") is not None:
        found["name"] = found["tool_name"]
    if called:
        if found.get("tool_calls"):
            raise ValueError(f"{where} has function_call and tool_calls; expected one of them")
        found["tool_calls"] = [called]
    if thought:
        other = found.get("reasoning") or found.get("reasoning_content") or thought
        if other != thought:
            raise ValueError(f"{where} has thinking and another reasoning; expected one of them")
        found["reasoning"] = thought
    return found


def is_result(content: Any) -> bool:
    """Whether a tool's content is its result as JSON: anything but a text, a list of parts and nothing at all."""
    if isinstance(content, (list, tuple)):
        types = [part.get("type") if isinstance(part, dict) else None for part in content]
        return bool(content) and not any(isinstance(kind, str) and kind in KIND_OF for kind in types)
    return isinstance(content, (dict, bool, int, float))


def check_no_media(holder: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """ValueError for media where nobody looks for them, such as Ollama's `images` beside the content."""
    for key in keys:
        value = holder.get(key)
        if value is not None and not (isinstance(value, (list, tuple)) and not value):
            kind = key.rstrip("s")
            raise ValueError(f'{where} has the key {key}; expected a part {{"type": "{kind}", "{kind}": …}} in content')


def check_assistant(message: Message, where: str) -> Message:
    """What only an assistant's message has: its thought, its tool calls, and Google's embedded tool responses."""
    checked: Message = {}
    for key in ("reasoning", "reasoning_content"):
        if message.get(key):
            checked[key] = check_string(message[key], f"{where}.{key}")
    for key, check in (("tool_calls", check_tool_call), ("tool_responses", check_tool_response)):
        if message.get(key):
            if not isinstance(message[key], (list, tuple)):
                raise ValueError(f"{where}.{key} is {a(message[key])}; expected a list")
            checked[key] = [check(entry, f"{where}.{key}[{index}]") for index, entry in enumerate(message[key])]
    return checked


def check_content(content: Any, role: str, where: str) -> str | list[Part]:
    place = f"{where}.content"
    if isinstance(content, str):
        return strip_thinking(content) if role == "assistant" else content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{place} is {a(content)}; expected a string or a list of parts")
    parts = [check_part(part, f"{place}[{index}]") for index, part in enumerate(content)]
    for index, part in enumerate(parts):
        if part["type"] != "text" and role == "system":
            kind = part["type"]
            raise ValueError(f"{place}[{index}] is {article(kind)} in a system message; expected in a user message")
        if part["type"] == "text" and role == "assistant":
            part["text"] = strip_thinking(part["text"])
    return parts


def check_part(part: Any, where: str) -> Part:
    if not isinstance(part, dict):
        raise ValueError(f'{where} is {a(part)}; expected a part such as {{"type": "text", "text": …}}')
    spelling = part.get("type")
    kind = KIND_OF.get(spelling) if isinstance(spelling, str) else None
    if not isinstance(spelling, str) or kind is None:
        raise ValueError(f"{where} has the type {shown(spelling)}; expected text, image, audio or video")
    if kind == "text":
        check_no_media(part, MEDIA, where)
        return {"type": "text", "text": check_string(part.get("text"), f"{where}.text")}
    checked = {"type": kind, kind: media_source(*media_holder(part, spelling, where))}
    if kind == "video" and part.get("fps") is not None:
        checked["fps"] = check_fps(part["fps"], f"{where}.fps")
    return checked


def media_holder(part: Part, spelling: str, where: str) -> Source:
    """What holds the value of a media part, as whoever spells it so writes it."""
    source = part.get("source")
    if spelling in MEDIA and isinstance(source, dict) and part.get(spelling) is None:
        return source, ("data", "url"), f"{where}.source"  # Anthropic's: {"type": "base64", "data": …}, or a url
    if spelling in MEDIA:
        return part, (spelling, "url", "path", "base64"), where
    # OpenAI's: {"type": "image_url", "image_url": {"url": …}}, {"type": "input_image", "image_url": …}
    holder = "image_url" if spelling == "input_image" else spelling
    keys = ("data",) if spelling == "input_audio" else ("url",)
    inner = part.get(holder)
    return inner if isinstance(inner, dict) else {keys[0]: inner}, keys, f"{where}.{holder}"


def check_fps(value: Any, where: str) -> float:
    numeric = isinstance(value, Real) and not isinstance(value, bool)
    if not numeric or not SLOWEST <= value <= FASTEST:
        raise ValueError(f"{where} is {shown(value)}; expected images a second, from {SLOWEST:g} to {FASTEST:g}")
    return float(value)


def media_source(holder: dict[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value of a media part, base64 decoded; what else a source may be is the business of who reads it."""
    found = [key for key in keys if holder.get(key) is not None and not is_blank(holder[key])]
    if len(found) != 1:
        got = " and ".join(found) or "no value"
        raise ValueError(f"{where} has {got}; expected one value, under the key {' or '.join(keys)}")
    source = holder[found[0]]
    if found[0] in ("base64", "data"):
        return decode_base64(source, f"{where}.{found[0]}")
    if isinstance(source, str) and len(source) > LONGEST_PATH and BASE64.fullmatch(source):
        got = f"{len(source)} characters of base64"
        raise ValueError(f"{where}.{found[0]} is {got}; expected a path or URL, data:…;base64,…, or the key base64")
    return source


def check_tool_call(call: Any, where: str) -> Message:
    """{"id": …, "function": {"name": str, "arguments": dict}}; the bare function is taken too."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise ValueError(f'{where} is {a(call)}; expected {{"function": {{"name": …, "arguments": {{…}}}}}}')
    name = check_name(function, where)
    arguments = function.get("arguments")
    place = f"{where}.arguments"
    if isinstance(arguments, str) and is_blank(arguments):
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is not valid JSON ({error}); expected a JSON object") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{place} is {a(arguments)}; expected a dict or a JSON object")
    return {"function": {"name": name, "arguments": check_json(arguments, place)}} | strings_of(call, ("id",), where)


def check_tool_response(response: Any, where: str) -> Message:
    if not isinstance(response, dict) or "response" not in response:
        raise ValueError(f'{where} is {shown(response)}; expected {{"name": …, "response": …}}')
    checked = check_json(response["response"], f"{where}.response")
    return {"response": checked} | strings_of(response, ("name",), where)


def taken_up(messages: list[Message]) -> Message:
    """The last of checked messages, taken out: an assistant's, which is to be continued. ValueError if it is none, or
    has more than a thought and text; its content is one string then."""
    last = messages[-1]
    content = last["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    extras = sorted({"tool_calls", "tool_responses"} & last.keys()) + [
        part["type"] for part in parts if part["type"] != "text"
    ]
    if last["role"] != "assistant" or extras:
        got = extras[0] if last["role"] == "assistant" else f"the role {last['role']}"
        raise ValueError(
            f"messages[{len(messages) - 1}] has {got}; continue_final_message expects an assistant message of text last"
        )
    return messages.pop() | {"content": "".join(part["text"] for part in parts)}


def check_tool_order(messages: list[Message]) -> None:
    """The template shows tool messages with the call before them, and silently drops any other."""
    before: Message = {}
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            before = message
        elif "tool_calls" not in before or "tool_responses" in before:
            raise ValueError(
                f"messages[{index}] is a tool message that answers no tool call; expected it after an assistant "
                "message with tool_calls and without tool_responses"
            )


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools as OpenAI writes them, {"type": "function", "function": {…}}; a bare function is wrapped, None is []."""
    if tools is None:
        return []
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools is {a(tools)}; expected a list of tools")
    checked = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict):
            expected = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
            raise ValueError(f"{where} is {a(tool)}; expected {expected}")
        function = with_parameters(function, where)
        check_name(function, where)
        description = function.get("description")
        described = {"description": "" if description is None else check_string(description, f"{where}.description")}
        checked.append({"type": "function", "function": check_json(function | described, where)})
    return checked


def with_parameters(function: dict[str, Any], where: str) -> dict[str, Any]:
    """A function with its schema under the key `parameters`: Anthropic and MCP have other names for it."""
    keys = [key for key in ("parameters", "input_schema", "inputSchema") if function.get(key) is not None]
    if len(keys) > 1:
        raise ValueError(f"{where} has {' and '.join(keys)}; expected one of them")
    rest = {key: value for key, value in function.items() if key not in ("input_schema", "inputSchema")}
    return rest | {"parameters": function[keys[0]]} if keys else rest


def check_name(function: dict[str, Any], where: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has the name {shown(name)}; expected the name of a function")
    return name


def check_string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {a(value)}; expected a string")
    return value


def strings_of(holder: dict[str, Any], keys: Sequence[str], where: str) -> dict[str, str]:
    """What stands under those of the keys that there are."""
    return {key: check_string(holder[key], f"{where}.{key}") for key in keys if holder.get(key) is not None}


def check_json(value: Any, where: str, depth: int = 1) -> Any:
    """A copy of a value that JSON can hold: anything else could turn into any text when it is rendered."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested too deep; expected at most {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {shown(key)}; expected strings as keys")
        return {key: check_json(entry, where, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [check_json(entry, where, depth + 1) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} holds {value}; expected what JSON can hold")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"{where} holds {a(value)}; expected what JSON can hold")


def decode_base64(text: Any, where: str) -> bytes:
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    try:
        return base64.b64decode("".join(check_string(text, where).split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where} is not valid base64: {error}") from None


def strip_thinking(text: str) -> str:
    """An assistant's content without the thought that it begins with.

    The template's own macro of this name, which never sees a channel token of a content because `shield` hides it, cuts
    at every mention of one.
    """
    while (thought := LEADING_THOUGHT.match(text)) is not None:
        text = text[thought.end() :]
    return text


def is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def with_media_from(folder: Path, body: Any) -> Any:
    """A body, or another dict with messages not yet checked, whose media's paths go from a folder."""
    messages = body.get("messages") if isinstance(body, dict) else None
    for place, message in enumerate(messages if isinstance(messages, list) else ()):
        content: Any = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and KIND_OF.get(str(part.get("type"))) in MEDIA:
                part = check_part(part, f"messages[{place}].content[{number}]")
                content[number] = part | {part["type"]: from_folder(part[part["type"]], folder)}
    return body


def from_folder(source: Any, folder: Path) -> Any:
    """The source of a medium, its relative path from there; of a film's frames that of each."""
    if isinstance(source, (list, tuple)) and all(isinstance(one, str) for one in source):
        return [from_folder(one, folder) for one in source]
    if not isinstance(source, str) or not source or url_scheme(source) is not None or source.startswith("~"):
        return source
    return str(folder / source)


def with_answers(messages: list[Message]) -> list[tuple[Message, list[Message]]]:
    """Each of checked messages that is no tool's, and the tool messages behind it."""
    found: list[tuple[Message, list[Message]]] = []
    for message in messages:
        if message["role"] == "tool":
            found[-1][1].append(message)
        else:
            found.append((message, []))
    return found


def media_parts(messages: list[Message]) -> list[Part]:
    """The media of checked messages in the order in which the template writes their placeholders.

    It writes tool messages with the call that they answer, before the content of the calling message.
    """
    written = [own for message, answers in with_answers(messages) for own in (*answers, message)]
    contents = [message["content"] for message in written if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] != "text"]


def without_sources(messages: list[Message]) -> list[Message]:
    """The messages as the template gets them: of a media part only its type."""
    return [
        message
        if isinstance(message["content"], str)
        else message
        | {"content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]]}
        for message in messages
    ]
