"""Agents' conversations with tools, through each protocol, with thinking and without: what of them is read again.

    python -m tests.loops

Each conversation has about 8,000 tokens of system and tools and 20 steps of at most 300, and is held twice: alone, and
with others at the same server, whose store then has room for little more than the conversation. They ask short things
for titles, each with instructions of its own, and long ones, whose prompts are read meanwhile. From the second step on
95 % of each prompt is to come from the store, both conversations are to say the same, and a reading that is broken off
at 60 % and asked again is to read at most 45 %. The exit status is 1 if anything of that is not so.
"""

import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parent))

from load import WORDS, server

from mlx_gemma4.weights.load import DEMO

CITIES = ["Paris", "Rome", "Oslo"]
CITY = {"type": "object", "properties": {"city": {"enum": CITIES}}, "required": ["city"]}
KINDS = ("weather", "time", "population", "mayor", "river", "height", "area", "founding", "food", "language")
QUESTION = "What is the weather in Paris, Rome and Oslo?"
THOUGHT = 30  # tokens
SILENCE = 600  # seconds, on a machine that others use too
CONTEXT = 32768  # tokens
SYSTEM = 8000  # tokens of system and tools
LONGEST_STEP = 300  # tokens
SHARE = 0.95  # of a prompt, from the store
BROKEN_OFF, READ_AGAIN = 0.6, 0.45


@dataclass(frozen=True)
class Errand:
    """What an agent says at every step."""

    rules: str
    tools: list[tuple[str, str]]  # names and descriptions
    notes: int = 0  # words beside what is asked for in a tool's result


@dataclass
class Step:
    """What came of one request, and how much of its prompt was not read again."""

    calls: list[dict[str, Any]]
    content: Any  # all of the reply, without what differs from one reply to the next
    cached: int
    prompt: int


def rules(count: int, topic: str = "say what is asked and nothing else") -> str:
    return " ".join(f"Rule {number}: {topic}." for number in range(count))


def tools(count: int) -> list[tuple[str, str]]:
    return [(f"get_{kind}", f"Get the {kind} in a city.") for kind in KINDS[:count]]


def result_of(errand: Errand, city: str, number: int) -> str:
    notes = " ".join(random.Random(f"{city} {number}").choices(WORDS, k=errand.notes))
    return json.dumps({"city": city, "temperature": 21, "weather": "sunny"} | ({"notes": notes} if notes else {}))


# --- the protocols ---------------------------------------------------------------------------------


def opened(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=SILENCE)


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = opened(port)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found: dict[str, Any] = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        raise ValueError(f"{path}: {answer.status} {found}")
    return found


def messages_body(errand: Errand, messages: list[Any], thinks: bool, number: int) -> dict[str, Any]:
    billing = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={number:05};"}
    return {
        "model": "claude", "max_tokens": LONGEST_STEP, "temperature": 0, "messages": messages,
        "system": [billing, {"type": "text", "text": errand.rules}],
        "thinking": {"type": "enabled", "budget_tokens": THOUGHT} if thinks else {"type": "disabled"},
        "tools": [{"name": name, "description": about, "input_schema": CITY} for name, about in errand.tools],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip


def messages_step(port: int, errand: Errand, messages: list[Any], thinks: bool, number: int) -> Step:
    """One more request, and its results put behind."""
    message = post(port, "/v1/messages", messages_body(errand, messages, thinks, number))
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    messages.append({"role": "assistant", "content": message["content"]})
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": result_of(errand, call["input"]["city"], number)}
        for call in calls
    ]
    if results:  # as Claude Code puts them
        results.append({"type": "text", "text": "Go on."})
        messages.append({"role": "user", "content": results})
    told = message["usage"]
    cached = told["cache_read_input_tokens"]
    said = [block | {"id": "", "signature": ""} for block in message["content"]]
    return Step([call["input"] for call in calls], said, cached, cached + told["input_tokens"])


def responses_step(port: int, errand: Errand, items: list[Any], thinks: bool, number: int) -> Step:
    body = {
        "model": "gpt", "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": LONGEST_STEP,
        "temperature": 0, "input": items, "instructions": errand.rules, "store": False,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": f"key-{number}",
        "reasoning": {"effort": "high" if thinks else "none", "summary": "auto"},
        "tools": [
            {"type": "function", "name": name, "description": about, "parameters": CITY}
            for name, about in errand.tools
        ],
    }  # fmt: skip
    response = post(port, "/v1/responses", body)
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    items += response["output"]
    given = [json.loads(call["arguments"]) for call in calls]
    items += [
        {"type": "function_call_output", "call_id": call["call_id"],
         "output": result_of(errand, arguments["city"], number)}
        for call, arguments in zip(calls, given, strict=True)
    ]  # fmt: skip
    told = response["usage"]
    said = [item | {"id": "", "call_id": "", "encrypted_content": ""} for item in response["output"]]
    return Step(given, said, told["input_tokens_details"]["cached_tokens"], told["input_tokens"])


