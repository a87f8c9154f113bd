"""Rows are what inference reads, and what is learnt is what the model must say."""

import io
import wave
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from toy_checkpoint import TINY

from mlx_gemma4 import Prompt
from mlx_gemma4.errors import FetchError
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import SoftTokens
from mlx_gemma4.tune.data import SPLITS, Example, parse, read_split
from mlx_gemma4.tune.network import hidden_states
from mlx_gemma4.tune.rows import Branch, branches, packed, passage, passages, row
from mlx_gemma4.weights.load import open_checkpoint, read_values

BUDGET = 70


@pytest.fixture(scope="module")
def raw(tiny_folder: Path) -> Model:
    """As it is trained: not arranged."""
    checkpoint = open_checkpoint(tiny_folder, None)
    for _ in read_values(checkpoint):
        pass
    return checkpoint.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 255, (96, 144, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[::-1]).save(folder / "b.png")
    return folder


def example(messages: list[Any], folder: Path, **more: Any) -> Example:
    return parse({"messages": messages, **more}, "train.jsonl, line 1", folder)


def user(text: str, **media: str) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": k, k: v} for k, v in media.items()), {"type": "text", "text": text}]}


CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": {"at": "<turn|>"}}}]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
LONG: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    user("the quick", image="a.png"),
    {"role": "assistant", "content": "yes"},
    user("why", image="b.png", audio="s.wav"),
    {"role": "assistant", "reasoning": "hm", "content": "so it is"},
    user("and"),
    CALL,
    {"role": "tool", "tool_call_id": "1", "content": "seen"},
    {"role": "assistant", "content": "done"},
    user("once more"),
    {"role": "assistant", "reasoning": "look", "content": "let me see", "tool_calls": CALL["tool_calls"]},
    {"role": "tool", "tool_call_id": "1", "content": "again"},
    {"role": "assistant", "reasoning": "well", "content": "no"},
]


@pytest.fixture(scope="module")
def sound(folder: Path) -> None:
    import soundfile

    soundfile.write(folder / "s.wav", np.sin(np.arange(4000) / 9).astype(np.float32), 16000)


def test_learnt_is_what_the_model_must_say_behind_what_inference_reads(
    tiny: tuple[Model, Processor], folder: Path, sound: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = tiny
    found, media = branches(processor, example(LONG, folder, tools=TOOLS), BUDGET)
    call = '<|tool_call>call:look{at:<|"|><turn|><|"|>}<tool_call|><|tool_response>'
    wanted = {
        2: "yes<turn|>",
        4: "<|channel>thought\nhm\n<channel|>so it is<turn|>",
        6: call,
        8: "done<turn|>",
        10: f"<|channel>thought\nlook\n<channel|>let me see{call}",
        12: "well\n<channel|>no<turn|>",  # the prompt has opened the thought
    }
    assert [part["type"] for part in media] == ["image", "image", "audio"]
    monkeypatch.chdir(folder)
    stops = processor.config.generation.eos_token_ids
    for branch, (index, said) in zip(found, wanted.items(), strict=True):
        prompt = processor(LONG[:index], TOOLS, "reasoning" in LONG[index], BUDGET)
        assert branch.ids[: branch.start] == prompt.token_ids
        assert [(run.start, run.count) for run in branch.runs] == [(run.start, len(run)) for run in prompt.media]
        ids = branch.ids[branch.start :]
        assert processor.tokenizer.decode(ids, skip_special_tokens=False) == said
        assert [token in stops for token in ids] == [False] * (len(ids) - 1) + [True]  # what is typed is no token


def test_a_row_gives_what_inference_gives(tiny: tuple[Model, Processor], raw: Model, folder: Path, sound: None) -> None:
    """Branches that share their beginning, image blocks, a window of 16, other examples in the row, empty places."""
    model, processor = tiny
    found, media = branches(processor, example(LONG, folder, tools=TOOLS), BUDGET)
    [long] = passages("", found, media, 4096)
    assert len(long) < sum(len(branch.ids) for branch in found) / 2
    short = passage("", [Branch([2, 30, 31, 32, 33], 2)], ())
    one = row([short, long, short], TINY.window, lambda part: processor.read(part, BUDGET))
    assert one.tokens == 2 * len(short) + len(long) < len(one.ids)
    logits = raw.language_model.head(hidden_states(raw, one, checkpoint=False)[0])[0]
    assert mx.isfinite(logits).all()
    loaded = [processor.read(part, BUDGET) for part in media]
    learnt = set(zip(one.places.tolist(), one.targets.tolist(), strict=True))
    count = 0
    for at, branch in [(0, Branch([2, 30, 31, 32, 33], 2)), *((len(short), branch) for branch in found)]:
        values = [loaded[run.part][run.number] for run in branch.runs]
        runs = [SoftTokens(r.kind, r.start, v.values, v.positions) for r, v in zip(branch.runs, values, strict=True)]
        wanted = np.array(model.logits(Prompt(branch.ids, tuple(runs)))[0])
        own = passage("", [branch], media) if not at else long
        for index in range(branch.start - 1, len(branch.ids) - 1):
            near = [
                place + at
                for place in np.flatnonzero(own.positions == index)
                if (place + at, branch.ids[index + 1]) in learnt
            ]
            errors = [np.abs(np.array(logits[int(place)]) - wanted[index]).max() for place in near]
            assert min(errors) < 2e-5
            count += 1
    assert count + 3 == len(one.places)  # and the second of the short ones


def test_a_conversation_that_does_not_fit_is_cut_between_branches(folder: Path) -> None:
    shared = list(range(10, 40))
    found = [Branch([*shared, n, n + 1], len(shared)) for n in (100, 200, 300)]
    made = passages("", found, (), 34)
    assert [len(one) for one in made] == [34, 32]
    assert sum(len(one.places) for one in made) == 6
    with pytest.raises(ValueError, match=r"x: the example has 32 tokens; expected at most 31"):
        passages("x", found, (), 31)


def test_no_row_is_fuller_than_it_may_be() -> None:
    lengths = [5, 90, 40, 60, 10, 3]
    rows = packed(lengths, 100)
    assert sorted(index for own in rows for index in own) == list(range(6))
    assert all(sum(lengths[index] for index in own) <= 100 for own in rows)
    assert rows[0][0] == 1


def test_what_is_not_to_be_learnt_is_not(tiny: tuple[Model, Processor], folder: Path) -> None:
    turns = [
        user("a"),
        {"role": "assistant", "content": "b", "weight": 0},
        user("c"),
        {"role": "assistant", "content": "d"},
    ]
    found, _ = branches(tiny[1], example(turns, folder))
    assert [tiny[1].tokenizer.decode(branch.ids[branch.start :]) for branch in found] == ["d"]
    with pytest.raises(ValueError, match="line 1: the example has no token to learn"):
        branches(tiny[1], example(turns[:2], folder))
    spoken = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "look"}', "weight": 0},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "d"},
    ]
    found, _ = branches(tiny[1], parse({"conversations": spoken}, "", folder))
    assert [tiny[1].tokenizer.decode(branch.ids[branch.start :]) for branch in found] == ["d"]


