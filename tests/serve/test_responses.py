"""OpenAI's Responses, without a model: what is asked becomes our messages, and replies its items and events."""

import base64
import json
from typing import Any

import pytest

pytest.importorskip("pydantic")  # of the extra `serve`

from spoken import called, last, read, said, streamed, thought, whole

from mlx_gemma4.serve import responses
from mlx_gemma4.serve.ask import Ask, Refused, Writer
from mlx_gemma4.serve.responses import Responses, Shelf
from mlx_gemma4.serve.turns import sealed

TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/s"}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": GRAMMAR}
CALL = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
HELLO = {"role": "user", "content": "Hello"}


def parsed(api: Responses | None = None, scope: str = "", **body: Any) -> tuple[Ask, Writer]:
    return (api or Responses("gemma", Shelf())).parse({"model": "gpt", "input": "Hello"} | body, scope)


def asked(**body: Any) -> Ask:
    return parsed(**body)[0]


def messages(*items: Any, **body: Any) -> list[dict[str, Any]]:
    return asked(input=list(items), **body).messages or []


def output(value: Any, kind: str = "function_call_output") -> dict[str, Any]:
    return {"type": kind, "call_id": "call_1", "output": value}


def parts(*given: dict[str, Any]) -> Any:
    return messages({"role": "user", "content": list(given)})[0]["content"]


def refusal(**body: Any) -> Refused:
    with pytest.raises((Refused, ValueError)) as caught:
        parsed(**body)
    error = caught.value
    return error if isinstance(error, Refused) else Refused(str(error))


# --- items


def test_the_input_is_a_string_or_items() -> None:
    assert asked().messages == [HELLO]
    assert messages({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}) == [
        HELLO
    ]


def test_instructions_come_first_and_what_a_developer_says_in_its_place() -> None:
    found = messages(HELLO, {"role": "developer", "content": "In French."}, HELLO, instructions="Be brief.")
    assert [message["role"] for message in found] == ["system", "user", "system", "user"]
    assert found[0]["content"] == "Be brief."


def test_items_of_one_step_are_one_message_and_outputs_follow_their_calls() -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I ask.\n"}]}
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]}
    second = CALL | {"call_id": "call_2"}
    found = messages(HELLO, reasoning, answer, CALL, second, output("2") | {"call_id": "call_2"}, output("1"), HELLO)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "user"]
    assert (found[1]["reasoning"], found[1]["content"]) == ("I ask.", "Wait.")
    assert found[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert [message["content"] for message in found[2:4]] == ["2", "1"]
    late = messages(HELLO, CALL, HELLO, output("1"))
    assert [message["role"] for message in late] == ["user", "assistant", "tool", "user"]


def test_outputs_may_hold_images() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"}
    found = messages(HELLO, CALL, output([{"type": "input_text", "text": "seen"}, image]))
    assert found[-1]["content"] == [
        {"type": "text", "text": "seen"},
        {"type": "image", "image": "data:image/png;base64,AAAA"},
    ]


def test_custom_tools_are_functions_of_one_text() -> None:
    ask = asked(tools=[PATCH])
    assert ask.tools is not None
    function = ask.tools[0]["function"]
    assert function["name"] == "apply_patch" and function["parameters"]["required"] == ["input"]
    assert "start: /.+/s" in function["parameters"]["properties"]["input"]["description"]
    call = {"type": "custom_tool_call", "call_id": "call_1", "name": "apply_patch", "input": "*** Begin"}
    found = messages(HELLO, call, output("Done", "custom_tool_call_output"))
    assert found[1]["tool_calls"][0]["function"] == {"name": "apply_patch", "arguments": {"input": "*** Begin"}}
    assert found[2] == {"role": "tool", "tool_call_id": "call_1", "content": "Done"}


def test_tools_that_others_run_are_skipped() -> None:
    others: list[dict[str, Any]] = [
        {"type": "web_search"}, {"type": "namespace", "name": "mcp__x", "tools": []}, {"type": "local_shell"},
    ]  # fmt: skip
    tools = asked(tools=[*others, TOOL]).tools
    assert tools is not None and [tool["function"]["name"] for tool in tools] == ["get_weather"]


@pytest.mark.parametrize(
    "reasoning",
    [
        {"summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}], "encrypted_content": None},
        {"summary": [{"type": "summary_text", "text": "Hm."}]},
        {"summary": [], "content": None, "encrypted_content": sealed("Hm.\n")},
        {"summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "gAAAA of another server"},
    ],
)
def test_thoughts_are_taken_back(reasoning: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "Hi"}
    assert messages(HELLO, {"type": "reasoning", "id": "rs_1"} | reasoning, answer, HELLO)[1]["reasoning"] == "Hm."


def test_parts_of_a_message() -> None:
    pdf = base64.b64encode(b"%PDF").decode()
    assert parts({"type": "input_file", "filename": "a.pdf", "file_data": f"data:application/pdf;base64,{pdf}"}) == [
        {"type": "pdf", "pdf": b"%PDF"}
    ]
    assert parts({"type": "input_file", "file_data": pdf}) == [{"type": "pdf", "pdf": b"%PDF"}]
    note = base64.b64encode("né".encode()).decode()
    assert (
        parts({"type": "input_file", "filename": "n.txt", "file_data": f"data:text/plain;base64,{note}"}) == "n.txt\nné"
    )
    assert parts({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}) == [
        {"type": "audio", "audio": b"\0\0\0"}
    ]
    assert parts({"type": "input_future", "x": 1}) == '{"type": "input_future", "x": 1}'
    assert messages({"type": "web_search_call", "id": "ws"})[0]["content"] == '{"type": "web_search_call", "id": "ws"}'


# --- options


@pytest.mark.parametrize(
    "choice, expected",
    [
        (None, "auto"),
        ("required", "required"),
        ({"type": "function", "name": "get_weather"}, "get_weather"),
        ({"type": "custom", "name": "apply_patch"}, "apply_patch"),
    ],
)
def test_tool_choice(choice: Any, expected: str) -> None:
    assert asked(tools=[TOOL, PATCH], tool_choice=choice).tool_choice == expected


def test_allowed_tools_leave_the_others_out() -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "apply_patch"}]}
    ask = asked(tools=[TOOL, PATCH], tool_choice=choice)
    assert ask.tools is not None and [tool["function"]["name"] for tool in ask.tools] == ["apply_patch"]
    assert ask.tool_choice == "required"


