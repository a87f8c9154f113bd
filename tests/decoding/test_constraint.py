"""A constraint follows a reply: which tokens may come, where it binds, and where it ends."""

from typing import Any

import numpy as np
import pytest
from mcp_tools import TOOLS, tool
from walks import STOPS, Walker

from mlx_gemma4 import Prompt
from mlx_gemma4.decoding.constraint import Constraint, DeadEndError, vocabulary_of
from mlx_gemma4.forms.form import Form, form_of
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.messages import check_tools
from mlx_gemma4.prompt.processor import Processor

Loaded = tuple[Model, Processor]
OPEN, CLOSE, CALL, CALL_END, RESPONSE, TURN_END, EOS = 100, 101, 48, 49, 50, 106, 1
THINKING = [2, 105, 98, 107, 106, 105]  # <|think|> stands in the system turn
WEATHER = tool("weather", {"city": {"enum": ["a", "b"]}}, ["city"])


@pytest.fixture(scope="module")
def walker(tiny: Loaded) -> Walker:
    return Walker(tiny[1])


def start(walker: Walker, *, ids: list[int] | None = None, tools: Any = (), **options: Any) -> Constraint:
    prompt = Prompt(ids or [2], tools=tuple(check_tools(list(tools))))
    return walker.constraint(walker.form(prompt, **options), prompt)


def may(walker: Walker, constraint: Constraint, *tokens: int) -> list[bool]:
    return walker.bits(constraint.mask())[list(tokens)].tolist()


def test_a_form_binds_from_the_first_token(walker: Walker) -> None:
    own = start(walker, response_format={"type": "regex", "regex": "ab?"})
    assert own.binds
    assert walker.allowed(own) == walker.ids("a")  # and not the byte of the same letter
    own.advance(walker.ids("a"))
    assert may(walker, own, EOS, TURN_END, RESPONSE, *walker.ids("b")) == [True, True, False, True]
    own.advance(walker.ids("b"))
    assert own.is_finished


def test_a_thought_comes_before_the_form(walker: Walker) -> None:
    own = start(walker, ids=THINKING, response_format={"type": "regex", "regex": "ab"})
    assert may(walker, own, OPEN, TURN_END, CALL, *walker.ids("a"), *walker.ids("z")) == [
        True,
        False,
        False,
        True,
        False,
    ]
    own.advance([OPEN, *walker.ids("thought\nzz")])
    assert may(walker, own, OPEN, TURN_END, EOS, CALL, CLOSE, *walker.ids("z")) == [False] * 4 + [True] * 2
    own.advance([CLOSE])
    assert may(walker, own, OPEN, TURN_END, CLOSE, *walker.ids("a"), *walker.ids("z")) == [False] * 3 + [True, False]
    assert own.advance([*walker.ids("ab"), TURN_END, 7]) == 2


def test_without_thinking_none_is_opened(walker: Walker) -> None:
    own = start(walker, response_format="json")
    assert may(walker, own, OPEN) == [False]


def test_a_thought_that_the_prompt_opened_goes_on(walker: Walker) -> None:
    own = start(walker, ids=[*THINKING, OPEN], response_format={"type": "regex", "regex": "ab"})
    assert may(walker, own, CLOSE, *walker.ids("z")) == [True, True]
    own.advance([*walker.ids("z"), CLOSE])
    assert may(walker, own, *walker.ids("z")) == [False]


def test_tools_bind_only_where_a_call_has_begun(walker: Walker) -> None:
    own = start(walker, tools=[WEATHER])
    own.advance([*walker.ids("some text"), OPEN, *walker.ids("thought"), CLOSE])
    assert not own.binds and walker.bits(own.mask()).all() and own.pauses == (CALL, -1)
    own.advance([CALL])
    assert own.binds
    assert not walker.bits(own.mask())[walker.ids("z")].any()
    own.advance([*walker.ids('call:weather{city:<|"|>a<|"|>}'), CALL_END])
    assert not own.binds and not own.is_finished


def test_one_call_is_the_last_if_only_one_may_be(walker: Walker) -> None:
    own = start(walker, tools=[WEATHER], parallel=False)
    own.advance([CALL, *walker.ids('call:weather{city:<|"|>a<|"|>}'), CALL_END])
    assert own.is_finished and not own.repeated
    assert own.advance([CALL]) == 0


def test_the_same_call_again_ends_the_reply(walker: Walker) -> None:
    own, call = start(walker, tools=[WEATHER]), [CALL, *walker.ids('call:weather{city:<|"|>a<|"|>}'), CALL_END]
    own.advance(call)
    other = [CALL, *walker.ids('call:weather{city:<|"|>b<|"|>}'), CALL_END]
    own.advance(other)
    assert not own.is_finished
    assert own.advance([*call, EOS]) == len(call)
    assert own.is_finished and own.repeated


def test_a_required_call_is_all_there_may_be(walker: Walker) -> None:
    own = start(walker, ids=THINKING, tools=[WEATHER], tool_choice="required")
    assert walker.allowed(own) == [CALL, OPEN]
    own.advance([CALL, *walker.ids('call:weather{city:<|"|>a<|"|>}'), CALL_END])
    assert walker.allowed(own) == [EOS, CALL, RESPONSE, TURN_END]


def test_where_no_call_may_be_begun_nothing_is_followed(walker: Walker) -> None:
    """A bias bars it."""
    prompt = Prompt(THINKING, tools=tuple(check_tools([WEATHER])))
    assert form_of(prompt, walker.controls, None, "none", True) is None