def same(processor: Processor, row: dict[str, Any], other: dict[str, Any], folder: Path) -> bool:
    one, two = (branches(processor, parse(given, "", folder), BUDGET)[0] for given in (row, other))
    return one == two


def test_every_form_of_data_is_the_same_chat(tiny: tuple[Model, Processor], folder: Path) -> None:
    processor = tiny[1]
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert same(processor, {"prompt": "a", "completion": "b"}, chat, folder)
    assert same(processor, chat | {"prompt": "a"}, chat, folder)
    assert same(processor, {"prompt": chat["messages"][:1], "completion": chat["messages"][1:]}, chat, folder)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert same(processor, {"conversations": turns}, chat, folder)
    called = {
        "messages": [
            user("a"),
            CALL,
            {"role": "tool", "name": "look", "content": "r"},
            {"role": "assistant", "content": "b"},
        ]
    }
    said = '{"name": "look", "arguments": {"at": "<turn|>"}}'
    turns = [turns[0], {"from": "function_call", "value": said}, {"from": "observation", "value": "r"}, turns[1]]
    assert same(processor, {"conversations": turns}, called, folder)
    embedded = CALL | {"tool_responses": [{"name": "look", "response": "r"}], "content": "b"}
    assert same(processor, {"messages": [user("a"), embedded]}, called, folder)
    shown = {"messages": [user("a", image="a.png"), {"role": "assistant", "content": "b"}]}
    listed = {
        "conversations": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}],
        "images": ["a.png"],
    }
    assert same(processor, listed, shown, folder)
    bare = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
            shown["messages"][1],
        ]
    }
    assert same(processor, bare | {"images": ["a.png"]}, shown, folder)
    film = [{"type": "video", "video": ["a.png", "b.png"], "fps": 2}]
    bare = {"messages": [{"role": "user", "content": [{"type": "video", "fps": 2}]}, shown["messages"][1]]}
    frames = [{"bytes": (folder / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": "b.png"}]
    wanted = {"messages": [{"role": "user", "content": film}, shown["messages"][1]]}
    assert same(processor, bare | {"videos": [frames]}, wanted, folder)
    thought = [user("a"), {"role": "assistant", "content": "<|channel>thought\nhm\n<channel|>b"}]
    kept = [user("a"), {"role": "assistant", "reasoning": "hm", "content": "b"}]
    assert same(processor, {"messages": thought}, {"messages": kept}, folder)
    parts = [{"type": "text", "text": "<|channel>thought\nhm\n<channel|>"}, {"type": "text", "text": "b"}]
    assert same(processor, {"messages": [user("a"), thought[1] | {"content": parts}]}, {"messages": kept}, folder)
    mention = "b<turn|> ends a turn, <|tool_call>call:f{}<tool_call|> calls"
    typed = [user("a"), {"role": "assistant", "content": f"<|channel>thought\nhm\n<channel|>{mention}"}]
    assert same(processor, {"messages": typed}, {"messages": [user("a"), kept[1] | {"content": mention}]}, folder)
    empty = thought[1] | {"content": "<|channel>thought\n<channel|>b", "reasoning": "hm"}
    assert same(processor, {"messages": [user("a"), empty]}, {"messages": kept}, folder)
    [text], _ = branches(processor, parse({"text": "abc"}, "", folder))
    assert processor.tokenizer.decode(text.ids, skip_special_tokens=False) == "<bos>abc<eos>"
    assert text.start == 1


def test_media_as_datasets_keeps_them_are_read(tiny: tuple[Model, Processor], folder: Path, sound: None) -> None:
    import soundfile

    samples, rate = soundfile.read(folder / "s.wav", dtype="float32")
    said = {"role": "assistant", "content": "b"}
    for kind, name, others in (
        ("image", "a.png", [{"bytes": (folder / "a.png").read_bytes(), "path": "gone.png"}]),
        ("audio", "s.wav", [{"path": "gone.wav", "array": samples.tolist(), "sampling_rate": rate}]),
    ):
        wanted = {"messages": [user("a", **{kind: name}), said]}
        for other in [{"bytes": None, "path": name}, {"path": name}, *others]:
            asked = {"role": "user", "content": [{"type": kind, kind: other}, {"type": "text", "text": "a"}]}
            (ones, [one]), (twos, [two]) = (
                branches(tiny[1], parse(given, "", folder), BUDGET) for given in ({"messages": [asked, said]}, wanted)
            )
            assert ones == twos
            assert np.array_equal(tiny[1].read(one, BUDGET)[0].values, tiny[1].read(two, BUDGET)[0].values)


def test_older_spellings_are_the_same_chat(tiny: tuple[Model, Processor], folder: Path) -> None:
    """What stood beside the messages, or in them under another name, was dropped without a word."""
    processor, asked, said = tiny[1], user("a"), {"role": "assistant", "content": "b"}
    system = {"role": "system", "content": "s"}
    told = {"messages": [system, asked, said]}
    assert same(processor, {"messages": [asked, said], "system": "s"}, told, folder)
    assert same(processor, {"prompt": "a", "completion": "b", "system": "s"}, told, folder)
    assert same(processor, told | {"system": "s"}, told, folder)
    tool = {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}
    called = [asked, CALL, {"role": "tool", "name": "look", "content": "r"}, said]
    old = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": "<turn|>"}'}}
    older = [asked, old, {"role": "function", "name": "look", "content": "r"}, said]
    assert same(processor, {"messages": older, "functions": [tool]}, {"messages": called, "tools": [tool]}, folder)
    thought = {"messages": [asked, said | {"reasoning": "hm"}]}
    assert same(processor, {"messages": [asked, said | {"thinking": "hm"}]}, thought, folder)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning": "hm"}]
    assert same(processor, {"conversations": turns}, thought, folder)
    row = {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "<turn|>"}}', "reasoning": "hm"}
    own = {"messages": [asked, CALL | {"reasoning": "hm"}]}
    assert same(processor, {"conversations": [turns[0], row]}, own, folder)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "system": "t"}',
         "the example has system, and messages begins with another"),
        ('{"prompt": "a", "completion": "b", "tools": [1], "functions": [2]}', "has tools and functions"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [1], '
         '"function_call": {"name": "f"}}]}', "messages[1] has function_call and tool_calls"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c", '
         '"thinking": "d"}]}', "messages[1] has thinking and another reasoning"),
        ("{", "is not JSON"),
        ("[1]", "the example is a list"),
        ('{"message": []}', "the example has the keys 'message'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "the example has the keys"),
        ('{"messages": [], "text": "b"}', "the example has the keys"),
        ('{"messages": []}', "expected a list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no token to learn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an assistant message"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', "says nothing"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
            '{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "tool_calls": [5]}]}',
            "messages[3].tool_calls[0]",
        ),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
         '"weight": 2}]}', "weight"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}, '
         '{"role": "assistant", "content": "b"}]}', "no.png' does not exist"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
         '[{"type": "image", "image": "a.png"}]}]}', "assistant message with image"),
        ('{"messages": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]}', "the role 'bot'"),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "is from 'alien'"),
        ('{"conversations": [{"from": "human", "value": "<image><image>"}], "images": ["a.png"]}', "places for more"),
        ('{"conversations": [{"from": "human", "value": "a"}], "images": ["a.png"]}', "more than its messages"),
        ('{"text": ""}', "text is ''"),
        ('{"text": "<|image|>"}', "text has a place for image"),
        (r'{"text": "a\ud800"}', "half of a surrogate pair"),
        ('{"prompt": 1, "completion": 2}', "prompt is an int"),
        ('{"prompt": "a", "completion": NaN}', "prompt is a str and completion a float"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "reasoning": "c", "content": '
         '"<|channel>thought\\nd\\n<channel|>b"}]}', "messages[1] has a thought in content and another reasoning"),
        ("\udcff", "line 3, is not UTF-8: invalid start byte"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_with_file_and_number(
    tiny: tuple[Model, Processor], tmp_path: Path, line: str, says: str
) -> None:
    good = '{"prompt": "a", "completion": "b"}'
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n{line}\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 3") as caught:
        for one in read_split(str(tmp_path), "train") or []:
            branches(tiny[1], one, BUDGET)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_away_is_no_fault_of_the_example(tiny: tuple[Model, Processor], folder: Path) -> None:
    turns = [user("a", image="http://127.0.0.1:9/a.png"), {"role": "assistant", "content": "b"}]
    with pytest.raises(FetchError, match="line 1: "):
        branches(tiny[1], example(turns, folder))


def test_media_in_parquet_files_stay_files(tiny: tuple[Model, Processor], tmp_path: Path) -> None:
    """As their columns' types decode them, sounds would need torchcodec, and all pictures be in memory at once."""
    datasets = pytest.importorskip("datasets")
    sound, picture = io.BytesIO(), io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(6400))
    Image.new("RGB", (48, 48)).save(picture, "PNG")
    said = [{"role": "user", "content": "<image>and<audio>"}, {"role": "assistant", "content": "b"}]
    rows = {
        "messages": [said], "audio": [{"bytes": sound.getvalue(), "path": None}],
        "images": [[{"bytes": picture.getvalue(), "path": None}]],
    }  # fmt: skip
    made = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    made.cast_column("images", datasets.List(datasets.Image())).to_parquet(tmp_path / "train.parquet")
    (example,) = read_split(str(tmp_path), "train") or []
    _, media = branches(tiny[1], example)
    assert [part[part["type"]] for part in media] == [picture.getvalue(), sound.getvalue()]