def chat_body(errand: Errand, messages: list[Any], thinks: bool) -> dict[str, Any]:
    return {
        "model": "gpt", "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": LONGEST_STEP,
        "temperature": 0, "messages": [{"role": "system", "content": errand.rules}, *messages],
        "thinking": {"type": "enabled", "budget_tokens": THOUGHT} if thinks else {"type": "disabled"},
        "tools": [
            {"type": "function", "function": {"name": name, "description": about, "parameters": CITY}}
            for name, about in errand.tools
        ],
    }  # fmt: skip


def chat_step(port: int, errand: Errand, messages: list[Any], thinks: bool, number: int) -> Step:
    completion = post(port, "/v1/chat/completions", chat_body(errand, messages, thinks))
    message = completion["choices"][0]["message"]
    messages.append(message)
    calls = message.get("tool_calls") or []
    given = [json.loads(call["function"]["arguments"]) for call in calls]
    messages += [
        {"role": "tool", "tool_call_id": call["id"], "content": result_of(errand, arguments["city"], number)}
        for call, arguments in zip(calls, given, strict=True)
    ]
    told = completion["usage"]
    said = [message | {"tool_calls": [call["function"] for call in calls]}]
    return Step(given, said, told["prompt_tokens_details"]["cached_tokens"], told["prompt_tokens"])


Protocol = Callable[[int, Errand, list[Any], bool, int], Step]
PROTOCOLS: tuple[Protocol, ...] = (messages_step, responses_step, chat_step)


def conversation(port: int, protocol: Protocol, errand: Errand, thinks: bool, count: int) -> Iterator[Step]:
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    for number in range(count):
        yield protocol(port, errand, said, thinks, number)


# --- the others ------------------------------------------------------------------------------------


def title(port: int, number: int) -> None:
    """A short request with instructions of its own, whose beginning nobody asks for again."""
    about = f"{number}: write a title of three words for what was asked, " + "and no more than that, " * 10
    body = {"messages": [{"role": "system", "content": about}, {"role": "user", "content": QUESTION}],
            "max_tokens": 8, "temperature": 0}  # fmt: skip
    post(port, "/v1/chat/completions", body)


@dataclass
class Others:
    """Who asks the same server meanwhile."""

    port: int
    errand: Errand
    is_over: threading.Event = field(default_factory=threading.Event)
    titles: int = 0
    long: int = 0
    failed: list[str] = field(default_factory=list)

    def ask_for_titles(self) -> None:
        while not self.is_over.is_set():
            title(self.port, self.titles)
            self.titles += 1

    def ask_at_length(self) -> None:
        """A prompt as long as the agent's own, and left before it is read whole; then another."""
        while not self.is_over.is_set():
            errand = Errand(f"Agent {self.long}. {self.errand.rules}", self.errand.tools)
            broken_off(self.port, errand, 0.3)
            self.long += 1
            self.is_over.wait(1)

    def guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")

        return run


@contextmanager
def company(port: int, errand: Errand) -> Iterator[Others]:
    others = Others(port, errand)
    threads = [threading.Thread(target=others.guarded(own)) for own in (others.ask_for_titles, others.ask_at_length)]
    for thread in threads:
        thread.start()
    try:
        yield others
    finally:
        others.is_over.set()
        for thread in threads:
            thread.join()


def broken_off(port: int, errand: Errand, share: float) -> int:
    """Leave when so much of a prompt has been read; how many tokens of it had been by what the stream said last."""
    connection = opened(port)
    body = chat_body(errand, [{"role": "user", "content": QUESTION}], False)
    asked = json.dumps(body | {"stream": True, "return_progress": True})
    connection.request("POST", "/v1/chat/completions", asked, {"Content-Type": "application/json"})
    answer, read = connection.getresponse(), 0
    for line in answer:
        if line.startswith(b"data: {") and (progress := json.loads(line[6:]).get("prompt_progress")):
            read = progress["processed"]
            if read >= share * progress["total"]:
                break
    answer.close()
    connection.close()
    return read


# --- all of it -------------------------------------------------------------------------------------


