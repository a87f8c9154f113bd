"""OpenAI's own client at its everyday work in chat, completions, transcriptions and models, nothing patched."""

import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra clients")

from pydantic import BaseModel  # noqa: E402
from serving import Running, served  # noqa: E402

from mlx_gemma4 import Prompt, Sampling, generate, load  # noqa: E402
from mlx_gemma4.serve.resident import Settings  # noqa: E402
from mlx_gemma4.weights.load import DEMO  # noqa: E402

SAMPLES = DEMO / "samples"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def data_url(kind: str, name: str) -> str:
    return f"data:{kind};base64,{base64.b64encode((SAMPLES / name).read_bytes()).decode()}"


SUM = user("What is 3 + 4?")
IMAGE = {"type": "image_url", "image_url": {"url": data_url("image/png", "shapes.png")}}
BEEPS = base64.b64encode((SAMPLES / "beeps.wav").read_bytes()).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Settings(model="demo", max_batch=4)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as own:
        yield own


def ask(client: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=messages, temperature=0, **more)


def test_a_reply_has_its_usage(client: Any) -> None:
    reply = ask(client, SUM)
    assert reply.choices[0].message.content == "3 + 4 = 7."
    assert reply.choices[0].finish_reason == "stop" and reply.model == "demo"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    again = ask(client, SUM).usage
    assert again.prompt_tokens_details.cached_tokens > again.prompt_tokens // 2


def test_a_stream_adds_up_to_the_reply_and_only_its_last_chunk_says_why_it_ends(client: Any) -> None:
    chunks = list(ask(client, SUM, stream=True, stream_options={"include_usage": True}))
    *spoken, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == "3 + 4 = 7."
    assert [chunk.choices[0].finish_reason for chunk in spoken] == [None] * (len(spoken) - 1) + ["stop"]
    assert not last.choices and last.usage.completion_tokens == ask(client, SUM).usage.completion_tokens
    assert all(chunk.usage is None for chunk in ask(client, SUM, stream=True))


def test_thoughts_come_in_both_fields_and_are_taken_back(client: Any) -> None:
    reply = ask(client, SUM, reasoning_effort="high")
    message = reply.choices[0].message
    assert message.content == "3 + 4 = 7." and message.reasoning_content == message.reasoning
    assert 0 < reply.usage.completion_tokens_details.reasoning_tokens < reply.usage.completion_tokens
    thoughts = [chunk.choices[0].delta for chunk in ask(client, SUM, reasoning_effort="high", stream=True)]
    streamed = "".join(getattr(delta, "reasoning_content", None) or "" for delta in thoughts)
    assert streamed.strip("\n") == message.reasoning
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a", "content": "done"}
    untold, *told = (
        ask(client, [*SUM, said | thought, result], tools=[WEATHER], max_tokens=1).usage.prompt_tokens
        for thought in ({}, {"reasoning_content": "I look it up."}, {"reasoning": "I look it up."})
    )
    assert untold < told[0] == told[1]


@pytest.mark.parametrize(
    "off", [{"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_thinking_is_turned_off_and_on_in_every_spelling(client: Any, off: dict[str, Any]) -> None:
    assert not ask(client, SUM, extra_body=off).usage.completion_tokens_details.reasoning_tokens
    on: list[dict[str, Any]] = [{"thinking": {"type": "adaptive"}}, {"chat_template_kwargs": {"enable_thinking": True}}]
    for body in on:
        assert ask(client, SUM, extra_body=body).usage.completion_tokens_details.reasoning_tokens


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_is_called_and_its_result_read(client: Any, streams: bool) -> None:
    messages = user("What is the weather in Paris?")
    if streams:
        with client.chat.completions.stream(model="demo", messages=messages, temperature=0, tools=[WEATHER]) as stream:
            reply = stream.get_final_completion()
    else:
        reply = ask(client, messages, tools=[WEATHER])
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "weather": "sunny"}'}
    said = reply.choices[0].message.model_dump(exclude_none=True)
    assert ask(client, [*messages, said, result], tools=[WEATHER]).choices[0].message.content.startswith("It is sunny")
    assert call.id != ask(client, messages, tools=[WEATHER]).choices[0].message.tool_calls[0].id


def test_the_arguments_of_a_call_that_is_cut_are_never_whole(client: Any) -> None:
    messages = user("What is the weather in Paris?")
    for limit in (2, 6, 11):
        reply = ask(client, messages, tools=[WEATHER], max_tokens=limit).choices[0]
        assert reply.finish_reason == "length" and not reply.message.tool_calls
        assert "call" not in (reply.message.content or "")
        chunks = list(ask(client, messages, tools=[WEATHER], max_tokens=limit, stream=True))
        parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert "}" not in "".join(part.function.arguments for part in parts)
        assert chunks[-1].choices[0].finish_reason == "length"


def test_tool_choice_binds(client: Any) -> None:
    chosen = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", chosen):
        assert ask(client, SUM, tools=[WEATHER], tool_choice=choice, max_tokens=60).choices[0].message.tool_calls
    none = ask(client, user("What is the weather in Paris?"), tools=[WEATHER], tool_choice="none", max_tokens=60)
    assert not none.choices[0].message.tool_calls


def test_allowed_tools_leave_the_others_out(client: Any) -> None:
    other = {"type": "function", "function": {"name": "roll_dice", "parameters": {"type": "object", "properties": {}}}}

    def allowed(mode: str) -> dict[str, Any]:
        named = {"type": "function", "function": {"name": "get_weather"}}
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}

    more: dict[str, Any] = {"max_tokens": 60, "tools": [other, WEATHER]}
    reply = ask(client, SUM, tool_choice=allowed("required"), **more)
    assert {call.function.name for call in reply.choices[0].message.tool_calls} == {"get_weather"}
    free = ask(client, SUM, tool_choice=allowed("auto"), **more)
    assert free.usage.prompt_tokens == ask(client, SUM, tools=[WEATHER]).usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, SUM, tool_choice=allowed("often"), **more)
    assert found.value.param == "tool_choice.allowed_tools.mode"


