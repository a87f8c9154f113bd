import base64
import io
import json
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from itertools import repeat
from pathlib import Path
from threading import Event, Thread
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from toy import MEDIA, SPECIAL, toy_tokenizer

from mlx_gemma4 import load
from mlx_gemma4.config import (
    AudioConfig,
    CheckpointError,
    GenerationConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from mlx_gemma4.errors import TooLongError
from mlx_gemma4.prompt.messages import strip_thinking
from mlx_gemma4.prompt.processor import ControlText, MediaSettings, Processor, encoded, load_processor
from mlx_gemma4.prompt.prompt import Prompt, check_length
from mlx_gemma4.reply.reply import Controls, ReplyParser

VOCAB = 512
TEMPLATE = resources.files("mlx_gemma4").joinpath("prompt/chat_template.jinja").read_text(encoding="utf-8")
CONTROLS = [*SPECIAL.values(), *MEDIA]
KEYS = (
    "boi_token_id",
    "boa_token_id",
    "image_token_id",
    "audio_token_id",
    "eoi_token_id",
    "eoa_token_id",
    "video_token_id",
)
IDS = dict(zip(KEYS, range(VOCAB - len(KEYS), VOCAB), strict=True))  # in the order of MEDIA
BOI, EOI, BOA, EOA = (IDS[f"{key}_token_id"] for key in ("boi", "eoi", "boa", "eoa"))


def toy_config(vision: bool = True, audio: bool = True, positions: int = 4096) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(64, 128, 4, VOCAB, positions, 1e-6, 30.0, (), 16, {}),
        vision=VisionConfig(48, 64, 64, 64, 1e-6) if vision else None,
        audio=AudioConfig(640, 1e-6) if audio else None,
        special_tokens=IDS,
        generation=GenerationConfig((1,)),
        quantization=None,
        quantization_overrides={},
    )


def write_folder(
    folder: Path, template: str | None = TEMPLATE, tokenizer: Tokenizer | None = None, **files: Any
) -> Path:
    """A model folder's prompt side; `files` are JSON files by their stem."""
    (tokenizer or toy_tokenizer(VOCAB)).save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode())
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load_processor(write_folder(tmp_path_factory.mktemp("model")), toy_config())


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def image(width: int = 96, height: int = 96) -> dict[str, Any]:
    return {"type": "image", "image": Image.new("RGB", (width, height), "red")}


def audio(samples: int = 1000) -> dict[str, Any]:
    return {"type": "audio", "audio": (np.linspace(-1, 1, samples, dtype=np.float32), 16000)}


def video(frames: int, fps: float) -> dict[str, Any]:
    return {"type": "video", "video": [Image.new("RGB", (96, 48))] * frames, "fps": fps}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


OPENING = "<bos><|turn>user\n"
CLOSING = "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"


# --- Prompt ---


def test_token_ids_become_a_list_of_python_integers() -> None:
    for ids in ([2, 5], (2, 5), np.array([2, 5], np.int32), iter([2, 5])):
        prompt = Prompt(token_ids=ids)
        assert prompt.token_ids == [2, 5] and all(type(token) is int for token in prompt.token_ids)
    assert len(prompt) == 2 and prompt.media == ()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "token_ids is empty; expected at least one token"),
        ("ab", "token_ids is a str; expected a list of integers"),
        (7, "token_ids is an int; expected a list of integers"),
        (np.array(7), "token_ids is a ndarray; expected a list of integers"),
        (mx.array(7), "token_ids is an array; expected a list of integers"),
        ([1, True], r"token_ids\[1\] is True; expected an integer of at least 0"),
        ([1.0], r"token_ids\[0\] is 1.0; expected an integer of at least 0"),
        ([-1], r"token_ids\[0\] is -1; expected an integer of at least 0"),
        ([[1, 2]], r"token_ids\[0\] is \[1, 2\]; expected an integer of at least 0"),
        (repeat(1), "token_ids has more than 1048576 tokens; expected no more than the context holds"),
    ],
)
def test_other_token_ids_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Prompt(token_ids=ids)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"notes": "a note"}, "notes is a str; expected a tuple of strings"),
        ({"notes": (5,)}, r"notes\[0\] is an int; expected a string"),
        ({"tools": "f"}, "tools is a str; expected a list of tools"),
        ({"tools": (5,)}, r"tools\[0\] is an int; expected .*"),
        ({"begun": None}, "begun is None; expected a string"),
    ],
)
def test_other_fields_of_another_type_are_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Prompt([2], **field)


