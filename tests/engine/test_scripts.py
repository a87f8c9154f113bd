"""What scripts ask for beside a form: where answers and thoughts end, how likely tokens are, replies that go on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rounds import GREEDY

from mlx_gemma4 import Engine, Prompt, Sampling, Session, collect, generate, stream_generate
from mlx_gemma4.decoding.constraint import GRACE, Vocabulary
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Reply

Loaded = tuple[Model, Processor]
LENGTHS = [0, 1, 3, 7, "auto"]
IDS = [2, 9, 14, 120, 130, 140, 9, 14, 150]
CLOSE, LINE_BREAK = 101, 107


@pytest.fixture
def asked(planted: Loaded) -> Callable[..., Reply]:
    def ask(prompt: Any = IDS, **options: Any) -> Reply:
        request = prompt if isinstance(prompt, (str, Prompt)) else Prompt(prompt)
        return generate(*planted, request, **({"sampling": GREEDY, "max_tokens": 60} | options))

    return ask


# --- stop ---


@pytest.mark.parametrize("drafts", LENGTHS)
def test_a_reply_ends_before_a_text_at_every_draft_length(
    planted: Loaded, asked: Callable[..., Reply], drafts: int | str
) -> None:
    whole = asked(max_tokens=40)
    for start, length in ((3, 1), (9, 2), (15, 7), (20, 12)):
        stop = whole.text[start : start + length]
        reply = asked(max_tokens=40, stop=stop, draft_length=drafts)
        assert reply.text == whole.text[: whole.text.find(stop)] and reply.finish_reason == "stop"
        assert reply.message["content"] == reply.text
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        said = planted[1].tokenizer.decode(reply.token_ids, skip_special_tokens=False)
        before = planted[1].tokenizer.decode(reply.token_ids[:-1], skip_special_tokens=False)
        assert stop in said and stop not in before
        assert reply.stats.generation_tokens == len(reply.token_ids)


def test_pieces_hold_nothing_behind_a_stop_text(planted: Loaded, asked: Callable[..., Reply]) -> None:
    whole = asked()
    stop = [whole.text[30:34], "never in it"]
    *pieces, last = stream_generate(*planted, Prompt(IDS), sampling=GREEDY, max_tokens=60, stop=stop, draft_length=3)
    assert "".join(piece.text for piece in (*pieces, last)) == whole.text[: whole.text.find(stop[0])]
    assert last.finish_reason == "stop" and last.message == collect([*pieces, last]).message


def test_a_stop_text_in_a_thought_ends_nothing(asked: Callable[..., Reply]) -> None:
    thought = [*IDS, 100]
    whole = asked(thought)
    assert whole.thinking and not whole.text
    assert asked(thought, stop=whole.thinking[5:8]).token_ids == whole.token_ids


def test_what_was_held_back_is_given_out_at_the_end(asked: Callable[..., Reply]) -> None:
    whole = asked(max_tokens=20)
    reply = asked(max_tokens=20, stop=whole.text[-3:] + "more")
    assert (reply.text, reply.finish_reason) == (whole.text, "length")


# --- thinking_budget ---


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a thought ends with every ninth token or so."""
    monkeypatch.setattr(Vocabulary, "ends_line", lambda self, token: token % 9 == 0 or token == LINE_BREAK)


def closed(tokens: list[int], budget: int) -> list[int]:
    """A thought that would go on with these tokens, with a budget."""
    for count in range(budget, budget + min(budget, GRACE)):
        if count and (tokens[count - 1] % 9 == 0 or tokens[count - 1] == LINE_BREAK):
            return [*tokens[:count], CLOSE]
    count = budget + min(budget, GRACE)
    line_ended = bool(count) and (tokens[count - 1] % 9 == 0 or tokens[count - 1] == LINE_BREAK)
    return [*tokens[:count], *([] if line_ended else [LINE_BREAK]), CLOSE]


@pytest.mark.parametrize("drafts", LENGTHS)
def test_a_thought_ends_with_the_line_in_which_its_budget_does(
    lines: None, asked: Callable[..., Reply], drafts: int | str
) -> None:
    thought = [*IDS, 100]
    whole = asked(thought, max_tokens=200).token_ids
    for budget in (1, 2, 5, 8, 9, 21, 33, 34, 60):
        expected = closed(whole, budget)
        reply = asked(thought, max_tokens=len(expected) + 6, thinking_budget=budget, draft_length=drafts)
        assert reply.token_ids[: len(expected)] == expected
        goes_on = asked([*thought, *expected], max_tokens=6)
        assert reply.token_ids[len(expected) :] == goes_on.token_ids and reply.text == goes_on.text


