"""Replies held to a form, end to end: a random model at temperature 1 cannot but keep to it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from mcp_tools import TOOLS
from rounds import GREEDY

from mlx_gemma4 import Engine, Prompt, Sampling, Session, collect, generate, stream_generate
from mlx_gemma4.decoding.constraint import Constraint, DeadEndError
from mlx_gemma4.decoding.round import forget_thread
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.messages import check_tools
from mlx_gemma4.prompt.processor import Processor

Loaded = tuple[Model, Processor]
CITY = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "bc"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 1, "maxItems": 3}
WARM = Sampling(temperature=1.0, top_k=0, top_p=1.0)
IDS = [2, 9, 14, 120, 130, 140, 9, 14, 150]
CHOICE = {"name": "pick", "description": "", "parameters": CITY}


def prompt(tools: Any = ()) -> Prompt:
    return Prompt(IDS, tools=tuple(check_tools(list(tools))))


@pytest.mark.parametrize("drafts", [0, 3, "auto"])
@pytest.mark.parametrize("schema", [CITY, LIST], ids=["object", "list"])
def test_finished_replies_of_a_random_model_fit_the_schema(planted: Loaded, schema: Any, drafts: int | str) -> None:
    finished = 0
    for seed in range(6):
        own = replace(WARM, seed=seed)
        options: dict[str, Any] = {"max_tokens": 120, "sampling": own, "draft_length": drafts}
        reply = generate(*planted, prompt(), response_format=schema, **options)
        if reply.finish_reason == "stop":
            finished += 1
            jsonschema.validate(json.loads(reply.text), schema)
    assert finished > 2


@pytest.mark.parametrize("drafts", [0, 3])
def test_calls_of_a_random_model_fit_the_tools(planted: Loaded, drafts: int) -> None:
    found = 0
    for seed in range(6):
        options: dict[str, Any] = {"max_tokens": 150, "sampling": replace(WARM, seed=seed), "draft_length": drafts}
        reply = generate(*planted, prompt([CHOICE]), tool_choice="required", parallel_tool_calls=False, **options)
        assert reply.text == ""
        if reply.finish_reason == "stop":
            [call] = reply.tool_calls
            jsonschema.validate(call["arguments"], CITY)
            found += 1
    assert found > 2


@pytest.mark.parametrize("response_format", [CITY, "json", {"type": "regex", "regex": "[a-z]{5,20}"}], ids=str)
def test_greedy_held_replies_are_the_same_at_every_length(planted: Loaded, response_format: Any) -> None:
    replies = [
        generate(
            *planted, prompt(), response_format=response_format, max_tokens=40, sampling=GREEDY, draft_length=drafts
        ).token_ids
        for drafts in (0, 1, 3, 7, "auto")
    ]
    assert all(own == replies[0] for own in replies)


def test_tools_leave_a_reply_without_calls_as_it_is(planted: Loaded) -> None:
    free = generate(*planted, prompt(), max_tokens=60, sampling=GREEDY)
    held = generate(*planted, prompt(TOOLS), max_tokens=60, sampling=GREEDY, draft_length=3)
    assert 48 not in free.token_ids and held.token_ids == free.token_ids
    assert held.stats.tokens_per_round > 1


@pytest.fixture
def eager(planted: Loaded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    """A model that calls a tool at once where it may."""
    model = planted[0]
    language = type(model.language_model)
    head = language.head

    def call_soon(self: Any, hidden: Any, adapters: Any) -> Any:
        logits = head(self, hidden, adapters)
        logits[..., 48] += 20
        return logits

    monkeypatch.setattr(language, "head", call_soon)
    forget_thread(model)  # rounds that were compiled with another head
    yield planted
    forget_thread(model)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_call_is_held_from_its_first_token(eager: Loaded, drafts: int) -> None:
    """Also one that begins in the middle of a round, of which another had been handed over."""
    for seed in range(4):
        options: dict[str, Any] = {"sampling": replace(WARM, seed=seed), "draft_length": drafts}
        reply = generate(*eager, prompt([CHOICE]), max_tokens=120, **options)
        for call in reply.tool_calls:
            assert call["name"] == "pick"
            jsonschema.validate(call["arguments"], CITY)
        if reply.finish_reason == "stop":
            assert reply.tool_calls and not any("kept" in note for note in reply.notes)


def test_the_same_call_again_ends_the_reply_and_counts_once(eager: Loaded) -> None:
    only = {"name": "f", "description": "", "parameters": {"properties": {"a": {"const": 1}}, "required": ["a"]}}
    pieces = [*stream_generate(*eager, prompt([only]), max_tokens=200, sampling=GREEDY)]
    reply = collect(pieces)
    parts = [part for piece in pieces for part in piece.calls]
    assert {part.index for part in parts} == {0} and "".join(part.arguments for part in parts) == '{"a": 1}'
    assert reply.finish_reason == "stop"
    assert reply.tool_calls == [{"name": "f", "arguments": {"a": 1}}]
    assert reply.notes == ["the reply ended at a call that it had made before"]
    assert len(reply.message["tool_calls"]) == 1


def test_a_call_that_only_begins_as_an_earlier_one_is_streamed_like_any(eager: Loaded) -> None:
    for seed in range(3):
        own = replace(WARM, seed=seed)
        pieces = [*stream_generate(*eager, prompt([CHOICE]), max_tokens=100, sampling=own)]
        told: dict[int, str] = {}
        for part in (part for piece in pieces for part in piece.calls):
            told[part.index] = told.get(part.index, "") + part.arguments
        calls = collect(pieces).tool_calls
        assert len(calls) > 1
        assert [json.loads(told[n]) for n in range(len(calls))] == [own["arguments"] for own in calls]


def test_a_call_in_a_thought_is_one_though_the_reply_is_cut_behind_it(eager: Loaded) -> None:
    reply = generate(*eager, Prompt([*IDS, 100], tools=prompt([CHOICE]).tools), max_tokens=60)
    assert reply.finish_reason == "length" and reply.tool_calls and "call:" not in (reply.thinking or "")
    assert not any("inside the thought" in note for note in reply.notes)


def test_a_text_to_stop_at_ends_no_call(eager: Loaded) -> None:
    """Nor is a reply that is cut inside one taken for finished, whose text has it."""
    for count in range(3, 20):
        reply = generate(*eager, prompt([CHOICE]), max_tokens=count, sampling=GREEDY, stop=["pi", "call"])
        assert reply.finish_reason == "length" and len(reply.token_ids) == count


@pytest.mark.parametrize("drafts", [0, 2])
def test_rows_of_a_batch_are_held_as_they_are_alone(planted: Loaded, drafts: int) -> None:
    asked: list[dict[str, Any]] = [
        {"response_format": CITY}, {}, {"response_format": LIST}, {"response_format": "json"}, {},
        {"response_format": {"type": "regex", "regex": "[a-z]{9}"}},
    ]  # fmt: skip
    options: dict[str, Any] = {"max_tokens": 40, "sampling": GREEDY, "draft_length": drafts}
    prompts = [Prompt([*IDS, 110 + number]) for number in range(len(asked))]
    alone = [generate(*planted, own, **form, **options) for own, form in zip(prompts, asked, strict=True)]
    with Engine(*planted, max_batch=4) as engine:
        streams = [engine.submit(own, **form, **options) for own, form in zip(prompts, asked, strict=True)]
        replies = [collect(stream) for stream in streams]
    assert [own.token_ids for own in replies] == [own.token_ids for own in alone]
    assert [own.finish_reason for own in replies] == [own.finish_reason for own in alone]


LITERAL = {
    "type": "object",
    "properties": {"long_name": CITY},
    "required": ["long_name"],
    "additionalProperties": False,
}


def test_seeded_rows_are_held_as_they_are_alone(planted: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """What must come is taken without a draw in every row, whatever others draft beside it."""
    taken, forced = list[int](), Constraint.forced
    monkeypatch.setattr(
        Constraint, "forced", lambda self, most: taken.append(len(forced(self, most))) or forced(self, most)
    )
    asked: list[dict[str, Any]] = [
        {"response_format": LITERAL}, {"response_format": CITY, "draft_length": 1}, {"draft_length": 4},
        {"response_format": LITERAL, "draft_length": 3}, {"response_format": LIST, "draft_length": 0},
    ]  # fmt: skip
    each = [{"sampling": replace(WARM, seed=number), "max_tokens": 50} | own for number, own in enumerate(asked)]
    alone = [generate(*planted, prompt(), **own) for own in each]
    taken.clear()
    with Engine(*planted, max_batch=5) as engine:
        replies = [collect(stream) for stream in [engine.submit(prompt(), **own) for own in each]]
    assert [own.token_ids for own in replies] == [own.token_ids for own in alone]
    assert sum(taken) > 20


def test_a_dead_end_ends_its_row_alone(planted: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Constraint.step

    def wrong(self: Constraint, token: int) -> None:
        if self.form.answer is not None and self.count == 5:
            raise self.dead_end("no token may follow")
        step(self, token)

    monkeypatch.setattr(Constraint, "step", wrong)
    message = "the reply cannot be held to its response_format after 5 tokens: no token may follow"
    options: dict[str, Any] = {"max_tokens": 30, "sampling": GREEDY}
    with pytest.raises(DeadEndError, match=message):
        generate(*planted, prompt(), response_format=CITY, **options)
    free = generate(*planted, prompt(), **options)
    with Engine(*planted, max_batch=2) as engine:
        held, other = engine.submit(prompt(), response_format=CITY, **options), engine.submit(prompt(), **options)
        with pytest.raises(DeadEndError, match=message):
            collect(held)
        assert collect(other).token_ids == free.token_ids


def test_a_cut_reply_says_length(planted: Loaded) -> None:
    reply = generate(*planted, prompt(), response_format=CITY, max_tokens=3)
    assert reply.finish_reason == "length" and len(reply.token_ids) == 3


def test_a_form_that_needs_all_its_tokens_is_finished_by_the_last(planted: Loaded) -> None:
    options: dict[str, Any] = {"response_format": {"type": "regex", "regex": "[\x01-\x7f]{3}"}, "max_tokens": 3}
    for seed in range(5):
        reply = generate(*planted, prompt(), sampling=replace(WARM, seed=seed), draft_length=2, **options)
        assert (len(reply.text) == 3) == (reply.finish_reason == "stop")


def test_a_session_holds_its_turns(planted: Loaded) -> None:
    session = Session(*planted)
    reply = session.send("hello", response_format={"type": "regex", "regex": "yes|no"}, max_tokens=9)
    assert reply.text in ("yes", "no") and session.messages[-1]["content"] == reply.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"uniqueItems": True}}, "the keyword uniqueItems cannot be held"),
        ({"response_format": 3}, "response_format is 3"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "f"}, "tool_choice is 'f'"),
        ({"tool_choice": None}, "tool_choice is None"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls is 1; expected True or False"),
    ],
    ids=str,
)
def test_a_wrong_form_is_refused_when_it_is_asked(planted: Loaded, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        stream_generate(*planted, prompt(), **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_request_without_a_form_loads_no_llguidance() -> None:
    import subprocess
    import sys

    code = "import sys, mlx_gemma4; from mlx_gemma4 import generate, Engine; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
