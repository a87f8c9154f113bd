"""Checked messages -> the text that a checkpoint's chat template makes of them.

What a user types stays text. Before rendering, `shield` puts a mark, a character that occurs nowhere in the request,
behind every character with which a control token can begin. So whatever stands in a message or a tool, alone or across
a seam that the template makes, no control token in the rendered text comes from there: those are the template's own.
The mark is taken out again when the text between them is encoded (`processor.py`).

Some things the published template gets wrong; it stays as it is, and gets what it renders right (`template_turns`,
`written`): text before a call in the turn of the call, results of parallel calls without ids, results that are JSON,
keys that its calls cannot be read back with. The turn of a call that nothing answered is closed after it.
"""

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_gemma4.errors import unbroken
from mlx_gemma4.prompt.messages import Message, with_answers
from mlx_gemma4.reply.reply import (
    CHANNEL_CLOSE,
    CHANNEL_OPEN,
    THOUGHT_CHANNEL,
    TOOL_RESPONSE_OPEN,
    TURN_CLOSE,
    TURN_OPEN,
)
from mlx_gemma4.reply.toolcall import QUOTE, needs_quotes

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # the Unicode standard, 23.5

# What a template, which is somebody's code, can raise in the sandbox.
TEMPLATE_FAILURES = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError,
)  # fmt: skip


def compile_template(source: str) -> Template:
    """A chat template as transformers compiles it; jinja2.TemplateSyntaxError if it is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    del environment.globals["lipsum"]  # of no use to a chat, and 100,000 paragraphs of it take 20 s
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            leave_early(loop)
        return environment.from_string(tree)
    except SyntaxError as error:  # of the Python that jinja2 makes of it, as from a break outside a loop
        raise TemplateSyntaxError(error.msg, 1) from None


def leave_early(loop: nodes.For) -> None:
    """Let a loop end where a flag is set with which it does nothing more: the published template looks ahead from each
    message through all that follow, seconds for a thousand of them."""
    match [node for node in loop.body if not is_blank(node)]:
        case [nodes.If(test=nodes.Getattr(node=nodes.Name(name=name))) as choice]:
            idle = choice.body
        case [nodes.If(test=nodes.Not(node=nodes.Getattr(node=nodes.Name(name=name))), elif_=[]) as choice]:
            idle = choice.else_
        case _:
            return
    changing = {"loop", *(node.name for node in nodes.Tuple([loop.target], "store").find_all(nodes.Name))}
    if name not in changing and all(map(is_blank, idle)):
        idle[:] = [nodes.Break()]


def is_blank(node: nodes.Node) -> bool:
    """Whether it writes nothing."""
    if not isinstance(node, nodes.Output):
        return False
    return all(isinstance(part, nodes.TemplateData) and not part.data for part in node.nodes)


class GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %}: what trainers learn from, marked; a prompt has the content as it is.

    A call block, as in transformers: what is set inside is not known outside.
    """

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        return caller()


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def render(
    template: Template,
    messages: list[Message],
    tools: list[dict[str, Any]],
    thinking: bool,
    bos_token: str,
    add_generation_prompt: bool = True,
    preserve_thinking: bool = False,
) -> str:
    """The text that the template makes of checked messages and tools; ValueError in one line if it fails."""
    try:
        text = template.render(
            messages=messages,
            tools=tools or None,
            enable_thinking=thinking,
            preserve_thinking=preserve_thinking,
            bos_token=bos_token,
            add_generation_prompt=add_generation_prompt,
        )
        text.encode()  # it may hold halves of surrogate pairs, which no tokenizer can encode
        return text
    except TEMPLATE_FAILURES as error:
        raise ValueError(
            f"the chat template fails on this request: {unbroken(error) or type(error).__name__}"
        ) from error