def test_a_form_holds_behind_a_thought_that_was_ended(asked: Callable[..., Reply]) -> None:
    form = {"type": "regex", "regex": "yes|no"}
    for drafts in (0, 3):
        reply = asked([*IDS, 100], thinking_budget=6, response_format=form, draft_length=drafts)
        assert reply.text in ("yes", "no") and reply.finish_reason == "stop" and reply.thinking


def test_without_a_thought_a_budget_says_nothing(asked: Callable[..., Reply]) -> None:
    assert asked(thinking_budget=3).token_ids == asked().token_ids


def test_a_budget_of_0_is_as_no_thinking(planted: Loaded) -> None:
    options: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 8}
    replies = [
        generate(*planted, "hello", thinking=True, thinking_budget=0, **options),
        generate(*planted, "hello", **options),
    ]
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].stats.prompt_tokens == replies[1].stats.prompt_tokens


def test_rows_end_their_thoughts_as_alone(lines: None, planted: Loaded, asked: Callable[..., Reply]) -> None:
    each: list[dict[str, Any]] = [
        {"thinking_budget": 4}, {}, {"thinking_budget": 17}, {"stop": "th"}, {"thinking_budget": 30, "draft_length": 2},
    ]  # fmt: skip
    prompts = [[*IDS, 110 + number, 100] for number in range(len(each))]
    alone = [asked(prompt, **own) for prompt, own in zip(prompts, each, strict=True)]
    with Engine(*planted, max_batch=4) as engine:
        streams = [
            engine.submit(Prompt(prompt), sampling=GREEDY, max_tokens=60, **own)
            for prompt, own in zip(prompts, each, strict=True)
        ]
        assert [collect(stream).token_ids for stream in streams] == [reply.token_ids for reply in alone]


@pytest.mark.parametrize("budget", [-1, 2.5, True, "4"])
def test_a_wrong_budget_is_refused(planted: Loaded, budget: Any) -> None:
    with pytest.raises(ValueError, match=r"^thinking_budget is .*; expected None, or a whole number, 0 or more$"):
        generate(*planted, "hello", thinking_budget=budget)


@pytest.mark.parametrize("drafts", LENGTHS)
def test_a_thought_that_is_opened_in_mid_draft_is_bounded_too(
    lines: None, asked: Callable[..., Reply], drafts: int | str
) -> None:
    """Thoughts again and again, each after some text: all their tokens count."""
    prompt, opens = [2, 98, *IDS[1:]], {100: 24.0}
    for budget in (3, 12, 30):
        options: dict[str, Any] = {"logit_bias": opens, "max_tokens": 80, "thinking_budget": budget}
        reply = asked(prompt, draft_length=drafts, **options)
        expected = asked(prompt, draft_length=0, **options)
        assert CLOSE in expected.token_ids and reply.token_ids == expected.token_ids
        in_thought, thought = False, 0
        for place, token in enumerate(reply.token_ids):
            if in_thought and thought >= 2 * budget:
                assert token in (CLOSE, LINE_BREAK)
            in_thought = token != CLOSE and (in_thought or token == 100)
            thought += in_thought and reply.token_ids[place] != 100


# --- logprobs, logit_bias, penalties ---