def test_tools_of_a_prompt_are_in_one_spelling() -> None:
    spelled = {"type": "function", "function": {"name": "f", "description": ""}}
    assert Prompt([2], tools=[{"name": "f"}]).tools == (spelled,) == Prompt([2], tools=(spelled,)).tools


def test_a_prompt_leaves_room_for_a_reply() -> None:
    config = toy_config(positions=8)
    check_length(Prompt([1] * 7), config)
    with pytest.raises(ValueError, match=r"^the prompt has 8 tokens; the context holds 8, the reply included$"):
        check_length(Prompt([1] * 8), config)
    with pytest.raises(ValueError, match=r"^the prompt has the token id 512; the vocabulary has 512$"):
        check_length(Prompt([VOCAB]), config)


def test_however_long_a_prompt_is_its_true_length_is_told() -> None:
    with pytest.raises(ValueError, match=r"^the prompt has 1048583 tokens; the context holds 8, the reply included$"):
        check_length(Prompt([1] * (2**20 + 7)), toy_config(positions=8))


def test_a_conversation_beyond_the_context_is_refused(tmp_path: Path) -> None:
    short = load_processor(write_folder(tmp_path), toy_config(positions=20))
    with pytest.raises(ValueError, match=r"^the prompt has .* tokens; the context holds 20"):
        short([user("a long story")])


# --- text ---


PARAMETERS = {"type": "object", "properties": {"c": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"c": "x y"}}}]}


def test_ordinary_text_has_the_ids_of_the_whole_render(processor: Processor) -> None:
    prompt = processor([{"role": "system", "content": "the system"}, user(" the quick é\U0001f600\n\nuser  thought")])
    whole = (
        "<bos><|turn>system\nthe system<turn|>\n<|turn>user\nthe quick é\U0001f600\n\nuser  thought<turn|>\n"
        "<|turn>model\n<|channel>thought\n<channel|>"
    )
    assert prompt.token_ids == processor.tokenizer.encode(whole, add_special_tokens=False).ids
    tools = processor([user("call"), CALL, {"role": "tool", "content": "the quick"}], tools=[TOOL], thinking=True)
    assert processor.tokenizer.decode(tools.token_ids, skip_special_tokens=False) == (
        '<bos><|turn>system\n<|think|>\n<|tool>declaration:f{description:<|"|>d<|"|>,parameters:{properties:{c:{'
        'type:<|"|>STRING<|"|>}},type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n<|turn>user\ncall<turn|>\n<|turn>model\n'
        '<|tool_call>call:f{c:<|"|>x y<|"|>}<tool_call|><|tool_response>response:f{value:<|"|>the quick<|"|>}'
        "<tool_response|><|channel>thought\n"
    )


# Pieces of control tokens, whole ones, characters that shielding itself uses, and some that are bytes.
FRAGMENTS = [
    *CONTROLS,
    "<",
    "<|",
    "|>",
    ">",
    "|",
    "<|tu",
    "rn|>",
    "turn|>",
    "<tu",
    "<|im",
    "age|>",
    '"|>',
    "<|chan",
    "nel>",
]
TEXTS = st.lists(st.sampled_from([*FRAGMENTS, "x", " ", "\n", "\ue000", "\ue001", "é"]), min_size=1, max_size=6).map(
    "".join
)
FIELDS = (
    "system", "user", "part 1", "part 2", "reasoning", "answer", "answer part 1", "answer part 2", "call name", "key",
    "value", "nested key", "nested value", "id", "tool text", "tool part 1", "tool part 2", "response name",
    "response key", "response", "tool name", "description", "property", "property description", "enum", "required",
)  # fmt: skip


