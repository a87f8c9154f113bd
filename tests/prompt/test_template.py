import base64
import copy
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_gemma4.prompt.messages import (
    check_messages,
    check_tools,
    media_parts,
    request_messages,
    strip_thinking,
    without_sources,
)
from mlx_gemma4.prompt.template import (
    compile_template,
    joins_turns,
    render,
    render_shielded,
    shield,
    template_turns,
    unused_character,
)

RENDERS = json.loads((Path(__file__).parents[1] / "data/chat_renders.json").read_text(encoding="utf-8"))
TEMPLATE = compile_template(
    resources.files("mlx_gemma4").joinpath("prompt/chat_template.jinja").read_text(encoding="utf-8")
)
CALL = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}]}
USER = {"role": "user", "content": "x"}
IMAGE = {"type": "image", "image": "a.png"}
AUDIO = {"type": "audio", "audio": "a.wav"}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def with_sources(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The golden messages name media by their type alone."""
    kinds = ("image", "audio", "video")
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            part |= {kind: "a file" for kind in kinds if part["type"] == kind}
    return messages


# --- rendering ---


@pytest.mark.parametrize("case", RENDERS, ids=[case["title"] for case in RENDERS])
def test_published_renders_come_out_to_the_letter(case: dict[str, Any]) -> None:
    options = case["options"]
    messages = check_messages(with_sources(copy.deepcopy(case["messages"])))
    tools = check_tools(options.get("tools"))
    text = render(
        TEMPLATE,
        without_sources(messages),
        tools,
        thinking=options.get("enable_thinking", False),
        bos_token="<bos>",
        add_generation_prompt=options.get("add_generation_prompt", False),
    )
    assert text == case["text"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('not\nlike this') }}", "not like this"),
        ("{{ messages.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 'x' + 1 }}", "can only concatenate str"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ lipsum(n=100000) }}", "'lipsum' is undefined"),
        ("{{ cycler() }}", "at least one item"),
        (r"{{ '\ud83d' }}", "surrogates not allowed"),
    ],
)
def test_a_template_that_fails_is_a_value_error_of_one_line(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^the chat template fails on this request: .*({reason})") as caught:
        render(compile_template(source), [USER], [], False, "<bos>")
    assert "\n" not in str(caught.value)


def test_each_turn_of_a_long_conversation_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, plain = 0, ImmutableSandboxedEnvironment.getattr

    def counted(self: Any, value: Any, name: str) -> Any:
        nonlocal looked
        looked += 1
        return plain(self, value, name)

    monkeypatch.setattr(ImmutableSandboxedEnvironment, "getattr", counted)
    steps = []
    for turns in (10, 20, 40):
        looked = 0
        talk = [
            USER,
            CALL,
            {"role": "tool", "tool_call_id": "c", "content": "x"},
            {"role": "assistant", "content": "x"},
        ]
        render(TEMPLATE, talk * turns, [], False, "<bos>")
        steps.append(looked)
    assert steps[2] - steps[1] == 2 * (steps[1] - steps[0])


@pytest.mark.parametrize(
    ("body", "written"),
    [
        ("{% if not n.f %}{{ i }}{% set n.f = true %}{% endif %}", "0"),
        ("{% if n.f %}{% elif i > 5 %}x{% else %}{{ i }}{% set n.f = i == 1 %}{% endif %}", "01"),
        ("{% if not n.f %}{{ i }}{% set n.f = true %}{% else %},{% endif %}", "0,,"),
        ("{% if not n.f %}{{ i }}{% set n.f = true %}{% elif i == 2 %}x{% endif %}", "0x"),
        ("{% if n.f %}{{ i }}{% endif %}{% set n.f = true %}", "12"),
        ("{% if loop.first %}{% else %}{{ i }}{% endif %}", "12"),
        ("{% if not loop.first %}{{ i }}{% endif %}", "12"),
    ],
)
def test_a_loop_that_is_left_early_writes_what_it_would_have(body: str, written: str) -> None:
    source = "{% set n = namespace(f=false) %}{% for i in range(3) %}" + body + "{% endfor %}"
    assert render(compile_template(source), [], [], False, "") == written


def test_the_things_of_a_loop_may_have_flags() -> None:
    source = "{% for m in messages %}{% if not m.skip %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    messages = [{"skip": flag, "content": str(flag)} for flag in (False, True, False, True)]
    assert render(compile_template(source), messages, [], False, "") == "TrueTrue"
    assert render(compile_template(source.replace("not ", "")), messages, [], False, "") == "FalseFalse"


def test_a_break_outside_a_loop_is_a_syntax_error_of_the_template() -> None:
    with pytest.raises(TemplateSyntaxError, match="'break' outside loop"):
        compile_template("{% break %}")


def test_templates_have_what_transformers_gives_them() -> None:
    source = "{{ {'a': '<é&'} | tojson }}{% for x in [1, 2] %}{{ x }}{% break %}{% endfor %}{{ strftime_now('%Y') }}"
    assert re.fullmatch(r'\{"a": "<é&"\}1\d{4}', render(compile_template(source), [USER], [], False, "<bos>"))


# --- spellings ---


@pytest.mark.parametrize(
    ("part", "checked"),
    [
        ({"type": "text", "text": "x"}, {"type": "text", "text": "x"}),
        ({"type": "image", "image": "a.png"}, IMAGE),
        ({"type": "image", "url": "http://a/b.png"}, {"type": "image", "image": "http://a/b.png"}),
        ({"type": "image", "path": Path("a.png")}, {"type": "image", "image": Path("a.png")}),
        ({"type": "image", "image": None, "path": "a.png"}, IMAGE),
        ({"type": "audio", "base64": "AAEC"}, {"type": "audio", "audio": b"\0\1\2"}),
        ({"type": "audio", "base64": "AA\nEC\n"}, {"type": "audio", "audio": b"\0\1\2"}),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, IMAGE),
        ({"type": "image_url", "image_url": "a.png"}, IMAGE),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, {"type": "video", "video": "a.mp4"}),
        ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, AUDIO),
        (
            {"type": "input_audio", "input_audio": {"data": "AAEC", "format": "wav"}},
            {"type": "audio", "audio": b"\0\1\2"},
        ),
        ({"type": "input_text", "text": "x"}, {"type": "text", "text": "x"}),
        ({"type": "output_text", "text": "x", "annotations": []}, {"type": "text", "text": "x"}),
        ({"type": "input_image", "image_url": "a.png", "detail": "auto"}, IMAGE),
        ({"type": "input_image", "image_url": {"url": "a.png"}}, IMAGE),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAEC"}},
            {"type": "image", "image": b"\0\1\2"},
        ),
        ({"type": "image", "source": {"type": "url", "url": "a.png"}}, IMAGE),
        ({"type": "video", "video": ["a", "b"], "fps": 2}, {"type": "video", "video": ["a", "b"], "fps": 2}),
    ],
)
def test_every_spelling_of_a_part_becomes_the_same(part: dict[str, Any], checked: dict[str, Any]) -> None:
    assert check_messages(user(part)) == user(checked)


def test_a_source_of_any_type_is_passed_on_as_it_is() -> None:
    picture = object()
    assert check_messages(user({"type": "image", "image": picture}))[0]["content"][0]["image"] is picture


def test_developer_is_system() -> None:
    assert check_messages([{"role": "developer", "content": "x"}, USER]) == [{"role": "system", "content": "x"}, USER]


@pytest.mark.parametrize("arguments", [{"x": [1, None]}, '{"x": [1, null]}'])
def test_arguments_may_be_json_text(arguments: Any) -> None:
    function = {"name": "f", "arguments": arguments}
    expected = {"function": {"name": "f", "arguments": {"x": [1, None]}}}
    for call in ({"type": "function", "function": function}, function):
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert check_messages([USER, message])[1] == {"role": "assistant", "content": "", "tool_calls": [expected]}


def test_absent_arguments_are_none() -> None:
    for function in ({"name": "f"}, *({"name": "f", "arguments": nothing} for nothing in (None, "", " \n"))):
        checked = check_messages([{"role": "assistant", "tool_calls": [{"function": function}]}])
        assert checked[0]["tool_calls"][0]["function"]["arguments"] == {}


def test_older_spellings_of_calls_results_and_thoughts_are_read() -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    old = [USER, {"role": "assistant", "content": None, "thinking": "hm", "function_call": function},
           {"role": "function", "name": "f", "content": "7"}]  # fmt: skip
    now = [USER, {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [{"function": function}]},
           {"role": "tool", "name": "f", "content": "7"}]  # fmt: skip
    assert check_messages(old) == check_messages(now)
    with pytest.raises(ValueError, match=r"messages\[1\] has function_call and tool_calls; expected one of them"):
        check_messages([USER, CALL | {"function_call": function}])


def test_empty_and_unknown_keys_of_openai_replies_are_dropped() -> None:
    message = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "reasoning": "", "audio": None}
    assert check_messages([message]) == [{"role": "assistant", "content": "x"}]


def test_the_callers_objects_are_not_changed() -> None:
    messages = [
        {"role": "developer", "content": "x"},
        *user({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "<bos>"}),
        {"role": "assistant", "content": [{"type": "text", "text": "<|channel>x<channel|>y"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "x"},
    ]
    tools = [{"name": "f", "parameters": {"properties": {"<": {"type": "string"}}}}]
    before = copy.deepcopy((messages, tools))
    shield([without_sources(check_messages(messages)), check_tools(tools)], re.compile("<"), "!")
    assert (messages, tools) == before


def test_bare_tools_are_wrapped_and_need_no_description() -> None:
    function = {"name": "f", "description": "", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": function}]
    assert check_tools([{"name": "f", "parameters": {"type": "object"}}]) == wrapped
    assert check_tools([{"type": "function", "function": function | {"description": None}}]) == wrapped
    assert check_tools(None) == check_tools([]) == []
    for key in ("input_schema", "inputSchema"):  # Anthropic's and MCP's names for it
        assert check_tools([{"name": "f", key: {"type": "object"}}]) == wrapped


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "<|channel>thought\nhm<channel|>x",
        "<|channel>just thinking<channel|>x",
        "\n<|channel>thought\nhm<channel|><|channel>\nhm<channel|>\nx",
        "<|channel>thought\nunfinished",
    ],
)
def test_thoughts_that_a_content_begins_with_are_dropped_as_the_template_drops_them(text: str) -> None:
    message = {"role": "assistant", "content": text}
    assert render(TEMPLATE, [message], [], False, "") == (
        f"<|turn>model\n{strip_thinking(text)}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )
    assert check_messages([message])[0]["content"] == strip_thinking(text)


@pytest.mark.parametrize(
    "text",
    [
        "a<|channel>b",
        "a<channel|>b",
        "It opens with <|channel>thought\nand closes with <channel|>.",
        "<|channel> opens",
    ],
)
def test_text_that_mentions_a_channel_is_not_cut_there(text: str) -> None:
    assert strip_thinking(text) == check_messages([{"role": "assistant", "content": text}])[0]["content"] == text


# --- what the template is given so that it renders right ---


def shown(*messages: dict[str, Any], preserve_thinking: bool = False, thinking: bool = False) -> str:
    """The text of these messages, its mark taken out, behind the first turn's opening."""
    turns = without_sources(template_turns(check_messages([USER, *messages])))
    text, mark = render_shielded(TEMPLATE, turns, [], re.compile("<"), thinking, preserve_thinking, "")
    assert mark not in text.replace(mark, "")
    return text.replace(mark, "").split("<|turn>model\n", 1)[1]


def calls(*names: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name}} for name in names], **more}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def test_text_before_a_call_is_rendered_before_it() -> None:
    """The template writes it behind the results, closes the turn and opens none (llama.cpp's pull request 21760)."""
    call = calls("f", content="Let me check. ", reasoning="hm")
    written = "Let me check. <|tool_call>call:f{}<tool_call|>"
    answered = f'{written}<|tool_response>response:f{{value:<|"|>1<|"|>}}<tool_response|>'
    thought = "<|channel>thought\nhm\n<channel|>"
    assert shown(call) == f"{thought}{written}<|tool_response>"
    assert shown(call, result("1")) == f"{thought}{answered}"
    assert shown(call, result("1"), thinking=True) == f"{thought}{answered}<|channel>thought\n"
    done = {"role": "assistant", "content": "One."}
    assert shown(call, result("1"), done, USER).startswith(f"{answered}One.<turn|>\n<|turn>user\n")
    kept = shown(call, result("1"), done, USER, preserve_thinking=True)
    assert kept.startswith(f"{thought}{answered}One.<turn|>\n<|turn>user\n")