@pytest.mark.parametrize("drafts", LENGTHS)
def test_logprobs_are_the_models_own(planted: Loaded, drafts: int | str) -> None:
    options: dict[str, Any] = {
        "sampling": Sampling(temperature=2.0, top_k=0, top_p=0.9, frequency_penalty=1.0, seed=3), "max_tokens": 30,
        "logit_bias": {150: 5.0}, "draft_length": drafts,
    }  # fmt: skip
    free = generate(*planted, Prompt(IDS), **options)
    assert free.logprobs is None
    for top in (0, 3, 20):
        pieces = list(stream_generate(*planted, Prompt(IDS), logprobs=top, **options))
        assert all(len(piece.logprobs or []) == len(piece.token_ids) for piece in pieces)
        reply = collect(pieces)
        assert reply.token_ids == free.token_ids or drafts == "auto"
        logits = np.array(planted[0].logits(Prompt([*IDS, *reply.token_ids])))[0, len(IDS) - 1 : -1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        assert reply.logprobs is not None
        for entry, token, row in zip(reply.logprobs, reply.token_ids, expected, strict=True):
            assert entry["token_id"] == token
            assert entry["logprob"] == pytest.approx(row[token], abs=1e-4)
            best = np.argsort(-row)[:top]
            assert [*entry["top"].values()] == pytest.approx(row[best].tolist(), abs=1e-4)
            assert entry["top"] == pytest.approx({index: row[index] for index in entry["top"]}, abs=1e-4)


def test_rows_tell_and_are_biased_as_alone(planted: Loaded, asked: Callable[..., Reply]) -> None:
    warm = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=5)
    each: list[dict[str, Any]] = [
        {"logprobs": 2}, {"logit_bias": {150: 8.0, 14: -100}, "sampling": warm}, {},
        {"sampling": replace(warm, frequency_penalty=2.0, presence_penalty=-1.0), "logprobs": 0}, {"sampling": warm},
        {"sampling": replace(warm, repetition_penalty=1.2), "logit_bias": {9: 3}},
    ]  # fmt: skip
    alone = [asked(**({"draft_length": 2} | own)) for own in each]
    with Engine(*planted, max_batch=4) as engine:
        streams = [
            engine.submit(Prompt(IDS), **({"draft_length": 2, "sampling": GREEDY, "max_tokens": 60} | own))
            for own in each
        ]
        replies = [collect(stream) for stream in streams]
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in alone]
    for reply, own in zip(replies, alone, strict=True):
        assert (reply.logprobs is None) == (own.logprobs is None)
        for found, expected in zip(reply.logprobs or [], own.logprobs or [], strict=True):
            assert found["logprob"] == pytest.approx(expected["logprob"], abs=1e-4)


def test_a_bias_bans_and_forces(asked: Callable[..., Reply]) -> None:
    whole = asked(max_tokens=12)
    banned = asked(max_tokens=12, logit_bias=dict.fromkeys(whole.token_ids, -100), draft_length=3)
    assert not set(banned.token_ids) & set(whole.token_ids)
    assert asked(max_tokens=5, logit_bias={150: 100}, repetition_detection="off").token_ids == [150] * 5


def test_a_greedy_reply_counts_what_it_has_said(asked: Callable[..., Reply], planted: Loaded) -> None:
    own = replace(GREEDY, frequency_penalty=2.0, presence_penalty=2.0)
    replies = [asked(sampling=own, draft_length=drafts, logit_bias={150: 30}).token_ids for drafts in LENGTHS]
    assert all(ids == replies[0] for ids in replies)
    counts = np.zeros(512)
    for place, token in enumerate(replies[0][:12]):
        logits = np.array(planted[0].logits(Prompt([*IDS, *replies[0][:place]])))[0, -1]
        logits[150] += 30
        logits[list(planted[0].config.generation.suppress_tokens)] = -np.inf
        assert (logits - 2 * counts - 2 * (counts > 0)).argmax() == token
        counts[token] += 1


