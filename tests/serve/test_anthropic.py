"""Anthropic's Messages, without a model: what is asked becomes our messages, and replies its blocks and events."""

import base64
import json
from typing import Any

import pytest

pytest.importorskip("pydantic")  # of the extra `serve`

from spoken import called, last, said, streamed, thought, whole

from mlx_gemma4.serve.anthropic import Anthropic
from mlx_gemma4.serve.ask import Ask, Refused, Writer
from mlx_gemma4.serve.turns import sealed

TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
HELLO = [{"role": "user", "content": "Hello"}]


def parsed(**body: Any) -> tuple[Ask, Writer]:
    return Anthropic("gemma").parse({"model": "claude", "max_tokens": 100, "messages": HELLO} | body, "")


def asked(**body: Any) -> Ask:
    return parsed(**body)[0]


def messages(*given: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    return asked(messages=list(given), **body).messages or []


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content} | more


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value} | more


def refusal(**body: Any) -> Refused:
    with pytest.raises((Refused, ValueError)) as caught:
        parsed(**body)
    error = caught.value
    return error if isinstance(error, Refused) else Refused(str(error))


# --- messages


@pytest.mark.parametrize("system", ["Be brief.", [text("Be brief.", cache_control={"type": "ephemeral"})]])
def test_the_system_turn_is_a_string_or_blocks(system: Any) -> None:
    assert messages(*HELLO, system=system) == [{"role": "system", "content": "Be brief."}, *HELLO]


@pytest.mark.parametrize("rest", ["", "\nBe brief."])
def test_the_billing_block_is_dropped_so_that_what_follows_stays_the_same(rest: str) -> None:
    billing = text("x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;" + rest)
    system = [billing, text("Be brief.")] if not rest else [billing]
    assert messages(*HELLO, system=system)[0] == {"role": "system", "content": "Be brief."}
    assert messages(*HELLO, system=[billing]) == HELLO if not rest else True
    assert messages(*HELLO, system=billing["text"] + "\nBe brief.")[0]["content"].endswith("Be brief.")


def test_a_system_message_stays_in_its_place() -> None:
    given = [*HELLO, assistant(text("Hi")), {"role": "system", "content": "Now in French."}, user(text("Go on"))]
    assert [message["role"] for message in messages(*given)] == ["user", "assistant", "system", "user"]


def test_texts_side_by_side_are_parted_by_a_line() -> None:
    assert messages(user(text("<system-reminder>a</system-reminder>"), text("b"))) == [
        {"role": "user", "content": "<system-reminder>a</system-reminder>\nb"}
    ]


def test_a_step_with_a_tool_is_one_message_and_its_result_the_next() -> None:
    thinking = {"type": "thinking", "thinking": "I ask.\n", "signature": "x"}
    found = messages(*HELLO, assistant(thinking, text("Wait."), CALL), user(result("Sunny"), text("And now?")))
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert found[1:] == [
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning": "I ask.",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Sunny"},
        {"role": "user", "content": "And now?"},
    ]


def test_results_stand_behind_their_call_whatever_stands_between() -> None:
    other = CALL | {"id": "toolu_2"}
    given = [*HELLO, assistant(CALL, other), user(text("so")), user(result("1"), result("2", tool_use_id="toolu_2"))]
    assert [message.get("tool_call_id", message["role"]) for message in messages(*given)] == [
        "user", "assistant", "toolu_1", "toolu_2", "user",
    ]  # fmt: skip


def test_an_error_of_a_tool_says_so_and_images_of_results_are_kept() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    found = messages(*HELLO, assistant(CALL), user(result([text("broken"), image], is_error=True)))
    assert found[-1]["content"] == [text("Error:\nbroken"), {"type": "image", "image": b"\0\0\0"}]
    assert messages(*HELLO, assistant(CALL), user(result("broken", is_error=True)))[-1]["content"] == "Error:\nbroken"