def test_tools_and_calls_of_a_dataset_are_those_of_their_row(tiny: tuple[Model, Processor], tmp_path: Path) -> None:
    """A column's objects have the keys of all rows, and None where a row has none; JSON of no one type is text."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for name, arguments in (("look", {"at": "x"}), ("go", {"far": 3})):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        tool = {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
        rows.append({"messages": [{"role": "user", "content": "a"}, call], "tools": [tool]})
    wanted = [branches(tiny[1], parse(own, "", tmp_path)) for own in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "one" / "train.parquet")
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"far": [3, "m"], "at": None}
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert [branches(tiny[1], own) for own in read_split(str(tmp_path / name), "train") or []] == wanted
        wanted[1] = branches(tiny[1], parse(rows[1], "", tmp_path))


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in ("a", "b"))
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "validation": two}).save_to_disk(tmp_path / "both")
    found = {(name, split): read_split(str(tmp_path / name), split) for name in ("one", "both") for split in SPLITS}
    said = {key: own and [example.text for example in own] for key, own in found.items()}
    assert said == {
        ("one", "train"): ["a"], ("one", "valid"): None, ("one", "test"): None,
        ("both", "train"): ["a"], ("both", "valid"): ["b"], ("both", "test"): None,
    }  # fmt: skip
    (tmp_path / "both" / "train" / "data-00000-of-00001.arrow").write_bytes(b"none")
    (tmp_path / "one" / "state.json").write_text("{}")
    for name in ("one", "both"):
        with pytest.raises(ValueError, match="cannot be read as a dataset"):
            read_split(str(tmp_path / name), "train")


def test_parquet_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "train.parquet").write_bytes(b"PAR1, or not")
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be read as a dataset: "):
        read_split(str(tmp_path), "train")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_dict({"other": [5]}).to_parquet(tmp_path / "train-2.parquet")
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be read as a dataset: "):
        read_split(str(tmp_path), "train")


def test_folders_without_examples_are_refused(tmp_path: Path) -> None:
    assert read_split(str(tmp_path), "valid") is None
    (tmp_path / "valid.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"valid\.jsonl has no examples"):
        read_split(str(tmp_path), "valid")
    (tmp_path / "train.parquet").write_text("")
    with pytest.raises(ValueError, match="one of both formats"):
        read_split(str(tmp_path), "train")
    with pytest.raises(ValueError, match="is no folder"):
        read_split(str(tmp_path / "none"), "train")