def stretched_demo(folder: Path) -> Path:
    """The demo with a context in which all has room, in float32, whose products are faster on a CPU."""
    convert = [sys.executable, "-m", "mlx_gemma4.convert", "--hf-path", str(DEMO), "--mlx-path", str(folder)]
    subprocess.run([*convert, "--dequantize"], check=True, stderr=subprocess.DEVNULL)
    for path in (folder / "config.json", folder / "drafter" / "config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["text_config"]["max_position_embeddings"] = CONTEXT
        path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def sized(port: int) -> Errand:
    """An errand of as many rules as there is room for."""

    def tokens(count: int) -> int:
        body = messages_body(Errand(rules(count), tools(len(KINDS))), [{"role": "user", "content": "?"}], False, 0)
        told: int = post(port, "/v1/messages/count_tokens", body)["input_tokens"]
        return told

    least, more = tokens(0), tokens(100)
    return Errand(rules(round(100 * (SYSTEM - least) / (more - least))), tools(len(KINDS)), notes=12)


def store_bytes(port: int) -> int:
    connection = opened(port)
    connection.request("GET", "/metrics")
    told = connection.getresponse().read().decode()
    connection.close()
    return int(float(next(line.split()[1] for line in told.splitlines() if line.startswith("mlx_gemma4_store_bytes"))))


def held(model: Path, log: Path, protocol: Protocol, thinks: bool, count: int, bound: int | None) -> tuple[Any, int]:
    """A conversation at a server of its own, with others where its store has a bound: all that was said in it, and what
    the store holds then. Prints what it measures."""
    wrong: list[str] = []
    with server(model, log, *([] if bound is None else ["--store-bytes", str(bound)])) as (_, port):
        errand = sized(port)
        steps: list[Step] = []
        seconds: list[float] = []
        with nullcontext(None) if bound is None else company(port, errand) as others:
            started = time.perf_counter()
            for step in conversation(port, protocol, errand, thinks, count):
                steps.append(step)
                seconds.append(time.perf_counter() - started)
                started = time.perf_counter()
        shares = [step.cached / step.prompt for step in steps[1:]]
        grown = [after.prompt - before.prompt for before, after in pairwise(steps)]
        kept = store_bytes(port)
        if others is not None:
            wrong += others.failed
            other = Errand("Another. " + errand.rules, errand.tools)
            read = broken_off(port, other, BROKEN_OFF)
            again = chat_step(port, other, [{"role": "user", "content": QUESTION}], False, 0)
            left = 1 - again.cached / again.prompt
            wrong += [f"{100 * left:.0f} % were read again"] if left > READ_AGAIN else []
            print(
                f"  with {others.titles} titles and {others.long} long prompts, {kept / 1e6:.0f} MB kept: "
                f"broken off at {100 * read / again.prompt:.0f} %, then read {100 * left:.0f} %"
            )
    print(
        f"  prompts of {steps[0].prompt} to {steps[-1].prompt} tokens, steps of {min(grown)} to {max(grown)}: "
        f"{100 * min(shares):.1f} % and more from the store; {seconds[0]:.1f} s for the first step, "
        f"{sum(seconds[1:]) / len(seconds[1:]):.2f} s for a later one",
        flush=True,
    )
    wrong += [f"a share of {min(shares):.3f}"] if min(shares) < SHARE else []
    wrong += [f"a step of {max(grown)} tokens"] if max(grown) > LONGEST_STEP else []
    wrong += ["a step without a call"] if not all(step.calls for step in steps) else []
    return ([step.content for step in steps], wrong), kept


def main(
    steps: Annotated[int, typer.Option(min=2, help="Of each conversation.")] = 20,
) -> None:
    """Hold them all."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = stretched_demo(folder / "model")
        for protocol in PROTOCOLS:
            for thinks in (False, True):
                what = f"{protocol.__name__.removesuffix('_step')}, thinking {'on' if thinks else 'off'}"
                print(what, flush=True)
                (alone, faults), kept = held(model, folder / "log", protocol, thinks, steps, None)
                (beside, more), _ = held(model, folder / "log", protocol, thinks, steps, kept * 3 // 2)
                wrong += [f"{what}: {fault}" for fault in faults + more]
                for number, (one, other) in enumerate(zip(alone, beside, strict=True)):
                    if one != other:
                        wrong.append(f"{what}: with others, step {number} says {other}, alone {one}")
                        break
    print(f"{len(wrong)} wrong")
    for line in wrong[:20]:
        print(line[:3000])
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    typer.run(main)