def render_shielded(
    template: Template,
    turns: list[Message],
    tools: list[dict[str, Any]],
    starts: re.Pattern[str],
    thinking: bool,
    preserve_thinking: bool,
    bos_token: str,
    begun: Message | None = None,
) -> tuple[str, str]:
    """The text of checked messages (`template_turns`) and tools, and the mark in it that stands for nothing.

    Only the template's control tokens are whole in it.

    starts: matches each character that a control token begins with. begun: an assistant message of text that follows,
    and is to be continued: as if the model had written it in this reply. ValueError in one line if the template fails.
    """
    mark = unused_character([turns, tools, [begun]])
    slot = unused_character([turns, tools, [begun], mark])
    turns, tools = shield(turns, starts, mark), shield(tools, starts, mark)
    thoughts: list[str] = []
    turns = [written(turn, mark, slot if preserve_thinking else "", thoughts) for turn in turns]
    text = render(
        template,
        turns,
        [quoted_properties(tool, mark) for tool in tools],
        thinking,
        bos_token,
        preserve_thinking=preserve_thinking,
    )
    if text.count(slot) == len(thoughts):
        waiting = iter(thoughts)
        text = re.sub(slot, lambda _: next(waiting), text)
    # Behind a call that nothing answered the template opens a response, and the next turn in it.
    text = text.replace(slot, "").replace(f"{TOOL_RESPONSE_OPEN}{TURN_OPEN}", f"{TURN_CLOSE}\n{TURN_OPEN}")
    return text if begun is None else text_continued(text, shield(begun, starts, mark)), mark


def text_continued(text: str, begun: Message) -> str:
    """A prompt's text with what is written of the reply to it: the template may have opened a thought, or an empty one
    in the place of a thought that there was."""
    thought = begun.get("reasoning") or begun.get("reasoning_content")
    opened = f"{CHANNEL_OPEN}{THOUGHT_CHANNEL}\n"
    for end in (opened, opened + CHANNEL_CLOSE if thought else opened):
        text = text.removesuffix(end)
    return text + (f"{opened}{thought}\n{CHANNEL_CLOSE}" if thought else "") + begun["content"]


# --- what the template renders right -----------------------------------------------------------

BEFORE_CALL = "before_call"  # key of a turn whose text the model wrote before a call


def joins_turns(template: Template) -> bool:
    """Whether two assistant messages in a row are one turn: so in the published template, not so in its predecessor."""
    call = {"id": "c", "function": {"name": "f", "arguments": {}}}
    probe: list[Message] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    try:
        return render(template, probe, [], False, "", add_generation_prompt=False).count(f"{TURN_OPEN}model") == 1
    except ValueError:
        return False


def template_turns(messages: list[Message], joined_turns: bool = True) -> list[Message]:
    """Checked messages as the published template renders them right.

    It writes the text of a message behind its calls and their results, and then closes the model's turn: text and
    calls become two messages, which it joins in the order in which the model wrote them. A message with embedded tool
    responses stays one: its text is what the model said to these. joined_turns: whether the template joins them.
    """
    turns: list[Message] = []
    for message, answers in with_answers(messages):
        if "tool_calls" not in message or "tool_responses" in message:
            turns += [message, *answers]
            continue
        calls, answers = joined(message["tool_calls"], answers)
        if message["content"] and joined_turns:
            before = {key: value for key, value in message.items() if key != "tool_calls"}
            turns.append(before | {BEFORE_CALL: True})
            message = {"role": message["role"], "content": ""}
        turns += [message | {"tool_calls": calls}, *answers]
    return turns


def joined(calls: list[Message], answers: list[Message]) -> tuple[list[Message], list[Message]]:
    """Calls and results with ids, for the template takes no id for that of every call without one.

    A result goes to the call of its id, or else of its name, or else to the next one that nothing has gone to.
    """
    places: list[int | None] = [None] * len(answers)
    free = list(range(len(calls)))

    def give(answer: int, fits: list[int]) -> None:
        place = next((call for call in fits if call in free), fits[0] if fits else None)
        places[answer] = place
        if place in free:
            free.remove(place)

    for key, name_of in (
        ("tool_call_id", lambda call: call.get("id")),
        ("name", lambda call: call["function"]["name"]),
    ):
        for number, answer in enumerate(answers):
            if places[number] is None and answer.get(key) is not None:
                give(number, [n for n, call in enumerate(calls) if name_of(call) == answer[key]])
    for number, answer in enumerate(answers):
        if places[number] is None and "name" not in answer:
            give(number, free[:1])
    named = [call | {"id": f"call {number}"} for number, call in enumerate(calls)]
    return named, [answer | {"tool_call_id": f"call {places[number]}"} for number, answer in enumerate(answers)]