def test_documents_are_pdfs_texts_or_blocks() -> None:
    def document(**source: Any) -> dict[str, Any]:
        return {"type": "document", "title": "T", "source": source}

    pdf = document(type="base64", media_type="application/pdf", data=base64.b64encode(b"%PDF").decode())
    assert messages(user(pdf))[0]["content"] == [text("T"), {"type": "pdf", "pdf": b"%PDF"}]
    plain = document(type="text", media_type="text/plain", data="words")
    assert messages(user(plain))[0]["content"] == "T\nwords"
    assert messages(user(document(type="content", content=[text("a"), text("b")])))[0]["content"] == "T\na\nb"
    linked = document(type="url", url="https://x.test/a.pdf")
    assert messages(user(linked))[0]["content"][-1] == {"type": "pdf", "pdf": "https://x.test/a.pdf"}


def test_what_becomes_text_has_no_marks_that_move_on() -> None:
    block = {"type": "search_result", "source": "s", "title": "t", "content": []}
    marked = block | {"cache_control": {"type": "ephemeral"}}
    assert messages(user(block)) == messages(user(marked))
    added = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "x"}}
    system = {"role": "system", "content": [added, {"type": "text", "text": "Now there is x."}]}
    assert messages(*HELLO, system)[1]["content"] == f"{json.dumps(added)}\nNow there is x."


def test_unknown_blocks_become_text() -> None:
    found = messages(user({"type": "search_result", "title": "é"}), assistant({"type": "server_tool_use", "id": "s"}))
    assert found[0]["content"] == '{"type": "search_result", "title": "é"}'
    assert json.loads(found[1]["content"]) == {"type": "server_tool_use", "id": "s"}


def test_thoughts_are_taken_back_from_their_text_or_their_seal() -> None:
    for block in (
        {"type": "thinking", "thinking": "Hm.", "signature": "of another server"},
        {"type": "thinking", "thinking": "", "signature": sealed("Hm.\n")},
        {"type": "redacted_thinking", "data": sealed("Hm.")},
    ):
        assert messages(*HELLO, assistant(block, text("Hi")), *HELLO)[1]["reasoning"] == "Hm."
    for foreign in ("EqQBCgIYAhIM1gbcDa9GJwZA2b3h", "é", ""):
        block = {"type": "redacted_thinking", "data": foreign}
        assert not messages(*HELLO, assistant(block, text("Hi")), *HELLO)[1].get("reasoning")


# --- options


@pytest.mark.parametrize(
    "thinking, expected",
    [
        (None, (None, None)),
        ({"type": "enabled", "budget_tokens": 2048}, (True, 2048)),
        ({"type": "adaptive"}, (True, None)),
        ({"type": "disabled"}, (False, None)),
    ],
)
def test_thinking(thinking: Any, expected: tuple[bool | None, int | None]) -> None:
    ask = asked(thinking=thinking)
    assert (ask.thinking, ask.thinking_budget) == expected


@pytest.mark.parametrize(
    "choice, expected",
    [
        (None, ("auto", True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", False)),
        ({"type": "any"}, ("required", True)),
        ({"type": "tool", "name": "get_weather"}, ("get_weather", True)),
        ({"type": "none"}, ("none", True)),
    ],
)
def test_tool_choice(choice: Any, expected: tuple[str, bool]) -> None:
    ask = asked(tools=[TOOL], tool_choice=choice)
    assert (ask.tool_choice, ask.parallel_tool_calls) == expected


def test_tools_that_only_their_server_runs_are_skipped() -> None:
    others = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "mcp_toolset", "mcp_server_name": "m"}]
    tools = asked(tools=[*others, TOOL | {"type": "custom"}]).tools
    assert tools is not None and [tool["function"]["name"] for tool in tools] == ["get_weather"]
    assert tools[0]["function"]["parameters"] == TOOL["input_schema"]
    assert asked(tools=others).tools is None


def test_forms_of_the_answer() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    assert asked(output_config={"format": form}).response_format == {"type": "object"}
    assert asked(output_format=form).response_format == {"type": "object"}