def test_no_call_is_begun_where_none_may_be(planted: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"properties": {}}}}
    options: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 20, "logit_bias": {48: 100}}
    called = generate(*planted, Prompt(IDS, tools=(tool,)), **options)
    free = generate(*planted, Prompt(IDS, tools=(tool,)), tool_choice="none", **options)
    assert called.token_ids[0] == 48 and 48 not in free.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 21}, "logprobs is 21; expected None, or a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs is True; expected None, or a whole number from 0 to 20"),
        ({"logit_bias": {512: 1.0}}, "logit_bias has the token id 512; the vocabulary has 512"),
        ({"logit_bias": {"9": 1.0}}, "logit_bias has the key '9'; expected a token id"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has the key -1; expected a token id"),
        ({"logit_bias": {9: float("nan")}}, r"logit_bias\[9\] is nan; expected a number from -100 to 100"),
        ({"logit_bias": {9: 101}}, r"logit_bias\[9\] is 101; expected a number from -100 to 100"),
        ({"logit_bias": [1]}, "logit_bias is a list; expected a dict of token ids and numbers"),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_refused(planted: Loaded, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(*planted, Prompt(IDS), **options)
    with Engine(*planted) as engine, pytest.raises(ValueError, match=f"^{message}$"):
        engine.submit(Prompt(IDS), **options)


# --- continue_final_message ---

USER = {"role": "user", "content": "hello <turn|>"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "x"}


@pytest.mark.parametrize("text", ["The quick", " two words ", "a <turn|> and <|channel>", "line\n"])
@pytest.mark.parametrize("thinking", [False, True])
def test_the_last_message_goes_on_as_the_model_wrote_it(planted: Loaded, text: str, thinking: bool) -> None:
    processor = planted[1]
    begun = processor.control.encode(text)
    last = {"role": "assistant", "content": text}
    found = processor([USER, last], thinking=thinking, continue_final_message=True)
    assert found.token_ids == [*processor([USER], thinking=thinking).token_ids, *begun]
    parts = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    assert processor([USER, parts], thinking=thinking, continue_final_message=True) == found


def test_a_thought_before_it_is_whole(planted: Loaded) -> None:
    processor = planted[1]
    last = {"role": "assistant", "content": "yes", "reasoning": "hmm"}
    for thinking in (False, True):
        for before in ([USER], [USER, CALL, RESULT]):
            ids = processor([*before, last], thinking=thinking, continue_final_message=True).token_ids
            written = processor.tokenizer.decode(ids, skip_special_tokens=False)
            assert written.endswith("<|channel>thought\nhmm\n<channel|>yes") and written.count("<|channel>") == 1
            ids = processor(
                [*before, last | {"reasoning": ""}], thinking=thinking, continue_final_message=True
            ).token_ids
            assert processor.tokenizer.decode(ids, skip_special_tokens=False).count("<|channel>") == (
                before == [USER] and not thinking
            )


def test_a_reply_that_goes_on_is_the_new_part(planted: Loaded) -> None:
    options: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 12}
    begun = {"role": "assistant", "content": "The quick"}
    ids = planted[1]([USER, begun], continue_final_message=True).token_ids
    reply = generate(*planted, [USER, begun], continue_final_message=True, **options)
    assert reply.token_ids == generate(*planted, Prompt(ids), **options).token_ids
    assert reply.message["content"] == reply.text and not reply.text.startswith("The quick")


def test_a_form_holds_the_whole_of_a_message_that_goes_on(planted: Loaded) -> None:
    form = {"type": "regex", "regex": "(yes|no), [ab]{3}"}
    begun = {"role": "assistant", "content": "no, "}
    reply = generate(*planted, [USER, begun], continue_final_message=True, response_format=form, max_tokens=9)
    assert len(reply.text) == 3 and set(reply.text) <= {"a", "b"} and reply.finish_reason == "stop"
    for text in ("maybe", "no, aba, and more"):
        with pytest.raises(ValueError, match=r"^the last message does not begin as its response_format wants"):
            other = begun | {"content": text}
            generate(*planted, [USER, other], continue_final_message=True, response_format=form)


def test_a_session_goes_on_in_its_last_message(planted: Loaded) -> None:
    session = Session(*planted)
    first = session.send("hello", max_tokens=5, sampling=GREEDY)
    more = session.send(continue_final_message=True, max_tokens=5, sampling=GREEDY)
    assert session.messages[-1]["content"] == first.text + more.text and len(session.messages) == 2


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (USER, r"^messages\[1\] has the role user; continue_final_message expects an assistant message of text last$"),
        (CALL, r"^messages\[1\] has tool_calls; continue_final_message expects .* last$"),
        (
            {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
            r"^messages\[1\] has image; continue_final_message expects .* last$",
        ),
    ],
)
def test_what_cannot_go_on_is_refused(planted: Loaded, last: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*planted, [USER, last], continue_final_message=True)


def test_only_messages_can_go_on(planted: Loaded) -> None:
    with pytest.raises(ValueError, match="continue_final_message"):
        generate(*planted, Prompt(IDS), continue_final_message=True)
    with pytest.raises(ValueError, match=r"^messages\[0\] has the role user; continue_final_message expects"):
        generate(*planted, "hello", continue_final_message=True)