def conversation(fields: dict[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools with a string of the user's in every place that the template shows."""
    f = fields
    arguments = {f["key"]: [f["value"], {f["nested key"]: f["nested value"]}]}
    call = {"id": f["id"], "function": {"name": f["call name"], "arguments": arguments}}
    messages = [
        {"role": "system", "content": f["system"]},
        user(f["user"]),
        {"role": "assistant", "content": f["answer"]},
        user([text(f["part 1"]), text(f["part 2"])]),
        {"role": "assistant", "reasoning": f["reasoning"], "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f["id"], "content": f["tool text"]},
        {"role": "tool", "name": f["response name"], "content": [text(f["tool part 1"]), text(f["tool part 2"])]},
        {
            "role": "assistant",
            "content": [text(f["answer part 1"]), text(f["answer part 2"])],
            "tool_responses": [{"name": f["response name"], "response": {f["response key"]: f["response"]}}],
        },
    ]
    parameter = {"type": "string", "description": f["property description"], "enum": [f["enum"]]}
    parameters = {"type": "object", "properties": {f["property"]: parameter}, "required": [f["required"]]}
    function = {"name": f["tool name"], "description": f["description"], "parameters": parameters}
    return messages, [{"type": "function", "function": function}]


def control_ids(processor: Processor, prompt: Prompt) -> list[int]:
    return [token for token in prompt.token_ids if token in processor.control.ids.values()]


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(FIELDS, TEXTS)))
def test_no_text_of_the_users_becomes_a_control_token(processor: Processor, fields: dict[str, str]) -> None:
    plain = dict.fromkeys(FIELDS, "x")
    plain["answer part 1"] = plain["answer part 2"] = fields["answer part 1"] = fields["answer part 2"] = "x"
    for name in ("key", "nested key", "response key", "property"):  # between quotes, or they would not be read back
        if fields[name] != fields[name].strip() or fields[name].startswith('"'):
            plain[name] = " x"
    prompt, harmless = (processor(*conversation(texts), thinking=True) for texts in (fields, plain))
    assert control_ids(processor, prompt) == control_ids(processor, harmless)


def test_no_control_token_forms_at_a_seam(processor: Processor) -> None:
    """The template joins parts without anything between them."""
    cuts = [(token[:cut], token[cut:]) for token in CONTROLS for cut in range(1, len(token))]
    parts = [text(half) for halves in cuts for half in halves]
    for role in ("user", "assistant"):
        prompt, harmless = (
            processor([{"role": role, "content": content}, user("x")], thinking=True) for content in (parts, "x")
        )
        assert control_ids(processor, prompt) == control_ids(processor, harmless)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_what_the_user_typed_is_what_the_model_reads(processor: Processor, parts: list[str]) -> None:
    prompt = processor([user([text(part) for part in parts])])
    typed = "".join(part.strip() for part in parts)
    assert processor.tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == OPENING + typed + CLOSING
    expected = [*processor.tokenizer.encode(OPENING, add_special_tokens=False).ids]
    expected += processor.control.encode(typed)  # the same pieces as if it stood alone
    if not typed.startswith(" "):  # "\n" and letters do not merge in the toy
        assert prompt.token_ids[: len(expected)] == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_an_answers_channel_tokens_never_survive(processor: Processor, parts: list[str]) -> None:
    """Balanced or not: a past thought is dropped, the rest is text."""
    for content in ("".join(parts), [text(part) for part in parts]):
        prompt = processor([user("x"), {"role": "assistant", "content": content}, user("x")])
        empty = processor([user("x"), {"role": "assistant", "content": "x"}, user("x")])
        assert control_ids(processor, prompt) == control_ids(processor, empty)


def test_a_past_thought_in_an_answer_is_dropped(processor: Processor) -> None:
    answers = ("<|channel>thought\nhm<channel|>the answer", "the answer")
    prompts = [processor([user("x"), {"role": "assistant", "content": answer}, user("x")]) for answer in answers]
    assert prompts[0] == prompts[1]


def test_typed_tokens_count_that_the_tokenizer_does_not_call_special(tmp_path: Path) -> None:
    """Some tokenizer.json mark fewer tokens than tokenizer_config.json names; unnamed ones stay what they are."""
    spec = json.loads(toy_tokenizer(VOCAB).to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in ("<|turn>", "<|video|>", "<|tool>")
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<turn|>"]
    names = {
        "bos_token": {"content": "<bos>"},
        "sot_token": "<|turn>",
        "eot_token": "<turn|>",
        "extra_special_tokens": ["<|video|>"],
    }
    folder = write_folder(tmp_path, tokenizer=Tokenizer.from_str(json.dumps(spec)), tokenizer_config=names)
    made = load_processor(folder, toy_config())
    ids = made([user("<|turn><turn|><|video|><|tool>")]).token_ids
    assert [ids.count(made.tokenizer.token_to_id(token)) for token in ("<|turn>", "<turn|>", "<|video|>")] == [2, 1, 0]
    assert ids.count(made.tokenizer.token_to_id("<|tool>")) == 1


# --- media ---


def test_an_image_becomes_its_soft_tokens(processor: Processor) -> None:
    prompt = processor([user([image(), text("x")])], image_budget=70)
    (run,) = prompt.media
    head = processor.tokenizer.encode(OPENING, add_special_tokens=False).ids
    tail = processor.tokenizer.encode(f"x{CLOSING}", add_special_tokens=False).ids
    assert prompt.token_ids == [*head, BOI, *[IDS["image_token_id"]] * 64, EOI, *tail]  # 384 x 384 pixels
    assert (run.kind, run.start, len(run)) == ("image", len(head) + 1, 64)
    assert run.values.shape == (64, 48 * 48 * 3) and run.values.dtype == np.uint8
    assert run.positions.tolist()[:9] == [[x, 0] for x in range(8)] + [[0, 1]]


def test_a_sound_becomes_its_soft_tokens(processor: Processor) -> None:
    prompt = processor([user([audio(1000), text("x")])])
    (run,) = prompt.media
    ids = prompt.token_ids
    assert ids[run.start - 1 : run.start + 3] == [BOA, IDS["audio_token_id"], IDS["audio_token_id"], EOA]
    assert run.values.shape == (2, 640) and run.values.dtype == np.float32 and run.positions is None


def test_a_video_becomes_frames_with_their_times(processor: Processor) -> None:
    """The times are encoded as one with the text before them."""
    prompt = processor([user([text("the"), video(3, fps=0.05), text("call")])])
    n = len(prompt.media[0])
    frame = "<|image>" + "<|video|>" * n + "<image|>"
    whole = f"{OPENING}the00:00 {frame} 00:20 {frame} 00:40 {frame}call{CLOSING}"
    assert prompt.token_ids == processor.tokenizer.encode(whole, add_special_tokens=False).ids
    assert [run.kind for run in prompt.media] == ["video"] * 3 and n <= 70
    for run in prompt.media:
        assert prompt.token_ids[run.start - 1 : run.start + n + 1] == [BOI, *[IDS["video_token_id"]] * n, EOI]


def test_media_stand_in_the_order_of_the_prompt(processor: Processor) -> None:
    messages = [
        user([image(96, 96), video(2, 1.0), audio(640), text("<|image|>"), image(96, 48)]),
        CALL,
        {"role": "tool", "content": [text("x"), image(48, 96)]},
        user([audio(2000), video(1, 1.0)]),
    ]
    prompt = processor(messages, image_budget=70)
    kinds = [run.kind for run in prompt.media]
    assert kinds == ["image", "video", "video", "audio", "image", "image", "audio", "video"]
    starts = [run.start for run in prompt.media]
    assert starts == sorted(starts)
    sizes = [run.positions.max(axis=0).tolist() for run in prompt.media if run.kind == "image"]
    assert sizes[0][0] == sizes[0][1] and sizes[1][0] > sizes[1][1] and sizes[2][0] < sizes[2][1]
    assert [len(run) for run in prompt.media if run.kind == "audio"] == [1, 4]
    soft = {IDS[f"{kind}_token_id"] for kind in ("image", "audio", "video")}
    assert sum(token in soft for token in prompt.token_ids) == sum(map(len, prompt.media))


def test_encoded_files_are_taken(processor: Processor) -> None:
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (96, 96)).save(picture, "PNG")
    soundfile.write(sound, np.zeros(640, np.float32), 16000, format="WAV")
    png, wav = (base64.b64encode(file.getvalue()).decode() for file in (picture, sound))
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {"type": "image", "base64": png},
        {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}},
    ]
    assert [run.kind for run in processor([user(parts)]).media] == ["image", "image", "audio"]


