"""An agent's conversation, step by step, through each protocol: each step reads what is new in it."""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")

from serving import served  # noqa: E402

from mlx_gemma4.serve.resident import Settings  # noqa: E402

RULES = " ".join(f"Rule {number}: say what is asked and nothing else." for number in range(60))
CITIES = ["Paris", "Rome", "Oslo"]
CITY = {"type": "object", "properties": {"city": {"enum": CITIES}}, "required": ["city"]}
TOOLS = [(name, f"Get the {what} in a city.") for name, what in (("get_weather", "weather"), ("get_time", "time"))]
STEPS = 5


@pytest.fixture(autouse=True)
def compiled_rounds() -> None:
    """As people have it: here it is plain rounds that save the seconds in which kernels are built."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(Settings(model="demo")) as running:
        yield running.url


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def result_of(city: str) -> str:
    return json.dumps({"city": city, "temperature": 21, "weather": "sunny"})


def anthropic_step(server: str, messages: list[Any], thinks: bool, number: int) -> tuple[Any, int, int]:
    """One more request, and its results put behind: what was called, and how much of the prompt was cached."""
    billing = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={number:05};"}
    body = {
        "model": "claude", "max_tokens": 300, "temperature": 0, "messages": messages,
        "system": [billing, {"type": "text", "text": RULES}],
        "thinking": {"type": "enabled", "budget_tokens": 30} if thinks else {"type": "disabled"},
        "tools": [{"name": name, "description": about, "input_schema": CITY} for name, about in TOOLS],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    message = post(f"{server}/v1/messages", body)
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    messages.append({"role": "assistant", "content": message["content"]})
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": result_of(call["input"]["city"])}
        for call in calls
    ]
    if results:  # as Claude Code puts them
        results.append({"type": "text", "text": "Go on."})
        messages.append({"role": "user", "content": results})
    told = message["usage"]
    cached = told["cache_read_input_tokens"]
    return [call["input"] for call in calls], cached, cached + told["input_tokens"]


def responses_step(server: str, items: list[Any], thinks: bool, number: int) -> tuple[Any, int, int]:
    body = {
        "model": "gpt", "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 300,
        "temperature": 0, "input": items, "instructions": RULES,
        "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": f"key-{number}",
        "reasoning": {"effort": "high" if thinks else "none", "summary": "auto"},
        "tools": [
            {"type": "function", "name": name, "description": about, "parameters": CITY} for name, about in TOOLS
        ],
    }  # fmt: skip
    response = post(f"{server}/v1/responses", body)
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    items += response["output"]
    given = [json.loads(call["arguments"]) for call in calls]
    items += [
        {"type": "function_call_output", "call_id": call["call_id"], "output": result_of(arguments["city"])}
        for call, arguments in zip(calls, given, strict=True)
    ]
    told = response["usage"]
    return given, told["input_tokens_details"]["cached_tokens"], told["input_tokens"]


def chat_step(server: str, messages: list[Any], thinks: bool, number: int) -> tuple[Any, int, int]:
    body = {
        "model": "gpt", "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300, "temperature": 0,
        "messages": [{"role": "system", "content": RULES}, *messages],
        "reasoning_effort": "high" if thinks else "none",
        "tools": [
            {"type": "function", "function": {"name": name, "description": about, "parameters": CITY}}
            for name, about in TOOLS
        ],
    }  # fmt: skip
    completion = post(f"{server}/v1/chat/completions", body)
    message = completion["choices"][0]["message"]
    messages.append(message)
    given = [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    messages += [
        {"role": "tool", "tool_call_id": call["id"], "content": result_of(arguments["city"])}
        for call, arguments in zip(message.get("tool_calls") or (), given, strict=True)
    ]
    told = completion["usage"]
    return given, told["prompt_tokens_details"]["cached_tokens"], told["prompt_tokens"]


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("step", [anthropic_step, responses_step, chat_step])
def test_each_step_after_the_first_reads_at_most_a_twentieth(server: str, step: Any, thinks: bool) -> None:
    said: list[Any] = [{"role": "user", "content": "What is the weather in Paris, Rome and Oslo?"}]
    shares = []
    for number in range(STEPS):
        called, cached, prompt = step(server, said, thinks, number)
        assert called and called[0]["city"] in CITIES
        shares.append(round(cached / prompt, 3))
    assert min(shares[1:]) >= 0.95, shares
