"""OpenAI's chat completions: what their JSON asks for, and a reply as they have it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.engine.request import Options, Request
from mlx_gemma4.errors import Kind, a, kind, shown, unbroken
from mlx_gemma4.reply.opening import as_json
from mlx_gemma4.reply.reply import Piece, Reply, Stats

UNBOUNDED = 2**31  # tokens of a reply if nothing is said: it ends where the context does

REQUEST = ("tools", "image_budget", "preserve_thinking", "continue_final_message")
OPTIONS = (
    "draft_length", "repetition_detection", "response_format", "parallel_tool_calls", "stop", "thinking_budget",
)  # fmt: skip
SAMPLING = tuple(field.name for field in fields(Sampling))
OTHERS = (
    "messages", "max_tokens", "max_completion_tokens", "tool_choice", "logit_bias", "thinking", "reasoning_effort",
    "chat_template_kwargs",
)  # fmt: skip
# What says nothing of the reply, or what a whole reply on this machine has no use for.
IDLE = (
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "verbosity", "stream", "stream_options",
)  # fmt: skip
# What is taken if it asks for nothing.
NEUTRAL = {"n": 1, "modalities": ["text"], "functions": [], "logprobs": False, "top_logprobs": 0}
BUDGETS = {"low": 1024, "medium": 8192}  # tokens of a thought; more effort has no bound, less does not think
EFFORTS = ("none", "minimal", *BUDGETS, "high", "xhigh", "max")
TEMPLATE = {"enable_thinking": "thinking", "preserve_thinking": "preserve_thinking"}  # as vLLM has them


def asked(body: Any) -> tuple[Request, Options]:
    """What the body of a chat completion asks for, with this project's own names beside OpenAI's; null is not given.

    ValueError that names what is wrong, and every key that would not be heard.
    """
    if not isinstance(body, dict):
        raise ValueError(f"the body is {a(body)}; expected an object")
    given = {key: value for key, value in body.items() if value is not None}
    for key in given.keys() - {*REQUEST, *OPTIONS, *SAMPLING, *OTHERS, *IDLE}:
        if key not in NEUTRAL:
            raise ValueError(f"the body has the key {shown(key)}; expected those of OpenAI's chat completions")
        if given[key] != NEUTRAL[key]:
            raise ValueError(f"{key} is {shown(given[key])}; expected {NEUTRAL[key]!r}, or none")
    if not isinstance(given.get("messages"), list):
        raise ValueError(f"messages is {a(given.get('messages'))}; expected a list of messages")
    asks, budget = thinking_of(given)
    asks |= chosen(given, REQUEST)
    options = {"thinking_budget": budget, "tool_choice": tool_choice(given.get("tool_choice", "auto"))}
    options |= chosen(given, OPTIONS)
    if isinstance(bias := given.get("logit_bias"), dict):  # JSON has no numbers as keys
        options["logit_bias"] = {int(key) if key.isdecimal() else key: value for key, value in bias.items()}
    elif bias is not None:
        options["logit_bias"] = bias
    limit = given.get("max_completion_tokens", given.get("max_tokens", UNBOUNDED))
    sampling = Sampling(**chosen(given, SAMPLING))
    how = Options(max_tokens=limit, sampling=sampling, **options)
    return Request(content=given["messages"], **asks | {"thinking": how.thinks(asks["thinking"])}), how


def chosen(given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def thinking_of(given: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The arguments of a Request in what others call thinking, and the bound of a thought."""
    kwargs = given.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict) or not kwargs.keys() <= TEMPLATE.keys():
        raise ValueError(f"chat_template_kwargs is {shown(kwargs)}; expected {' and '.join(TEMPLATE)} alone")
    thinks, budget = thought_of(given.get("reasoning_effort"), "reasoning_effort")
    asks = {"thinking": given.get("thinking", bool(thinks))}
    return asks | {TEMPLATE[key]: value for key, value in kwargs.items()}, budget


def thought_of(effort: Any, field: str) -> tuple[bool | None, int | None]:
    """Whether to think, None where nothing is said, and for how many tokens. ValueError if there is no such effort."""
    if effort is None:
        return None, None
    if effort not in EFFORTS:
        raise ValueError(f"{field} is {shown(effort)}; expected one of {', '.join(EFFORTS)}")
    return effort not in ("none", "minimal"), BUDGETS.get(effort)


def tool_choice(choice: Any) -> Any:
    """OpenAI's {"type": "function", "function": {"name": …}} as the name."""
    function = choice.get("function") if isinstance(choice, dict) else None
    return function.get("name") if isinstance(function, dict) else choice


def completion(reply: Reply, model: str, name: str) -> dict[str, Any]:
    """A reply as the object `chat.completion`; name: what tells it from others."""
    message = reply.message
    for call in message.get("tool_calls", ()):
        arguments = as_json(call["function"]["arguments"])
        call |= {"id": f"{call['id']}_{name}", "function": call["function"] | {"arguments": arguments}}
    if "tool_calls" in message and not message["content"]:
        message["content"] = None
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}],
        "usage": usage([reply.stats]),
    }


def finish_reason(last: Piece | Reply) -> str:
    if last.finish_reason == "stop":
        return "tool_calls" if last.tool_calls else "stop"
    return "length"


def usage(all_stats: Sequence[Stats]) -> dict[str, Any]:
    """Of all choices; the prompt, which they share, counts once."""
    first, written = all_stats[0], sum(stats.generation_tokens for stats in all_stats)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": first.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(stats.thinking_tokens for stats in all_stats)},
    }


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """An error as a status of HTTP and the object that OpenAI answers with."""
    is_wrong = kind(error) is Kind.WRONG_REQUEST
    words = {"message": unbroken(error), "type": "invalid_request_error" if is_wrong else "server_error"}
    return 400 if is_wrong else 500, words | {"param": None, "code": None}