def test_the_budget_of_images_leaves_videos_alone(processor: Processor) -> None:
    lengths = {}
    for budget in (None, 70, 1120):
        runs = processor([user([image(), video(1, 1.0)])], image_budget=budget).media
        lengths[budget] = [len(run) for run in runs]
    assert lengths[None][0] == 256 and lengths[70][0] == 64 and lengths[1120][0] == 1089
    assert len({length[1] for length in lengths.values()}) == 1
    with pytest.raises(ValueError, match=r"^image_budget is 300; expected one of 70, 140, 280, 560, 1120$"):
        processor([user("x")], image_budget=300)


@pytest.mark.parametrize(
    ("config", "part", "message"),
    [
        (toy_config(audio=False), audio(), "this checkpoint takes no audio; it takes text, image, video"),
        (toy_config(vision=False), image(), "this checkpoint takes no image; it takes text, audio"),
        (toy_config(vision=False, audio=False), video(1, 1.0), "this checkpoint takes no video; it takes text"),
    ],
)
def test_media_that_the_checkpoint_lacks_are_refused(tmp_path: Path, config: Any, part: Any, message: str) -> None:
    made = load_processor(write_folder(tmp_path), config)
    with pytest.raises(ValueError, match=f"^{message}$"):
        made([user([part])])
    assert made([user("<|audio|> <|image|>")]).media == ()