def test_a_template_that_does_not_join_turns_gets_text_and_call_in_one_message() -> None:
    assert joins_turns(TEMPLATE)
    strict = "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endfor %}"
    assert not joins_turns(compile_template(strict))
    assert not joins_turns(compile_template("{{ raise_exception('roles must alternate') }}"))
    messages = check_messages([USER, calls("f", content="Let me check.")])
    assert [turn["content"] for turn in template_turns(messages, joined_turns=False)] == ["x", "Let me check."]


def test_a_call_that_nothing_answered_ends_its_turn() -> None:
    """The template opens a response there and leaves turn and response open."""
    for text in ("", "Let me check."):
        told = shown(calls("f", content=text), USER)
        assert told.startswith(f"{text}<|tool_call>call:f{{}}<tool_call|><turn|>\n<|turn>user\nx<turn|>")
    assert "<|tool_response>" not in shown(calls("f", "g"), {"role": "system", "content": "y"}, USER)


def test_text_beside_embedded_responses_is_what_was_said_to_them() -> None:
    embedded = calls("f", content="One.", tool_responses=[{"name": "f", "response": 1}])
    assert shown(embedded).startswith("<|tool_call>call:f{}<tool_call|><|tool_response>response:f{value:1}")


@pytest.mark.parametrize(
    ("results", "names"),
    [
        ([result("1", name="g"), result("2", name="f")], ["g", "f"]),
        ([result("1", tool_name="g"), result("2", tool_name="f")], ["g", "f"]),
        ([result("1"), result("2")], ["f", "g"]),
        ([result("1", name="g"), result("2")], ["g", "f"]),
        ([result("1"), result("2", name="f")], ["g", "f"]),
        ([result("1", name="other"), result("2")], ["other", "f"]),
        ([result("1"), result("2"), result("3")], ["f", "g", "unknown"]),
        ([result("1", tool_call_id="no")], ["f"]),
    ],
)
def test_results_without_ids_go_to_the_call_of_their_name_or_the_next(results: list[Any], names: list[str]) -> None:
    assert re.findall(r"response:(\w+)", shown(calls("f", "g"), *results)) == names


