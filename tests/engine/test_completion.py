"""OpenAI's chat completions are understood whole, or refused by name."""

import json
from typing import Any

import pytest

from mlx_gemma4 import Sampling
from mlx_gemma4.engine.completion import UNBOUNDED, asked, completion, failure
from mlx_gemma4.engine.request import Options, Request
from mlx_gemma4.errors import FetchError, MediaError
from mlx_gemma4.reply.reply import Reply, Stats

MESSAGES = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def test_what_openais_clients_send_is_what_generate_takes() -> None:
    body = {
        "model": "gpt", "messages": MESSAGES, "max_completion_tokens": 30, "temperature": 0.5, "top_p": 0.9, "seed": 3,
        "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}, "n": 1, "user": "someone",
        "parallel_tool_calls": False, "response_format": {"type": "json_object"}, "stream": False, "stop": None,
        "reasoning_effort": "high", "frequency_penalty": 0.5, "logit_bias": {"17": -5}, "metadata": {"a": "b"},
    }  # fmt: skip
    request, options = asked(body)
    assert request == Request(content=MESSAGES, tools=TOOLS, thinking=True)
    assert options == Options(
        max_tokens=30, sampling=Sampling(temperature=0.5, top_p=0.9, seed=3, frequency_penalty=0.5),
        tool_choice="look", logit_bias={17: -5}, parallel_tool_calls=False, response_format={"type": "json_object"},
    )  # fmt: skip


def test_what_is_not_given_is_as_in_generate_but_a_reply_without_bound() -> None:
    request, options = asked({"messages": MESSAGES, "max_tokens": None, "temperature": None})
    assert (request, options) == (Request(content=MESSAGES), Options(max_tokens=UNBOUNDED))


def test_names_of_this_project_and_of_other_servers_are_taken() -> None:
    kwargs = {"enable_thinking": True, "preserve_thinking": True}
    request, options = asked(
        {"messages": MESSAGES, "image_budget": 70, "top_k": 5, "draft_length": 0, "chat_template_kwargs": kwargs}
    )
    assert request == Request(content=MESSAGES, image_budget=70, thinking=True, preserve_thinking=True)
    assert (options.sampling.top_k, options.draft_length) == (5, 0)
    assert asked({"messages": MESSAGES, "thinking": True})[0].thinking is True
    request, options = asked({"messages": MESSAGES, "reasoning_effort": "low"})  # as the server takes it
    assert (request.thinking, options.thinking_budget) == (True, 1024)
    request, options = asked({"messages": MESSAGES, "thinking": True, "thinking_budget": 0, "stop": "\n"})
    assert (request.thinking, options.stop) == (False, "\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body is a list; expected an object"),
        ({}, "messages is None; expected a list of messages"),
        ({"messages": "hello"}, "messages is a str; expected a list"),
        ({"messages": MESSAGES, "max_token": 5}, "the body has the key 'max_token'"),
        ({"messages": MESSAGES, "scope": "x"}, "the body has the key 'scope'"),
        ({"messages": MESSAGES, "logit_bias": {"cat": 1}}, "logit_bias has the key 'cat'"),
        ({"messages": MESSAGES, "logprobs": True}, "logprobs is True; expected False"),
        ({"messages": MESSAGES, "n": 3}, "n is 3; expected 1"),
        ({"messages": MESSAGES, "temperature": "warm"}, "temperature is 'warm'"),
        ({"messages": MESSAGES, "max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"messages": MESSAGES, "tool_choice": {"type": "allowed_tools"}}, "tool_choice is "),
        ({"messages": MESSAGES, "tool_choice": 3}, "tool_choice is 3"),
        ({"messages": MESSAGES, "reasoning_effort": "much"}, "reasoning_effort is 'much'; expected one of none, "),
        ({"messages": MESSAGES, "reasoning_effort": ["low"]}, "reasoning_effort is "),
        ({"messages": MESSAGES, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs is "),
        ({"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format has the type 'xml'"),
    ],
)
def test_what_would_not_be_heard_is_refused(body: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        asked(body)
    assert message in str(caught.value)


STATS = Stats(10, 4, 1.0, 5, 1.0, 0.1, 1, 1, 0, 0, [], 1.0)


@pytest.mark.parametrize(("reason", "finish"), [("stop", "stop"), ("length", "length"), ("repetition", "length")])
def test_a_reply_is_a_chat_completion(reason: str, finish: str) -> None:
    found = completion(Reply("Hi.", "hm", [], [1, 2], reason, STATS), "gemma", "x1")
    assert (found["id"], found["object"], found["model"]) == ("chatcmpl-x1", "chat.completion", "gemma")
    assert found["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hi.", "reasoning": "hm"}, "logprobs": None,
         "finish_reason": finish}
    ]  # fmt: skip
    assert found["usage"]["total_tokens"] == 15
    assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_its_calls_are_openais_and_can_be_sent_back() -> None:
    calls = [{"name": "look", "arguments": {"where": "здесь"}}] * 2
    found = completion(Reply("", None, calls, [1], "stop", STATS), "gemma", "x1")
    [choice] = found["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    made = choice["message"]["tool_calls"]
    assert len({call["id"] for call in made}) == 2
    assert json.loads(made[0]["function"]["arguments"]) == {"where": "здесь"}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "a wall"} for call in made]
    request, _ = asked({"messages": [*MESSAGES, choice["message"], *results], "tools": TOOLS})
    assert len(request.content) == 4


def test_an_error_says_whose_fault_it_is() -> None:
    assert failure(MediaError("no such file"))[0] == 400
    status, words = failure(FetchError("the server\nis silent"))
    assert (status, words["type"], words["message"]) == (500, "server_error", "the server is silent")