def test_options() -> None:
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}
    ask = asked(text={"format": form}, max_output_tokens=5, parallel_tool_calls=False, temperature=0, stream=True)
    assert (ask.response_format, ask.max_tokens, ask.parallel_tool_calls) == ({"type": "object"}, 5, False)
    assert (ask.sampling.temperature, ask.stream) == (0, True)
    assert asked(text={"format": {"type": "json_object"}}).response_format == "json"
    assert asked(text={"format": {"type": "text"}, "verbosity": "low"}).response_format is None
    assert asked().max_tokens is None


@pytest.mark.parametrize("name", ["mcp__x", "mcp__x__"])
@pytest.mark.parametrize("streams", [False, True])
def test_tools_of_a_namespace_are_called_by_it(name: str, streams: bool) -> None:
    """As Codex has those of MCP servers: a call without its namespace is no tool's to it."""
    group = {"type": "namespace", "name": name, "description": "Of x.", "tools": [TOOL, PATCH]}
    ask, writer = parsed(tools=[TOOL, group])
    assert [tool["function"]["name"] for tool in ask.tools or ()] == [
        "get_weather", "mcp__x__get_weather", "mcp__x__apply_patch",
    ]  # fmt: skip
    arguments: list[dict[str, Any]] = [{"city": "Paris"}, {"city": "Rome"}, {"input": "x"}]
    calls = list(zip(["get_weather", "mcp__x__get_weather", "mcp__x__apply_patch"], arguments, strict=True))
    parts = [
        called(n, *part) for n, (tool, told) in enumerate(calls) for part in ((tool, ""), (None, json.dumps(told)))
    ]
    events = streamed(writer, [*parts, last("stop", calls)])
    response = events[-1]["response"] if streams else whole(writer, [last("stop", calls)])
    told = [(item["type"], item["name"], item.get("namespace")) for item in response["output"]]
    assert told == [
        ("function_call", "get_weather", None), ("function_call", "get_weather", name),
        ("custom_tool_call", "apply_patch", name),
    ]  # fmt: skip
    found = messages(HELLO, *response["output"])[1]["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in found] == calls


def test_tools_that_come_with_the_input_stand_among_the_others() -> None:
    """Codex's tools may: once, before all that is said."""
    group = {"type": "namespace", "name": "functions", "description": "", "tools": [PATCH]}
    more = {"type": "additional_tools", "role": "developer", "tools": [group]}
    api = Responses("gemma", Shelf())
    ask, writer = parsed(api, input=[more, HELLO], tools=[TOOL])
    names = ["get_weather", "functions__apply_patch"]
    assert ask.messages == [HELLO] and [tool["function"]["name"] for tool in ask.tools or ()] == names
    response = whole(writer, [said("Hi"), last()])
    again = parsed(api, tools=[TOOL], previous_response_id=response["id"])[0]
    assert [tool["function"]["name"] for tool in again.tools or ()] == names
    assert refusal(input=[{"type": "additional_tools"}, HELLO]).field == "input[0].tools"
    assert refusal(input=[more | {"tools": [{"type": "function"}]}, HELLO]).field == "input[0].tools[0].name"


@pytest.mark.parametrize(
    "field, body",
    [
        ("input", {"input": []}),
        ("input", {"input": 5}),
        ("input[0]", {"input": ["x"]}),
        ("input[0].role", {"input": [{"role": "tool", "content": "x"}]}),
        ("input[0].content[0]", {"input": [{"role": "user", "content": ["x"]}]}),
        ("input[0].content[0].text", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
        ("input[0].content[0].image_url", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        (
            "input[0].content[0].file_id",
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file_1"}]}]},
        ),
        ("input[0].content[0].file_data", {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}),
        ("input[0].call_id", {"input": [output("x")]}),
        ("input[1].arguments", {"input": [HELLO, CALL | {"arguments": "{"}]}),
        ("input[1].arguments", {"input": [HELLO, CALL | {"arguments": "[]"}]}),
        ("input[1].name", {"input": [HELLO, {"type": "function_call", "call_id": "c", "arguments": "{}"}]}),
        ("instructions", {"instructions": 5}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("tools[0].name", {"tools": [{"type": "function"}]}),
        ("tool_choice", {"tool_choice": "any"}),
        ("tool_choice", {"tool_choice": ["auto"]}),
        ("tool_choice", {"tool_choice": {"type": "allowed_tools", "mode": 5}}),
        ("tool_choice.name", {"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}),
        ("tool_choice.type", {"tool_choice": {"type": "web_search"}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema"}}}),
        ("background", {"background": True}),
        ("conversation", {"conversation": "conv_1"}),
    ],
)
def test_what_is_wrong_is_named(field: str, body: dict[str, Any]) -> None:
    refused = refusal(**body)
    assert refused.status == 400 and refused.field == field
    assert field in refused.message and "\n" not in refused.message


# --- replies

USAGE = {
    "input_tokens": 100, "input_tokens_details": {"cached_tokens": 90, "cache_write_tokens": 0}, "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 8}, "total_tokens": 120,
}  # fmt: skip


def test_a_stream_of_a_thought_a_text_and_calls() -> None:
    patch = {"input": 'a "b"\nc'}
    pieces = [
        thought("I "), thought("ask.\n"), said("Wait"), said("."), called(0, "get_weather", ""),
        called(0, None, '{"city": "Paris"'), called(0, None, "}"), called(1, "apply_patch", ""),
        called(1, None, json.dumps(patch)[:-1]), called(1, None, "}"),
        last("stop", [("get_weather", {"city": "Paris"}), ("apply_patch", patch)]),
    ]  # fmt: skip
    events = streamed(parsed(tools=[TOOL, PATCH], include=["reasoning.encrypted_content"])[1], pieces)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    response = events[-1]["response"]
    assert response["output"] == done and response["usage"] == USAGE and response["model"] == "gemma"
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "custom_tool_call"]
    assert done[0]["content"][0]["text"] == "I ask.\n" and done[0]["encrypted_content"] == sealed("I ask.\n")
    assert done[1]["content"][0]["text"] == "Wait."
    assert done[2]["arguments"] == '{"city": "Paris"}' and done[3]["input"] == patch["input"]
    assert len({item["id"] for item in done} | {done[2]["call_id"], done[3]["call_id"]}) == 6
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places) and places[-1] == 3


def test_a_summary_is_given_where_one_is_asked_for() -> None:
    writer = parsed(reasoning={"effort": "low", "summary": "auto"})[1]
    events = streamed(writer, [thought("Hm."), said("Hi"), last()])
    assert "response.reasoning_summary_text.delta" in [event["type"] for event in events]
    assert "reasoning_text" not in str(events)
    assert whole(writer, [thought("Hm."), said("Hi"), last()])["output"][0]["summary"][0]["text"] == "Hm."


def test_a_whole_reply_and_what_is_gone_on_from_it() -> None:
    api = Responses("gemma", Shelf())
    pieces = [thought("I ask."), said("Wait."), last("stop", [("now", {})])]
    first = whole(parsed(api, instructions="Be brief.")[1], pieces)
    assert first["status"] == "completed" and first["usage"] == USAGE and first["output"][2]["arguments"] == "{}"
    answer = output("9:00") | {"call_id": first["output"][2]["call_id"]}
    ask, writer = parsed(api, input=[answer], previous_response_id=first["id"])
    assert [message["role"] for message in ask.messages or ()] == ["user", "assistant", "tool"]  # no instructions
    second = streamed(writer, [said("9"), last()])[-1]["response"]
    ask, _ = parsed(api, input="Thanks", previous_response_id=second["id"])
    assert [message["content"] for message in ask.messages or ()] == ["Hello", "Wait.", "9:00", "9", "Thanks"]
    reference = {"type": "item_reference", "id": first["output"][1]["id"]}
    for named in (reference, {"id": reference["id"]}, reference | {"type": None}):  # the type may be left out
        assert parsed(api, input=[HELLO, named, HELLO])[0].messages[1]["content"] == "Wait."  # type: ignore[index]


def test_what_is_not_kept_is_not_found() -> None:
    api = Responses("gemma", Shelf())
    kept = whole(parsed(api, scope="alice")[1], [said("Hi"), last()])["id"]
    unkept = whole(parsed(api, store=False)[1], [said("Hi"), last()])["id"]
    for scope, id in (("", kept), ("", unkept), ("alice", "resp_none")):
        with pytest.raises(Refused) as caught:
            parsed(api, scope, previous_response_id=id)
        assert (caught.value.status, caught.value.code) == (404, "previous_response_not_found")
    assert parsed(api, "alice", previous_response_id=kept)[0].messages


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MOST_STORED", 2)
    api = Responses("gemma", Shelf())
    ids = [whole(parsed(api)[1], [said("Hi"), last()])["id"] for _ in range(3)]
    assert refusal(api=api, previous_response_id=ids[0]).status == 404
    assert parsed(api, previous_response_id=ids[1])[0].messages
    monkeypatch.setattr(responses, "MOST_STORED", 10)
    monkeypatch.setattr(responses, "MOST_CHARACTERS", api.shelf.characters())
    newest = whole(parsed(api)[1], [said("Hi"), last()])["id"]
    assert refusal(api=api, previous_response_id=ids[2]).status == 404  # the other one has been used since
    assert parsed(api, previous_response_id=newest)[0].messages


@pytest.mark.parametrize("reason", ["length", "repetition"])
def test_a_reply_that_was_cut_is_incomplete(reason: str) -> None:
    events = streamed(parsed()[1], [called(0, "f", ""), called(0, None, '{"a": 1'), last(reason)])
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete" and response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (response["output"][0]["status"], response["output"][0]["arguments"]) == ("incomplete", '{"a": 1')
    assert streamed(parsed()[1], [called(0, "f", ""), last(reason)])[-1]["response"]["output"] == []
    cut = [called(0, "apply_patch", ""), called(0, None, '{"input": "x}"'), last(reason)]
    assert streamed(parsed(tools=[PATCH])[1], cut)[-1]["response"]["output"][0]["input"] == "x}"


def test_a_reply_that_was_cut_in_a_call_can_be_gone_on_from() -> None:
    api = Responses("gemma", Shelf())
    cut = [said("I ask."), called(0, "get_weather", ""), called(0, None, '{"city": "Pa'), last("length")]
    response = streamed(parsed(api, tools=[TOOL])[1], cut)[-1]["response"]
    assert response["output"][1]["arguments"] == '{"city": "Pa'
    ask, _ = parsed(api, previous_response_id=response["id"], input="Go on.")
    expected = [HELLO, {"role": "assistant", "content": "I ask."}, {"role": "user", "content": "Go on."}]
    assert ask.messages == expected == messages(HELLO, *response["output"], HELLO | {"content": "Go on."})
    assert refusal(input=[HELLO, CALL | {"arguments": '{"city": "Pa'}]).field == "input[1].arguments"


def test_a_ping_is_an_event_and_a_failure_names_its_code() -> None:
    writer = parsed()[1]
    created, again = writer.ping().split("\n\n")[:2]  # a stream may begin with one, while a prompt is prepared
    assert read(f"{created}\n\n")["type"] == "response.created"
    pings = [read(f"{again}\n\n"), *(read(event) for event in writer.begin(1)), read(writer.ping())]
    assert [(ping["type"], ping["sequence_number"]) for ping in pings] == [
        ("response.in_progress", number) for number in (1, 2, 3)
    ]
    (failed,) = writer.failed(Refused("too long", code="context_length_exceeded"))
    response = read(failed)["response"]
    assert response["status"] == "failed" and response["error"]["code"] == "context_length_exceeded"


def test_errors_have_the_protocols_form() -> None:
    refused = Refused("no", status=404, field="previous_response_id", code="previous_response_not_found")
    assert Responses("gemma", Shelf()).error(refused) == {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": "previous_response_id",
            "code": "previous_response_not_found",
        }
    }