def test_results_with_ids_go_to_their_calls() -> None:
    made = [{"id": name, "function": {"name": name}} for name in "fg"]
    text = shown(
        {"role": "assistant", "tool_calls": made}, result("1", tool_call_id="g"), result("2", tool_call_id="f")
    )
    assert re.findall(r"response:(\w+)", text) == ["g", "f"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"b": [1, None], "a": "x"}, 'a:<|"|>x<|"|>,b:[1,null]'),
        ({}, ""),
        (["a", {"b": 1}], 'value:[<|"|>a<|"|>,{b:1}]'),
        ([{"type": "file", "name": "x"}], 'value:[{name:<|"|>x<|"|>,type:<|"|>file<|"|>}]'),
        (3, "value:3"),
        (False, "value:false"),
        ([{"type": "text", "text": "x"}], 'value:<|"|>x<|"|>'),
    ],
)
def test_a_result_may_be_json(content: Any, text: str) -> None:
    assert shown(calls("f"), result(content)).endswith(f"<|tool_response>response:f{{{text}}}<tool_response|>")


def test_keys_that_would_not_be_read_back_are_quoted() -> None:
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"": 1, "a:b": {"c,}": 2}, "d": 3}}}],
    }
    assert shown(call).startswith('<|tool_call>call:f{<|"|><|"|>:1,<|"|>a:b<|"|>:{<|"|>c,}<|"|>:2},d:3}<tool_call|>')
    assert shown(calls("f"), result({"a:b": 1})).endswith('response:f{<|"|>a:b<|"|>:1}<tool_response|>')