def test_with_tools_and_a_form_it_is_a_call_or_the_form(walker: Walker) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "response_format": {"type": "regex", "regex": "ab"}}
    own = start(walker, **options)
    assert may(walker, own, CALL, *walker.ids("a"), *walker.ids("z"), OPEN) == [True, True, False, False]
    own.advance(walker.ids("a"))
    assert may(walker, own, CALL, *walker.ids("b")) == [False, True]
    own = start(walker, **options)
    own.advance([CALL, *walker.ids('call:weather{city:<|"|>a<|"|>}'), CALL_END])
    assert walker.allowed(own) == [EOS, CALL, RESPONSE, TURN_END]
    own = start(walker, tool_choice="none", **options)
    assert may(walker, own, CALL, *walker.ids("a")) == [False, True]


@pytest.mark.parametrize("options", [{}, {"response_format": "json"}, {"tool_choice": "required"}], ids=str)
def test_a_call_opened_in_a_thought_ends_it(walker: Walker, options: dict[str, Any]) -> None:
    own = start(walker, ids=THINKING, tools=[WEATHER], **options)
    call = [CALL, *walker.ids('call:weather{city:<|"|>a<|"|>}'), CALL_END]
    own.advance([OPEN, *walker.ids("thought\nz"), *call])
    assert own.binds and walker.allowed(own) == [EOS, CALL, RESPONSE, TURN_END]
    parser = walker.read([OPEN, *walker.ids("thought\nz"), *call], Prompt(THINKING))
    assert len(parser.tool_calls) == 1


def test_masks_for_drafts_are_those_of_each_place(walker: Walker) -> None:
    prompt = Prompt(THINKING, tools=tuple(check_tools(TOOLS)))
    form = walker.form(prompt, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    for _ in range(20):
        _, tokens = walker.walk(form, prompt, 60)
        own, place = walker.constraint(form, prompt), 0
        while place < len(tokens):
            drafts = tokens[place : place + 5]
            masks = own.masks_for(drafts)
            assert masks.shape == (len(drafts) + 1, 16) and masks.dtype == np.uint32
            for row, draft in enumerate(drafts):
                assert (masks[row] == own.mask()).all()
                own.advance([draft])
            if not own.is_finished:
                assert (masks[-1] == own.mask()).all()
            place += len(drafts)


def test_behind_a_draft_that_may_not_be_all_is_open(walker: Walker) -> None:
    own = start(walker, response_format={"type": "regex", "regex": "abc"})
    [a], [z] = walker.ids("a"), walker.ids("z")
    masks = own.masks_for([a, z, a])
    assert not walker.bits(masks[1])[z] and walker.bits(masks[2]).all() and walker.bits(masks[3]).all()
    own.advance([a])  # nothing of it has moved the constraint itself
    assert walker.bits(own.mask())[walker.ids("b")].all()


def test_what_must_come_is_known_without_a_draw(walker: Walker) -> None:
    own = start(walker, tools=[WEATHER], tool_choice="weather")
    assert own.forced(7) == [CALL, *walker.ids("call:weather{city:")][:7]
    own.advance([CALL, *walker.ids("call:weather{city:")])
    assert own.forced(7) == [52]
    own.advance([52, *walker.ids("a")])
    assert own.forced(7) == [52, *walker.ids("}"), CALL_END]
    assert start(walker, tools=[WEATHER]).forced(7) == []
    assert start(walker, response_format="json", ids=THINKING).forced(7) == []


def test_a_dead_end_says_so(walker: Walker) -> None:
    """Pieces of no byte: nothing spells é here."""
    own = start(walker, response_format={"type": "regex", "regex": "aé"})
    own.advance(walker.ids("a"))
    own.vocabulary = vocabulary_of(walker.processor)
    with pytest.raises(DeadEndError, match="the reply cannot be held to its response_format after 1 tokens"):
        own.advance(walker.ids("z"))


def test_text_that_is_no_utf8_is_not_begun(walker: Walker) -> None:
    """A byte token may only stand where its character can be finished."""
    prompt = Prompt([2])
    form = walker.form(prompt, {"type": "string", "minLength": 1, "maxLength": 3})
    for _ in range(30):
        constraint, tokens = walker.walk(form, prompt)
        if constraint.is_finished:
            assert "\ufffd" not in str(walker.read(tokens, prompt).message["content"]).replace("\\ufffd", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "other"}, "tool_choice is 'other'; expected auto | none | required | weather"),
        ({"tool_choice": ""}, "tool_choice is ''; expected"),
        ({"tool_choice": "required", "tools": ()}, "tool_choice is 'required' and there are no tools"),
        ({"response_format": "xml"}, "response_format is 'xml'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_one_line(walker: Walker, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        start(walker, **({"tools": [WEATHER]} | options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_asked_is_nothing_held(walker: Walker) -> None:
    assert form_of(Prompt([2]), walker.controls, None, "auto", True) is None
    assert form_of(Prompt([2]), walker.controls, {"type": "text"}, "none", False) is None


def test_the_vocabulary_is_read_once(walker: Walker) -> None:
    assert vocabulary_of(walker.processor) is vocabulary_of(walker.processor)
    assert vocabulary_of(walker.processor).tokenizer().vocab_size == walker.processor.config.text.vocab_size


def test_a_form_without_an_end_token_ends_by_itself(tiny: Loaded, walker: Walker) -> None:
    form = Form(walker.form(Prompt([2]), {"type": "regex", "regex": "ab"}).answer, None, False, True)
    own = Constraint(form, vocabulary_of(tiny[1]), walker.controls, (), Prompt([2]))
    own.advance(walker.ids("ab"))
    assert own.is_finished
    assert STOPS == (1, 106, 50)
