"""Values at the border of what there is: each gives one line that names the argument, and no process dies of it."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_gemma4 import Agent, Engine, Prompt, Sampling, Session, generate, load, stream_generate
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import SoftTokens
from mlx_gemma4.weights.load import DEMO

Loaded = tuple[Model, Processor]
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load(DEMO)


def refused(call: Callable[[], object], name: str) -> None:
    """Refused in one line that says whose fault it is."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert name in message
    assert len(message.splitlines()) == 1
    assert len(message) < 400


def prompt_with(processor: Processor, kind: str) -> Prompt:
    source: Any = Image.new("RGB", (96, 96), "red") if kind == "image" else (np.zeros(9000, np.float32), 16000)
    return processor([{"role": "user", "content": [{"type": kind, kind: source}, {"type": "text", "text": "x"}]}])


def changed(prompt: Prompt, **fields: Any) -> Prompt:
    (run,) = prompt.media
    given = {"kind": run.kind, "start": run.start, "values": run.values, "positions": run.positions} | fields
    return Prompt(prompt.token_ids, (SoftTokens(**given),))


ODD: list[Any] = [10**400, -(10**5000), float("nan"), float("inf"), "3", [1], {"a": 1}, np.zeros((2, 2)), True, b"x"]


@pytest.mark.parametrize("given", [{"model": 3}, {"processor": None}, {"store": "folder"}], ids=str)
def test_what_load_did_not_return_is_told_at_once(demo: Loaded, given: dict[str, Any]) -> None:
    own = {"model": demo[0], "processor": demo[1]} | given
    (name,) = given
    for call in (Session, Agent, Engine, partial(stream_generate, request="hi")):
        refused(lambda call=call: call(**own), f"{name} is")  # type: ignore[misc]


@pytest.mark.parametrize("field", ["max_steps", "start_timeout", "call_timeout"])
def test_an_agent_takes_no_odd_number(demo: Loaded, field: str) -> None:
    for value in (*ODD[1:], -1, 0):  # steps may be as many as one likes
        refused(lambda value=value: Agent(*demo, **{field: value}), field)  # type: ignore[misc]


def test_a_session_takes_no_odd_text_or_folder(demo: Loaded) -> None:
    session = Session(*demo)
    for value in (3, b"x", ["hi"]):
        refused(lambda value=value: session.send(value), "the prompt is")  # type: ignore[misc]
        refused(lambda value=value: session.save(value), "folder is")  # type: ignore[misc]
        refused(lambda value=value: Session.load(value, *demo), "folder is")  # type: ignore[misc]
    refused(lambda: Agent(*demo, skills=3), "skills is")  # type: ignore[arg-type]
    assert session.messages == []


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"])
def test_a_sampling_takes_no_odd_value(field: str) -> None:
    for value in (*ODD, -1):
        refused(lambda value=value: Sampling(**{field: value}), field)  # type: ignore[misc]


def test_a_samplings_numbers_become_pythons() -> None:
    sampling = Sampling(temperature=Fraction(1, 2), top_k=np.int64(3), seed=np.uint64(2**63))  # type: ignore[arg-type]
    assert [type(value) for value in (sampling.temperature, sampling.top_k, sampling.seed)] == [float, int, int]


def test_bounds_of_a_sampling_are_those_of_float32() -> None:
    for field, value in (("top_p", 1e-320), ("temperature", 1e39), ("repetition_penalty", 1e-38), ("top_k", 2**63)):
        refused(lambda field=field, value=value: Sampling(**{field: value}), field)  # type: ignore[misc, arg-type]


@pytest.mark.parametrize("name", ["max_tokens", "draft_length", "sampling", "thinking", "image_budget", "request"])
def test_an_odd_argument_is_refused_by_its_name(demo: Loaded, name: str) -> None:
    for value in [value for value in ODD if not (name == "thinking" and value is True)]:
        if name == "request" and isinstance(value, (str, list)):
            continue  # that it may be
        arguments = {"request": "hi"} | {name: value}
        refused(lambda arguments=arguments: generate(*demo, **arguments), name)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["thinking", "preserve_thinking", "continue_final_message", "parallel_tool_calls"])
@pytest.mark.parametrize("value", ["False", "", 0, 1, None, [], np.array([1, 2]), np.True_, mx.array(1)], ids=repr)
def test_a_flag_is_true_or_false(demo: Loaded, name: str, value: Any) -> None:
    refused(lambda: generate(*demo, "hi", **{name: value}), f"{name} is")  # type: ignore[arg-type]
    refused(lambda: generate(*demo, Prompt([2, 3]), **{name: value}), name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["kv_bits", "split", "group", "dtype", "adapter", "drafter"])
@pytest.mark.parametrize("value", [3, 1.5, [8], np.array([1, 2]), mx.array(3), True], ids=type)
def test_load_names_an_odd_argument(name: str, value: Any) -> None:
    refused(lambda: load(DEMO, **{name: value}), f"{name} is")


def test_an_array_is_no_form(demo: Loaded) -> None:
    refused(lambda: generate(*demo, "hi", response_format=np.array([1, 2])), "response_format is")


@pytest.mark.parametrize("name", ["images", "audios", "videos", "system", "tools"])
def test_media_system_and_tools_have_their_types(demo: Loaded, name: str) -> None:
    given = [5, {"a": 1}, b"x", np.zeros((2, 2))] + ([[1]] if name == "system" else ["photo.jpg"])
    for value in given:
        refused(lambda value=value: generate(*demo, "hi", **{name: value}), name)  # type: ignore[misc]
        if name != "tools":
            refused(lambda value=value: generate(*demo, [USER], **{name: value}), name)  # type: ignore[misc]