# --- the order of media ---


def test_media_of_tool_messages_come_with_the_call_that_they_answer() -> None:
    messages = check_messages(
        [
            *user({"type": "image", "image": "1"}, {"type": "audio", "audio": "2"}),
            CALL | {"content": [{"type": "image", "image": "5"}]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "image", "image": "3"}]},
            {"role": "tool", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": "4"}]},
            *user({"type": "image", "image": "6"}),
        ]
    )
    assert [part[part["type"]] for part in media_parts(messages)] == list("123456")
    marked = copy.deepcopy(messages)  # the same media as texts, to see where the template puts each
    marked[1]["content"] = [{"type": "text", "text": "five"}]
    marked[3]["content"][0]["text"] = "four"
    text = render(TEMPLATE, without_sources(marked), [], False, "<bos>")
    assert text.index("four") < text.index("five")
    assert without_sources(messages)[0]["content"] == [{"type": "image"}, {"type": "audio"}]


# --- one user turn ---


def test_a_request_has_its_media_before_its_text() -> None:
    assert request_messages("x") == [USER]
    assert request_messages("x", ["i"], ["a"], ["v"], "s") == [
        {"role": "system", "content": "s"},
        *user(
            {"type": "image", "image": "i"},
            {"type": "audio", "audio": "a"},
            {"type": "video", "video": "v"},
            {"type": "text", "text": "x"},
        ),
    ]
    assert request_messages(" ", images=["i"]) == user({"type": "image", "image": "i"})