def test_media_that_the_template_does_not_show_are_refused(tmp_path: Path) -> None:
    made = load_processor(write_folder(tmp_path, template="{{ bos_token }}{{ messages | length }}"), toy_config())
    with pytest.raises(ValueError, match=r"^the messages hold 1 image parts; the chat template has places for 0$"):
        made([user([image()])])


# --- what goes with a prompt ---


def test_a_long_sound_is_noted_in_the_prompt(processor: Processor) -> None:
    prompt = processor([user([audio(31 * 16000), audio()])])
    trained = "the model was trained on clips of at most 30 s, nothing is cut"
    assert prompt.notes == (f"audio is 31.0 s long; {trained}",)


def test_a_prompt_knows_its_tools_as_they_were_given(processor: Processor) -> None:
    parameters = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"const": 1}}}
    tools = [{"name": "f", "input_schema": parameters}]
    function = {"name": "f", "parameters": parameters, "description": ""}
    assert processor([user("x")], tools=tools).tools == ({"type": "function", "function": function},)


# --- replies as text ---

WRITTEN_CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'


def called(**arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": arguments}}]


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("a ▁ b", "a ▁ b", None, []),
        ("", "", None, []),
        (f"<|channel>thought\nhm\n<channel|>a {WRITTEN_CALL}<|tool_response>rest", "a ", "hm", called(a="x")),
        ("hm<channel|>a<turn|>\n<|turn>user\nb<turn|>", "a", "hm", []),
        ("thought\n<channel|>a", "a", None, []),
        (f"thought\nhm\n<channel|>{WRITTEN_CALL}", "", "hm", called(a="x")),
        (f"<bos><|turn>user\nb<turn|>\n<|turn>model\na{WRITTEN_CALL}", "a", None, called(a="x")),
        ('<|tool_call>call:f{a:<|"|>x}<turn|>\n<|turn>user\nb<turn|>', "", None, called(a="x")),
        ("<|tool_call>call:f(a='x'<turn|>", "", None, called(a="x")),
        ('<|tool_call>call:f{a:<|"|>x <turn|> y<|"|>}<tool_call|><turn|>z', "", None, called(a="x <turn|> y")),
        ("a<|tool_call>call:f{a}<tool_call|>", "a<|tool_call>call:f{a}<tool_call|>", None, []),
    ],
)
def test_the_text_of_a_reply_becomes_its_message(
    processor: Processor, text: str, content: str, reasoning: str | None, calls: list[Any]
) -> None:
    message = processor.parse_response(text)
    assert message == {"role": "assistant", "content": content, "reasoning": reasoning, "tool_calls": calls}
    if content or calls:
        processor([user("x"), message])