def test_an_answer_is_parsed_into_a_model(client: Any) -> None:
    class Answer(BaseModel):
        kind: Literal["sum", "product"]
        value: int

    parsed = client.chat.completions.parse(
        model="demo", messages=SUM, temperature=0, response_format=Answer, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_pictures_sounds_films_and_papers_are_seen(client: Any) -> None:
    assert "4" in ask(client, user("How many shapes are there?", IMAGE)).choices[0].message.content
    sound = {"type": "input_audio", "input_audio": {"data": BEEPS, "format": "wav"}}
    assert "beep" in ask(client, user("How many beeps do you hear?", sound)).choices[0].message.content
    pytest.importorskip("av", reason="films need the extra video")
    film = {"type": "video_url", "video_url": {"url": data_url("video/mp4", "film.mp4")}}
    assert ask(client, user("Which way does it move?", film)).choices[0].message.content


def test_a_picture_in_a_tools_result_is_seen(client: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages = [*SUM, {"role": "assistant", "tool_calls": [call]}]
    without = ask(client, [*messages, {"role": "tool", "tool_call_id": "a", "content": "done"}], tools=[WEATHER])
    result = {"role": "tool", "tool_call_id": "a", "content": [IMAGE]}
    seen = ask(client, [*messages, result], tools=[WEATHER])
    assert seen.usage.prompt_tokens > without.usage.prompt_tokens + 50


def test_the_same_seed_gives_the_same_replies_and_n_of_them_differ(client: Any) -> None:
    story = user("Tell me a story.")
    first, second = (
        client.chat.completions.create(model="demo", messages=story, seed=-5, n=3, max_tokens=30, temperature=1.5)
        for _ in range(2)
    )
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) > 1
    assert first.usage.completion_tokens > 60


def test_a_reply_ends_before_a_stop_text(client: Any) -> None:
    for stop in (" = ", ["7", "="]):
        reply = ask(client, SUM, stop=stop).choices[0]
        assert reply.message.content.strip() == "3 + 4" and reply.finish_reason == "stop"


@pytest.mark.parametrize("streams", [False, True])
def test_each_token_tells_how_likely_it_was(client: Any, streams: bool) -> None:
    more = {"logprobs": True, "top_logprobs": 2}
    if streams:
        told = [chunk.choices[0].logprobs for chunk in ask(client, SUM, stream=True, **more)]
        content = [entry for own in told if own is not None for entry in own.content]
    else:
        content = ask(client, SUM, **more).choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "3 + 4 = 7."
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)


def test_the_bytes_of_tokens_add_up_to_their_text(client: Any, server: Running) -> None:
    tokenizer = server.resident.processor.tokenizer
    for character in ("é", "🙂"):
        ids = tokenizer.encode(character, add_special_tokens=False).ids
        assert len(ids) > 1
        said = b""
        for token in ids:  # each is made the next by its bias
            reply = ask(client, SUM, logit_bias={str(token): 100}, logprobs=True, max_tokens=1)
            said += bytes(reply.choices[0].logprobs.content[0].bytes)
        assert said.decode() == character


def test_a_biased_token_is_left_out(client: Any, server: Running) -> None:
    (seven,) = server.resident.processor.tokenizer.encode("7", add_special_tokens=False).ids
    assert "7" not in ask(client, SUM, logit_bias={str(seven): -100}).choices[0].message.content