def test_a_request_needs_something_to_ask() -> None:
    with pytest.raises(ValueError, match=r"^the prompt is empty; expected a text, an image, an audio or a video$"):
        request_messages(" \n", system="s")
    with pytest.raises(ValueError, match=r"^images is a str; expected a list, with one entry for each image$"):
        request_messages("x", images="a.png")


# --- errors ---


def called(**changes: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [{"function": {"name": "f"} | changes}]}]


DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]

ROLES = "expected system, developer, user, assistant or tool"
CONTENT = "expected a string or a list of parts"
TYPES = "expected text, image, audio or video"
VALUE = "expected one value, under the key"
IMAGE_VALUE = f"{VALUE} image or url or path or base64"
BARE_BASE64 = "characters of base64; expected a path or URL, data:…;base64,…, or the key base64"
ELSEWHERE = "expected that in an assistant message"
ANSWERS_NOTHING = (
    "messages[1] is a tool message that answers no tool call; "
    "expected it after an assistant message with tool_calls and without tool_responses"
)
OBJECT = "expected a dict or a JSON object"
FUNCTION = "expected the name of a function"

ERRORS: list[tuple[Any, str]] = [
    ("hello", 'messages is a str; expected a list of messages, or generate(model, processor, "text")'),
    (USER, "messages is a dict; expected a list of messages"),
    (None, "messages is None; expected a list of messages"),
    ([], "messages is empty; expected at least one message"),
    ([USER, "x"], "messages[1] is a str; expected a dict with role and content"),
    ([{"role": "bot", "content": "x"}], f"messages[0] has the role 'bot'; {ROLES}"),
    ([{"content": "x"}], f"messages[0] has the role None; {ROLES}"),
    ([{"role": "user"}], f"messages[0].content is None; {CONTENT}"),
    ([{"role": "user", "content": 3}], f"messages[0].content is an int; {CONTENT}"),
    ([{"role": "assistant", "content": None}], f"messages[0].content is None; {CONTENT}"),
    ([CALL, {"role": "user", "content": {"x": 1}}], f"messages[1].content is a dict; {CONTENT}"),
    ([CALL, {"role": "tool", "content": {"x": {1}}}], "messages[1].content holds a set; expected what JSON can hold"),
    (
        [CALL, {"role": "tool", "content": [{"type": "text"}, {"x": 1}]}],
        "messages[1].content[0].text is None; expected a string",
    ),
    # parts
    (user("x"), 'messages[0].content[0] is a str; expected a part such as {"type": "text", "text": …}'),
    (user(IMAGE, {"text": "x"}), f"messages[0].content[1] has the type None; {TYPES}"),
    (user({"type": "file"}), f"messages[0].content[0] has the type 'file'; {TYPES}"),
    (user({"type": "text"}), "messages[0].content[0].text is None; expected a string"),
    (user({"type": "text", "text": 3}), "messages[0].content[0].text is an int; expected a string"),
    (
        user({"type": "text", "text": "a", "image": "b.png"}),
        'messages[0].content[0] has the key image; expected a part {"type": "image", "image": …} in content',
    ),
    (
        [{"role": "user", "content": "a", "images": ["b.png"]}],
        'messages[0] has the key images; expected a part {"type": "image", "image": …} in content',
    ),
    (user({"type": "image"}), f"messages[0].content[0] has no value; {IMAGE_VALUE}"),
    (
        user({"type": "image", "source": {"type": "file", "file_id": "x"}}),
        "messages[0].content[0].source has no value; expected one value, under the key data or url",
    ),
    (user({"type": "input_image", "file_id": "x"}), f"messages[0].content[0].image_url has no value; {VALUE} url"),
    (user({"type": "image", "image": "iVBORw0KGgo" * 9000}), f"messages[0].content[0].image is 99000 {BARE_BASE64}"),
    (
        user({"type": "image_url", "image_url": {"url": "iVBORw0KGgo" * 9000}}),
        f"messages[0].content[0].image_url.url is 99000 {BARE_BASE64}",
    ),
    (user({"type": "image", "image": ""}), f"messages[0].content[0] has no value; {IMAGE_VALUE}"),
    (user(IMAGE | {"url": "b"}), f"messages[0].content[0] has image and url; {IMAGE_VALUE}"),
    (user({"type": "image_url", "image_url": {}}), f"messages[0].content[0].image_url has no value; {VALUE} url"),
    (user({"type": "input_audio"}), f"messages[0].content[0].input_audio has no value; {VALUE} data"),
    (
        user({"type": "audio", "base64": "AAE"}),
        "messages[0].content[0].base64 is not valid base64: Incorrect padding",
    ),
    (
        [USER, {"role": "system", "content": [IMAGE]}],
        "messages[1].content[0] is an image in a system message; expected in a user message",
    ),
    # tool calls
    (
        called(arguments="{"),
        "messages[0].tool_calls[0].arguments is not valid JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); expected a JSON object",
    ),
    (called(arguments="[1]"), f"messages[0].tool_calls[0].arguments is a list; {OBJECT}"),
    (called(arguments=3), f"messages[0].tool_calls[0].arguments is an int; {OBJECT}"),
    (called(arguments={1: 2}), "messages[0].tool_calls[0].arguments has the key 1; expected strings as keys"),
    (
        called(arguments={"x": {1, 2}}),
        "messages[0].tool_calls[0].arguments holds a set; expected what JSON can hold",
    ),
    (
        called(arguments={"x": DEEP}),
        "messages[0].tool_calls[0].arguments is nested too deep; expected at most 100 levels",
    ),
    (
        called(arguments='{"x": NaN}'),
        "messages[0].tool_calls[0].arguments holds nan; expected what JSON can hold",
    ),
    (called(name=None), f"messages[0].tool_calls[0] has the name None; {FUNCTION}"),
    ([{"role": "assistant", "tool_calls": "f"}], "messages[0].tool_calls is a str; expected a list"),
    (
        [{"role": "assistant", "tool_calls": ["f"]}],
        'messages[0].tool_calls[0] is a str; expected {"function": {"name": …, "arguments": {…}}}',
    ),
    (
        [{"role": "assistant", "tool_responses": ["f"]}],
        'messages[0].tool_responses[0] is \'f\'; expected {"name": …, "response": …}',
    ),
    ([{"role": "assistant", "reasoning": 3}], "messages[0].reasoning is an int; expected a string"),
    ([USER | {"reasoning": "x"}], f"messages[0] is a user message with reasoning; {ELSEWHERE}"),
    ([USER | {"tool_calls": CALL["tool_calls"]}], f"messages[0] is a user message with tool_calls; {ELSEWHERE}"),
    (
        [CALL, {"role": "tool", "content": "x", "tool_call_id": 3}],
        "messages[1].tool_call_id is an int; expected a string",
    ),
    ([USER, {"role": "tool", "content": "x"}], ANSWERS_NOTHING),
    ([CALL | {"tool_responses": [{"response": 1}]}, {"role": "tool", "content": "x"}], ANSWERS_NOTHING),
]
TOOL = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
TOOL_ERRORS: list[tuple[Any, str]] = [
    ({"name": "f"}, "tools is a dict; expected a list of tools"),
    ([len], f"tools[0] is a builtin_function_or_method; expected {TOOL}"),
    ([{"type": "function", "function": {}}], f"tools[0] has the name None; {FUNCTION}"),
    ([{"name": "f"}, {"name": ""}], f"tools[1] has the name ''; {FUNCTION}"),
    ([{"name": "f", "description": 3}], "tools[0].description is an int; expected a string"),
    (
        [{"name": "f", "parameters": {}, "input_schema": {}}],
        "tools[0] has parameters and input_schema; expected one of them",
    ),
    ([{"name": "f", "parameters": {"x": {1}}}], "tools[0] holds a set; expected what JSON can hold"),
]