def test_tools_help_to_read_a_reply(processor: Processor) -> None:
    tools = [{"name": "f", "parameters": {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}}]
    text = "<|tool_call>call:f{a:hello, world}<tool_call|>"
    assert processor.parse_response(text, tools)["tool_calls"] == called(a="hello, world")
    assert processor.parse_response(text)["tool_calls"] == []
    with pytest.raises(ValueError, match=r"^text is None; expected the text of a reply$"):
        processor.parse_response(None)  # type: ignore[arg-type]


FRAGMENTS_OF_REPLIES = st.sampled_from(
    [*CONTROLS, "call:f", "{", "}", "[", "]", "(", ")", "a:", "1", "'", ",", "thought\n", " "]
)


@settings(deadline=None)
@given(st.lists(FRAGMENTS_OF_REPLIES, max_size=20).map("".join))
def test_any_text_is_a_message_that_can_be_gone_on_from(processor: Processor, reply: str) -> None:
    for text in (reply, f"<|tool_call>call:f{{{reply}"):
        processor([user("x"), processor.parse_response(text), user("y")])


KEYS = st.text("ab \n:,{}'\"<|>=é", max_size=4)
ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
)


@settings(deadline=None)
@given(TEXTS, st.dictionaries(KEYS, ARGUMENTS, max_size=3))
@example("", {'"': None, '<"': None})
@example("", {" ": 1, " a": {"a ": 2, "": 3, "\n": [{"\t b": 4}]}})
def test_a_reply_is_read_back_from_the_next_prompt(
    processor: Processor, content: str, arguments: dict[str, Any]
) -> None:
    """Text before a call and the call: ids of the model's turn are those that it wrote."""
    assume(strip_thinking(content) == content)  # what begins as a thought is none of the answer
    message = {"role": "assistant", "content": content, "tool_calls": called(**arguments)}
    first = processor([user("x")], thinking=True).token_ids
    ids = processor([user("x"), message], thinking=True).token_ids
    assert ids[: len(first)] == first
    parser = ReplyParser(processor.tokenizer, Controls.from_tokenizer(processor.tokenizer), ())
    parser.feed(ids[len(first) :])
    parser.finish()
    assert json.dumps(parser.message, sort_keys=True) == json.dumps(message, sort_keys=True)