def test_numbers_and_stops() -> None:
    ask = asked(temperature=0.5, top_k=3, top_p=0.9, stop_sequences=["END"], stream=True)
    assert (ask.sampling.temperature, ask.sampling.top_k, ask.sampling.top_p) == (0.5, 3, 0.9)
    assert (ask.stop, ask.max_tokens, ask.stream) == (("END",), 100, True)
    assert asked(max_tokens=None).max_tokens is None


def test_a_reply_that_was_begun_is_gone_on_with() -> None:
    assert asked(messages=[*HELLO, assistant(text("The answer is ("))]).continue_final_message
    assert not asked().continue_final_message


@pytest.mark.parametrize(
    "field, body",
    [
        ("messages", {"messages": None}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        ("messages[0].content[0]", {"messages": [user("text")]}),
        ("messages[0].content[0].text", {"messages": [user({"type": "text"})]}),
        ("messages[0].content[0].text", {"messages": [user(text(5))]}),  # type: ignore[arg-type]
        ("messages[0].content[0].source", {"messages": [user({"type": "image"})]}),
        ("messages[0].content[0].source.data", {"messages": [user({"type": "image", "source": {"type": "base64"}})]}),
        (
            "messages[0].content[0].source.data",
            {"messages": [user({"type": "image", "source": {"type": "base64", "data": "?"}})]},
        ),
        ("messages[0].content[0].source.type", {"messages": [user({"type": "image", "source": {"type": "file"}})]}),
        ("messages[0].content[0].tool_use_id", {"messages": [user(result("x"))]}),
        ("messages[1].content[0].input", {"messages": [*HELLO, assistant(CALL | {"input": "x"})]}),
        ("messages[1].content[0].id", {"messages": [*HELLO, assistant({"type": "tool_use"})]}),
        ("messages[1].content[0].thinking", {"messages": [*HELLO, assistant({"type": "thinking"}), *HELLO]}),
        ("messages", {"messages": [*HELLO, assistant(CALL)]}),
        ("system[0].type", {"system": [{"type": "image"}]}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": True}),
        ("temperature", {"temperature": "hot"}),
        ("stop_sequences[0]", {"stop_sequences": [""]}),
        ("thinking.type", {"thinking": {"type": "deep"}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": -1}}),
        ("tools[0].input_schema", {"tools": [{"name": "f"}]}),
        ("tools[0].name", {"tools": [{"input_schema": {}}]}),
        ("tools", {"tool_choice": {"type": "any"}}),
        ("tool_choice.name", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}),
        ("output_config.format.schema", {"output_config": {"format": {"type": "json_schema"}}}),
        ("mcp_servers", {"mcp_servers": [{"url": "x"}]}),
    ],
)
def test_what_is_wrong_is_named(field: str, body: dict[str, Any]) -> None:
    refused = refusal(**body)
    assert refused.status == 400 and refused.field == field
    assert field in refused.message and "\n" not in refused.message


def test_errors_have_the_protocols_form() -> None:
    error = Anthropic("gemma").error
    assert error(Refused("no", status=429)) == {"type": "error", "error": {"type": "rate_limit_error", "message": "no"}}
    kinds = {status: error(Refused("no", status=status))["error"]["type"] for status in (400, 401, 404, 413, 500, 503)}
    assert kinds == {
        400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
        500: "api_error", 503: "overloaded_error",
    }  # fmt: skip


# --- replies

USAGE = {
    "input_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 90, "output_tokens": 20,
    "output_tokens_details": {"thinking_tokens": 8},
}  # fmt: skip


def test_a_stream_of_a_thought_a_text_and_calls() -> None:
    calls = [("get_weather", {"city": "Paris", "days": 2}), ("now", {})]
    pieces = [
        thought("I "), thought("ask.\n"), said("Wait"), said("."), called(0, "get_weather", ""),
        called(0, None, '{"city": "Paris"'), called(0, None, ', "days": 2}'), called(1, "now", "{}"),
        last("stop", calls),
    ]  # fmt: skip
    events = streamed(parsed()[1], pieces)
    assert events[0]["message"]["usage"]["input_tokens"] == 100 and events[0]["message"]["model"] == "gemma"
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.get("name") for block in starts[2:]] == ["get_weather", "now"]
    assert len({block["id"] for block in starts[2:]}) == 2
    deltas = [
        (event["index"], *list(event["delta"].items())) for event in events if "index" in event and "delta" in event
    ]
    assert deltas == [
        (0, ("type", "thinking_delta"), ("thinking", "I ")),
        (0, ("type", "thinking_delta"), ("thinking", "ask.\n")),
        (0, ("type", "signature_delta"), ("signature", sealed("I ask.\n"))),
        (1, ("type", "text_delta"), ("text", "Wait")),
        (1, ("type", "text_delta"), ("text", ".")),
        (2, ("type", "input_json_delta"), ("partial_json", '{"city": "Paris"')),
        (2, ("type", "input_json_delta"), ("partial_json", ', "days": 2}')),
        (3, ("type", "input_json_delta"), ("partial_json", "{}")),
    ]
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and events[-2]["usage"] == USAGE
    assert events[-1] == {"type": "message_stop"}


def test_a_whole_reply() -> None:
    pieces = [thought("I ask.\n"), said("Wait."), last("stop", [("now", {})])]
    message = whole(parsed()[1], pieces)
    assert message["content"][:2] == [
        {"type": "thinking", "thinking": "I ask.", "signature": sealed("I ask.")},
        {"type": "text", "text": "Wait."},
    ]
    assert message["content"][2]["input"] == {} and message["stop_reason"] == "tool_use"
    assert message["usage"] == USAGE and message["model"] == "gemma"


def test_what_was_given_is_taken_back_as_it_was() -> None:
    content = whole(parsed()[1], [thought("I ask.\n"), said("Wait."), last("stop", [("now", {"a": [1, None]})])])[
        "content"
    ]
    answer = {"type": "tool_result", "tool_use_id": content[2]["id"], "content": "9:00"}
    message = messages(*HELLO, assistant(*content), user(answer))[1]
    assert (message["reasoning"], message["content"]) == ("I ask.", "Wait.")
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": {"a": [1, None]}}


def test_thoughts_that_are_to_be_omitted_are_sealed() -> None:
    writer = parsed(thinking={"type": "adaptive", "display": "omitted"})[1]
    events = streamed(writer, [thought("Hm."), said("Hi"), last()])
    assert [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"] == [
        "signature_delta", "text_delta",
    ]  # fmt: skip
    block = whole(writer, [thought("Hm."), said("Hi"), last()])["content"][0]
    assert block == {"type": "thinking", "thinking": "", "signature": sealed("Hm.")}


@pytest.mark.parametrize(
    "reason, expected", [("stop", "end_turn"), ("length", "max_tokens"), ("repetition", "max_tokens")]
)
def test_why_a_reply_ends(reason: str, expected: str) -> None:
    assert whole(parsed()[1], [said("Hi"), last(reason)])["stop_reason"] == expected


def test_a_stop_sequence_is_named() -> None:
    pieces = [said("Hi"), last(stop="END")]
    told = {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert streamed(parsed()[1], pieces)[-2]["delta"] == told
    assert told.items() <= whole(parsed()[1], pieces).items()


def test_a_call_that_is_cut_before_its_first_argument_is_none() -> None:
    events = streamed(parsed()[1], [said("Hi"), called(0, "f", ""), last("length")])
    assert "tool_use" not in str(events) and events[-2]["delta"]["stop_reason"] == "max_tokens"
    events = streamed(parsed()[1], [called(0, "f", ""), called(0, None, '{"a": 1'), last("length")])
    assert [event["delta"]["partial_json"] for event in events if "index" in event and "delta" in event] == ['{"a": 1']


def test_a_ping_and_an_error_of_a_stream() -> None:
    writer = parsed()[1]
    assert writer.ping() == 'event: ping\ndata: {"type":"ping"}\n\n'
    assert list(writer.failed(Refused("no", status=500))) == [
        'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"no"}}\n\n'
    ]