@pytest.mark.parametrize("value", [0, -1, 1e-320, 10**400, float("inf"), "2", True, np.zeros((2, 2))], ids=type)
def test_a_frame_rate_is_refused_where_it_stands(demo: Loaded, value: Any) -> None:
    part = {"type": "video", "video": [Image.new("RGB", (48, 48))] * 2, "fps": value}
    refused(lambda: demo[1]([{"role": "user", "content": [part]}]), "messages[0].content[0].fps")


def test_a_sampling_rate_of_any_size_is_refused(demo: Loaded) -> None:
    for rate in (10**400, 1e-320, -1):
        refused(lambda rate=rate: generate(*demo, "hi", audios=[(np.zeros(100), rate)]), "sampling rate")  # type: ignore[misc]


def test_load_takes_a_path_or_an_id() -> None:
    for value in (None, 5, b"demo", ["demo"]):
        refused(lambda value=value: load(value), "path_or_hub_id")  # type: ignore[misc]
        if value is not None:
            refused(lambda value=value: load(DEMO, drafter=value), "drafter")  # type: ignore[misc]
    refused(lambda: load("x" * 5000), "expected a model folder or a hub id")


def test_what_load_returns_may_not_change_places(demo: Loaded) -> None:
    model, processor = demo
    refused(lambda: generate(processor, model, "hi"), "model")  # type: ignore[arg-type]
    refused(lambda: generate(model, model, "hi"), "processor")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ids", [None, 5, np.array(5), {1}, {1: 2}, "12", bytearray(b"1"), [1.0], [True], ["1"], [-1], np.zeros((2, 2), int)]
)
def test_token_ids_are_integers_in_an_order(ids: Any) -> None:
    refused(lambda: Prompt(ids), "token_ids")


def test_token_ids_that_never_end_are_refused() -> None:
    refused(lambda: Prompt(itertools.count()), "token_ids")  # type: ignore[arg-type]


def test_a_prompt_beyond_the_model_is_refused(demo: Loaded) -> None:
    model, _ = demo
    for call in (model.logits, lambda prompt: model.draft(prompt, 1)):
        for token in (2**63, 10**400, model.config.text.vocab_size):
            refused(lambda call=call, token=token: call(Prompt([2, token])), "vocabulary")  # type: ignore[misc]
        long = Prompt([2] * (model.config.text.max_position_embeddings + 1))
        refused(lambda call=call, long=long: call(long), "context")  # type: ignore[misc]
        refused(lambda call=call: call([2, 3]), "prompt")  # type: ignore[misc]


@pytest.mark.parametrize("length", [1.5, 0, -1, True, None, "3", 2**63, 10**400])
def test_a_draft_has_a_whole_length(demo: Loaded, length: Any) -> None:
    refused(lambda: demo[0].draft(Prompt([2, 100, 101]), length), "length")


def test_media_that_the_model_cannot_take_are_refused(demo: Loaded) -> None:
    model, processor = demo
    image, sound = prompt_with(processor, "image"), prompt_with(processor, "audio")
    (run,), (heard,) = image.media, sound.media
    assert run.positions is not None
    far, negative = run.positions.copy(), run.positions.copy()
    far[0, 0], negative[0, 1] = 10**6, -1
    wrong: list[tuple[Prompt, str]] = [
        (changed(image, positions=far), "positions has 1000000"),
        (changed(image, positions=negative), "positions has -1"),
        (changed(image, positions=run.positions[:-1]), "one for each"),
        (changed(image, positions=run.positions[:, :1]), "positions"),
        (changed(image, positions=run.positions.astype(np.float32)), "positions"),
        (changed(image, positions=None), "positions"),
        (changed(image, values=run.values[:, :-3]), "values"),
        (changed(image, values=run.values.reshape(-1)), "values"),
        (changed(image, values=run.values[:0]), "values"),
        (changed(image, values=run.values.astype(np.float32)), "values"),
        (changed(image, values=run.values.tolist()), "values"),
        (changed(sound, values=heard.values.astype(np.float64)), "values"),
        (changed(sound, values=np.full_like(heard.values, np.nan)), "NaN"),
        (changed(sound, positions=run.positions), "positions"),
        (changed(image, start=-1), "starts at -1"),
        (changed(image, start=10**400), "starts at"),
        (changed(image, start=1.0), "starts at 1.0"),
        (changed(image, start=run.start - 1), "token_ids"),
        (changed(image, start=run.start + 1), "token_ids"),
        (changed(image, kind="video"), "token_ids"),
        (changed(image, kind="audio"), "values"),
        (changed(image, kind=["image"]), "kind"),
        (changed(image, kind=np.array([1, 2])), "kind"),
        (Prompt(image.token_ids, (run, run)), "media[1] starts at"),
    ]
    for prompt, name in wrong:
        refused(lambda prompt=prompt: model.logits(prompt), name)  # type: ignore[misc]
        refused(lambda prompt=prompt: model.draft(prompt, 1), name)  # type: ignore[misc]
        refused(lambda prompt=prompt: generate(model, processor, prompt), name)  # type: ignore[misc]
    for media in (5, "x", {"a": 1}, [5], [None]):
        refused(lambda media=media: Prompt([1], media), "media")  # type: ignore[misc, arg-type]


def test_model_and_processor_are_shown_in_a_line(demo: Loaded) -> None:
    model, processor = demo
    assert len(repr(model).splitlines()) == len(repr(processor).splitlines()) == 1
    layers, hidden = len(model.config.text.layer_types), model.config.text.hidden_size
    assert repr(model).startswith(f"Model({layers} layers, hidden {hidden}, 4-bit affine, float32, a drafter of ")
    assert repr(processor).endswith("; text, image, audio, video)")