def test_text_is_gone_on_with_as_it_stands(client: Any) -> None:
    reply = client.completions.create(model="demo", prompt=["The ball is", "The fox"], max_tokens=4, temperature=0)
    assert [choice.index for choice in reply.choices] == [0, 1] and reply.usage.completion_tokens == 8
    chunks = list(
        client.completions.create(model="demo", prompt="The ball is", max_tokens=4, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


@pytest.mark.parametrize("limit", [0, 2])
def test_a_prompts_own_tokens_are_scored(client: Any, server: Running, limit: int) -> None:
    reply = client.completions.create(
        model="demo", prompt="The ball is red", max_tokens=limit, logprobs=2, echo=True, temperature=0
    )
    choice = reply.choices[0]
    scores = choice.logprobs
    assert choice.text.startswith("The ball is red") and "".join(scores.tokens) == choice.text
    assert all(value < 0 for value in scores.token_logprobs) and len(scores.tokens) == len(scores.text_offset)
    assert all(map(lambda top, own: max(top.values()) >= own, scores.top_logprobs, scores.token_logprobs))
    assert (choice.text == "The ball is red") == (limit == 0)
    assert (reply.usage.completion_tokens, choice.finish_reason) == (limit, "length")


def test_a_text_that_ends_is_scored_to_its_end(client: Any) -> None:
    """As programs do that score texts: they ask for one token more, and leave the last score out."""
    model, processor = load("demo")
    asked = processor([{"role": "user", "content": "What is 27 + 45?"}]).token_ids
    said = generate(model, processor, Prompt(asked), sampling=Sampling(temperature=0)).token_ids
    for ids in ([*asked, *said[:-1]], [*asked, *said]):
        (choice,) = client.completions.create(
            model="demo", prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0
        ).choices
        scores = choice.logprobs.token_logprobs
        assert len(scores) == len(ids) + 1 == len(choice.logprobs.tokens)
        law = np.array(model.logits(Prompt(ids)))[0]
        law -= np.log(np.exp(law).sum(axis=-1, keepdims=True))
        expected = [law[place, token] for place, token in enumerate(ids[1:])]
        assert scores[1:-1] == pytest.approx(expected, abs=1e-3) and scores[-1] == pytest.approx(
            law[-1].max(), abs=1e-3
        )
    assert choice.finish_reason == "stop"


def test_a_recording_is_transcribed_in_every_form(client: Any) -> None:
    sound = SAMPLES / "digit.mp3"
    asked = {"model": "demo", "prompt": "Which digit is spoken?", "temperature": 0}
    with sound.open("rb") as file:
        assert "6" in client.audio.transcriptions.create(file=file, **asked).text
    with sound.open("rb") as file:
        assert "6" in client.audio.transcriptions.create(file=file, response_format="text", **asked)
    with sound.open("rb") as file:
        told = client.audio.transcriptions.create(file=file, response_format="verbose_json", **asked)
    assert told.duration == pytest.approx(0.66, abs=0.01) and told.segments[0].end == pytest.approx(told.duration)


def test_models_say_how_long_their_context_is(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo" and model.context_length == 8192 == client.models.retrieve("demo").max_model_len
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"top_p": 7}, "top_p"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": user("x", {"type": "image_url", "image_url": {"url": 5}})}, None),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"reasoning_effort": "heroic"}, "reasoning_effort"),
        ({"stream": "yes"}, "stream"),
        ({"stop": 5}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"functions": [WEATHER["function"]], "function_call": "auto"}, "functions"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "modalities"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(client: Any, more: dict[str, Any], field: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.post("/chat/completions", body={"model": "demo", "messages": SUM} | more, cast_to=object)
    assert found.value.status_code == 400 and found.value.type == "invalid_request_error"
    assert field is None or found.value.param == field


def test_what_is_unknown_and_harmless_is_ignored(client: Any) -> None:
    odd = {
        "functions": [],
        "modalities": ["text"],
        "store": True,
        "metadata": {"a": "b"},
        "verbosity": "low",
        "service_tier": "auto",
        "unknown": [1],
    }
    part = {"type": "hologram", "hologram": "what is 3 + 4?"}
    tool = {"type": "web_search"}
    assert ask(client, [*user("Hello", part)], extra_body=odd, max_tokens=5, tools=[tool]).choices[0].message.content


def test_too_long_a_prompt_says_how_long_it_is(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"prompt is too long: \d+ tokens > 8191 maximum") as found:
            ask(client, user("word " * 9000), stream=stream)
        assert found.value.code == "context_length_exceeded"