class Result(dict[str, Any]):
    """A tool's result as the template takes it: jinja counts a dict among sequences, and it would look for parts."""

    def __len__(self) -> int:
        raise TypeError("a tool's result is no sequence")

    def __bool__(self) -> bool:
        return True


def written(turn: Message, mark: str, slot: str, thoughts: list[str]) -> Message:
    """A shielded turn with what the template would get wrong in place; `thoughts` gathers what stands for each slot."""
    turn = dict(turn)
    if turn.pop(BEFORE_CALL, False):  # neither trimmed nor, with `preserve_thinking`, without its thought
        thought = turn.pop("reasoning", None) or turn.pop("reasoning_content", None) if slot else None
        if thought:
            thoughts.append(f"{CHANNEL_OPEN}{THOUGHT_CHANNEL}\n{thought}\n{CHANNEL_CLOSE}")
        turn["content"] = kept(turn["content"], mark, slot if thought else "")
    if "tool_calls" in turn:
        turn["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": quoted_keys(call["function"]["arguments"], mark)}}
            for call in turn["tool_calls"]
        ]
    if "tool_responses" in turn:
        turn["tool_responses"] = [
            response | {"response": quoted_keys(response["response"], mark)} for response in turn["tool_responses"]
        ]
    if "result" in turn:
        result = quoted_keys(turn.pop("result"), mark)
        turn["content"] = Result(result if isinstance(result, dict) else {"value": result})
    return turn


def kept(content: str | list[dict[str, Any]], mark: str, slot: str) -> str | list[dict[str, Any]]:
    """Content with the slot before it, and marks around its texts, so that the template trims nothing."""
    if isinstance(content, str):
        return f"{slot}{mark}{content}{mark}"
    parts = [part | {"text": f"{mark}{part['text']}{mark}"} if part["type"] == "text" else part for part in content]
    return [{"type": "text", "text": slot}, *parts] if slot else parts


def quoted_keys(value: Any, mark: str) -> Any:
    """Keys that would not be read back as they are, between `<|"|>`; the template writes all as they are."""
    if isinstance(value, dict):
        return {quoted(key, mark): quoted_keys(entry, mark) for key, entry in value.items()}
    if isinstance(value, list):
        return [quoted_keys(entry, mark) for entry in value]
    return value


def quoted(key: str, mark: str) -> str:
    return f"{QUOTE}{key}{QUOTE}" if needs_quotes(key.replace(mark, "")) else key


def quoted_properties(value: Any, mark: str) -> Any:
    """The same for the names of a tool's arguments."""
    if isinstance(value, list):
        return [quoted_properties(entry, mark) for entry in value]
    if not isinstance(value, dict):
        return value
    result = {key: quoted_properties(entry, mark) for key, entry in value.items()}
    if isinstance(value.get("properties"), dict):
        properties = value["properties"]
        result["properties"] = {quoted(key, mark): quoted_properties(entry, mark) for key, entry in properties.items()}
    return result


# --- shielding ---------------------------------------------------------------------------------


def unused_character(value: Any) -> str:
    """A private-use character that is in no string of a JSON-like value; ValueError if a string is not Unicode."""
    text = "".join(strings(value))
    check_unicode(text)
    used = set(text)
    free = next((chr(code) for code in chain(*PRIVATE_USE) if chr(code) not in used), None)
    if free is None:
        raise ValueError("the texts hold every private-use character of Unicode; expected one to be free")
    return free


def check_unicode(text: str) -> None:
    """ValueError if a text holds half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"a text holds {half!r}, half of a surrogate pair; expected valid Unicode") from None


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for entry in value.values():
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)


def shield(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    """A copy of a JSON-like value with the mark behind every match of `starts` in every string, keys included.

    `starts` matches each character that a control token begins with. The mark is not put around whole strings: the
    template trims them, and would find no space at their ends.
    """
    if isinstance(value, str):
        return starts.sub(lambda start: start[0] + mark, value)
    if isinstance(value, dict):
        return {shield(key, starts, mark): shield(entry, starts, mark) for key, entry in value.items()}
    if isinstance(value, list):
        return [shield(entry, starts, mark) for entry in value]
    return value