def test_text_stays_text_where_the_model_looks_for_whole_words_first(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(VOCAB)
    parts = json.loads(tokenizer.to_str())
    parts["model"]["ignore_merges"] = True
    parts["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    assert tokenizer.encode('<|"|>', add_special_tokens=False).ids == [52]
    made = load_processor(write_folder(tmp_path, tokenizer=tokenizer), toy_config())
    plain = control_ids(made, made([user("a")]))
    for typed in ('a<|"|>', '<|"|>', "<bos>a"):
        prompt = made([user(typed)])
        assert control_ids(made, prompt) == plain
        assert made.tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == OPENING + typed + CLOSING


# --- loading ---


def test_the_template_is_looked_for_where_transformers_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def rendered(folder: Path) -> str:
        made = load_processor(folder, toy_config())
        assert not caplog.records
        return made.tokenizer.decode(made([user("x")]).token_ids)

    folder = write_folder(tmp_path, template=None, chat_template={"chat_template": "three"})
    assert rendered(folder) == "three"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two of a list"}]
    write_folder(tmp_path, template=None, tokenizer_config={"chat_template": named})
    assert rendered(folder) == "two of a list"
    write_folder(tmp_path, template=None, tokenizer_config={"chat_template": "two"})
    assert rendered(folder) == "two"
    write_folder(tmp_path, template="one")
    assert rendered(folder) == "one"


def test_without_a_template_the_packaged_one_is_used_with_a_warning(
    tmp_path: Path, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path, template=None)
    made = load_processor(folder, toy_config())
    assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
    assert "has no chat template; the packaged one of 2026-07-09 is used" in caplog.text
    assert made([user("x")]) == processor([user("x")])


def test_the_old_template_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = "{# é" + " " * (17466 - 11) + " #}old"
    assert len(old.encode()) == 17466
    for place in ({"template": old}, {"template": None, "tokenizer_config": {"chat_template": old}}):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        folder = write_folder(tmp_path, **place)
        caplog.clear()
        made = load_processor(folder, toy_config())
        assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
        assert "holds the old chat template, which leaks thoughts" in caplog.text
        assert made.tokenizer.decode(made([user("x")]).token_ids) == "old"


def test_settings_come_from_either_file_and_default_to_the_published(tmp_path: Path) -> None:
    def settings_with(**files: Any) -> MediaSettings:
        for path in tmp_path.glob("*processor_config.json"):
            path.unlink()
        return load_processor(write_folder(tmp_path, **files), toy_config()).settings

    published = MediaSettings(image_budget=280, video_budget=70, num_frames=32, sampling_rate=16000)
    assert settings_with() == settings_with(processor_config={"image_processor": {}}) == published
    current = {
        "image_processor": {"max_soft_tokens": 560},
        "video_processor": {"max_soft_tokens": 140, "num_frames": 8},
        "feature_extractor": {"sampling_rate": 8000},
    }
    assert settings_with(processor_config=current) == MediaSettings(560, 140, 8, 8000)
    assert settings_with(preprocessor_config=current) == MediaSettings(560, 140, 8, 8000)
    assert settings_with(processor_config={"image_seq_length": 140}).image_budget == 140
    flat = {"max_soft_tokens": 1120, "sampling_rate": 8000}  # those of the images and the sound alone
    assert settings_with(preprocessor_config=flat) == MediaSettings(1120, 70, 32, 8000)
    with pytest.raises(CheckpointError, match="num_frames of video_processor is 0; expected a whole number above 0"):
        settings_with(processor_config={"video_processor": {"num_frames": 0}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer: "),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json is not a tokenizer: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": "<start>"}', "tokenizer.json has no token '<start>'"),
        ("processor_config.json", "[]", "processor_config.json holds a list"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja holds no valid chat template: "),
        ("chat_template.jinja", "\udcff", "chat_template.jinja is not UTF-8: "),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = write_folder(tmp_path) / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        load_processor(tmp_path, toy_config())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_ids_that_the_tokenizer_lacks_are_named(tmp_path: Path) -> None:
    wrong = replace(toy_config(), special_tokens=IDS | {"boa_token_id": 9999})
    with pytest.raises(CheckpointError, match=r"^config.json's boa_token_id is 9999; tokenizer.json has no such id$"):
        load_processor(write_folder(tmp_path), wrong)


def test_importing_and_a_text_prompt_load_no_media_libraries() -> None:
    code = (
        "import sys, mlx_gemma4.prompt.processor; print({'PIL', 'soundfile', 'av', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_other_threads_go_on_while_a_long_text_is_encoded() -> None:
    tokenizer, beats, done = load("demo")[1].tokenizer, 0, Event()

    def beat() -> None:
        nonlocal beats
        while not done.wait(0.001):
            beats += 1

    thread = Thread(target=beat)
    thread.start()
    before = beats
    ids = encoded(tokenizer, "x" * 200_000)
    beaten = beats - before
    done.set()
    thread.join()
    assert len(ids) == 200_000 and beaten > 5


def test_what_cannot_fit_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load("demo")[1]
    longest = max(map(len, processor.tokenizer.get_vocab()))
    for text in ("x", "<"):  # the second one is shielded, which makes the template's text longer
        with pytest.raises(TooLongError, match=r"the prompt has \d+ tokens"):  # they are counted
            processor([{"role": "user", "content": text * (8192 * longest - 100)}])
    monkeypatch.setattr(ControlText, "encode", pytest.fail)
    with pytest.raises(TooLongError, match=r"^the prompt has at least \d+ tokens; the context holds 8192"):
        processor([{"role": "user", "content": "x" * 8192 * longest}])
    with pytest.raises(TooLongError, match="at least 8192 tokens"):
        processor.ids("x" * 8192 * longest)