@pytest.mark.parametrize(("messages", "message"), ERRORS)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_messages(messages)
    assert str(caught.value) == message


@pytest.mark.parametrize(("tools", "message"), TOOL_ERRORS)
def test_wrong_tools_are_named(tools: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_tools(tools)
    assert str(caught.value) == message


# --- shielding ---


def test_the_mark_is_a_character_of_no_string() -> None:
    assert unused_character(["\ue000", {"\ue001": [1, None, "\ue002"]}]) == "\ue003"
    assert unused_character("".join(map(chr, range(0xE000, 0xF900)))) == "\U000f0000"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a text holds '\\udce9', half of a surrogate pair; expected valid Unicode$"):
        unused_character(["caf\udce9"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("<|>ab "),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("<|>ab "), inner, max_size=3),
)


@given(JSON)
def test_shielding_marks_every_start_and_nothing_else(value: Any) -> None:
    text, shielded = (
        json.dumps(entry, ensure_ascii=False) for entry in (value, shield(value, re.compile("<"), "\ue000"))
    )
    assert shielded.count("<\ue000") == shielded.count("\ue000") == text.count("<")
    assert shielded.replace("\ue000", "") == text


def test_base64_bytes_are_taken_too() -> None:
    part = {"type": "image", "base64": base64.b64encode(b"x")}
    assert check_messages(user(part)) == user({"type": "image", "image": b"x"})
