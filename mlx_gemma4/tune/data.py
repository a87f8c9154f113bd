"""Files of examples -> chats: who wrote them in which form is of no account after this file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gemma4.config import expanded
from mlx_gemma4.errors import a, one_line, shown
from mlx_gemma4.prompt.messages import MEDIA, Message, as_now, from_folder, is_blank, json_lines

FORMS = {  # the keys that an example is told by
    "messages": '{"messages": […], "tools": […]}',
    "prompt": '{"prompt": …, "completion": …}',
    "conversations": '{"conversations": [{"from": …, "value": …}]}',
    "text": '{"text": …}',
}
# ShareGPT's speakers, as its many writers name them.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "function_call": "call", "tool_call": "call", "observation": "tool",
    "tool": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}  # and how datasets name them
SAVED = ("dataset_dict.json", "state.json")  # in what `save_to_disk` wrote of several splits, of one


@dataclass(frozen=True, eq=False)
class Example:
    """What the model reads and is to say: a chat, of which each assistant message is learnt, or a text."""

    where: str  # file and line
    folder: Path  # where relative paths of media start
    messages: list[Message]  # not yet checked
    tools: list[dict[str, Any]] | None
    weights: list[bool]  # of each message, whether it is learnt if the assistant says it
    text: str | None = None  # all of it is learnt; no messages then


def read_split(data: str, split: str) -> list[Example] | None:
    """The examples of `train`, `valid` or `test`; None if there are none of this name.

    data: a folder of JSON lines (`train.jsonl`), or what the library `datasets` reads: a folder of parquet files, one
    that `save_to_disk` wrote, or a hub id. ValueError that names file and line if one is wrong, or if there are none.
    """
    folder = expanded(data)
    file = folder / f"{split}.jsonl"
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{data!r} is a file; expected a folder with train.jsonl, for --data")
        if data.count("/") != 1 or data.startswith((".", "/", "~")):
            raise ValueError(f"{data!r} is no folder; expected one with train.jsonl, or a dataset's hub id, for --data")
        found = hub_rows(data, split, is_saved=False)
    else:
        tables = sorted(folder.glob("*.parquet")) + sorted(folder.glob("data/*.parquet"))
        has_lines, is_saved = any(folder.glob("*.jsonl")), any((folder / name).is_file() for name in SAVED)
        if tables and has_lines:
            raise ValueError(f"{folder} has JSON lines and {tables[0].name}; expected one of both formats")
        if tables or (is_saved and not has_lines):
            found = hub_rows(str(folder), split, is_saved)
        else:
            found = ((f"{file}, line {n}", row) for n, row in json_lines(file)) if file.is_file() else None
    if found is None:
        return None
    examples = [parse(row, where, folder) for where, row in found]
    if not examples:
        name = file if file.is_file() else f"{data}, {split},"
        raise ValueError(f"{name} has no examples; expected one in each line, or no such file")
    return examples


def hub_rows(source: str, split: str, is_saved: bool) -> Iterator[tuple[str, Any]] | None:
    try:
        # here: it is a large library, and JSON lines need none
        from datasets import Dataset, load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ValueError(f"{source} needs the library datasets; expected it, or a folder with train.jsonl") from None
    try:
        found = load_from_disk(source) if is_saved else load_dataset(source)
    except (DatasetsError, ValueError, KeyError) as error:  # a key that its own files lack
        raise ValueError(f"{source} cannot be read as a dataset: {one_line(error)}") from None
    found = {"train": found} if isinstance(found, Dataset) else found
    name = next((name for name in SPLITS[split] if name in found), None)
    if name is None:
        return None
    features = found[name].features.to_dict()
    rows = found[name].to_iterable_dataset().decode(False)  # media as files, which are read here
    return ((f"{source}, {name}, row {n}", as_written(row, features)) for n, row in enumerate(rows, 1))


def as_written(value: Any, feature: Any) -> Any:
    """A value of a column as its writer had it: a column's objects have the keys of all rows, None where a row has no
    such key, and what differs in type from row to row is JSON."""
    feature = {"_type": "List", "feature": feature[0]} if isinstance(feature, list) else feature  # as it was before
    match feature.get("_type"), value:
        case "Json", str():
            return json.loads(value)
        case "List" | "LargeList" | "Sequence", list():
            return [as_written(one, feature["feature"]) for one in value]
        case None, dict():
            return {key: as_written(one, feature[key]) for key, one in value.items() if one is not None}
    return value


def parse(row: Any, where: str, folder: Path) -> Example:
    try:
        return parse_row(row, where, folder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse_row(row: Any, where: str, folder: Path) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"the example is {a(row)}; expected {FORMS['messages']}")
    forms = [key for key in FORMS if row.get(key) is not None]
    if row.get("completion") is None and "prompt" in forms:  # the first message again, as UltraChat has it
        forms.remove("prompt")
    if len(forms) != 1:
        keys = ", ".join(map(str, row)) or "none"
        raise ValueError(f"the example has the keys {shown(keys)}; expected one of {', '.join(FORMS.values())}")
    if forms == ["text"]:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError(f"text is {shown(row['text'])}; expected what the model is to learn")
        return Example(where, folder, [], None, [], row["text"])
    given: Any = row.get("messages")
    if forms == ["prompt"]:
        asked, said = row["prompt"], row["completion"]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
        if not isinstance(asked, list) or not isinstance(said, list):
            got = f"prompt is {a(row['prompt'])} and completion {a(row['completion'])}"
            raise ValueError(f"{got}; expected texts or lists of messages")
        given = [message | {"weight": 0} if isinstance(message, dict) else message for message in asked] + said
    elif forms == ["conversations"]:
        given = sharegpt(row["conversations"])
    if not isinstance(given, list) or not given:
        raise ValueError(f"messages is {shown(given)}; expected a list of messages")
    messages: list[Message] = []
    weights: list[bool] = []
    for index, message in enumerate(with_media(with_system(given, row.get("system")), row)):
        weight = message.get("weight", 1) if isinstance(message, dict) else 1
        if weight not in (0, 1, None):
            raise ValueError(f"messages[{index}].weight is {shown(weight)}; expected 0 or 1")
        apart = separate(as_now(message, f"messages[{index}]"))
        messages += apart
        weights += [weight != 0] * len(apart)
    return Example(where, folder, messages, tools_of(row), weights)


def tools_of(row: dict[str, Any]) -> Any:
    """An example's tools, or its functions, as they were called before; texts are JSON."""
    found = {key: row[key] for key in ("tools", "functions") if row.get(key) not in (None, [])}
    found = {
        key: from_json(own, key) if isinstance(own, str) else own for key, own in found.items() if not is_blank(own)
    }
    if len(found) > 1:
        raise ValueError("the example has tools and functions; expected one of them")
    return next(iter(found.values()), None)


def with_system(given: list[Any], system: Any) -> list[Any]:
    """The messages behind what is beside them as `system`."""
    if system is None or is_blank(system):
        return given
    first = given[0] if isinstance(given[0], dict) else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *given]
    if first.get("content") != system:
        raise ValueError("the example has system, and messages begins with another; expected one of them")
    return given


def separate(message: Any) -> list[Any]:
    """A message with embedded tool responses, as Google writes it, as what it is: calls, results, and then a text."""
    if not isinstance(message, dict) or not message.get("tool_responses") or not message.get("tool_calls"):
        return [message]
    rest = {key: value for key, value in message.items() if key not in ("tool_responses", "content")}
    results = [
        {"role": "tool", "name": response.get("name"), "content": response.get("response")}
        if isinstance(response, dict)
        else response
        for response in message["tool_responses"]
    ]
    after = {"role": message.get("role"), "content": message["content"]} if message.get("content") else None
    return [rest, *results] + ([after] if after else [])


def sharegpt(turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise ValueError(f"conversations is {a(turns)}; expected a list of turns")
    found: list[Any] = []
    for index, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f"conversations[{index}] is from {shown(speaker)}; expected human, gpt, system or a tool")
        value = turn.get("value", turn.get("content"))
        if role == "call":
            calls = from_json(value, f"conversations[{index}]") if isinstance(value, str) else value
            calls = calls if isinstance(calls, list) else [calls]
            said = {"role": "assistant", "content": None, "tool_calls": calls}
        else:
            said = {"role": role, "content": value}
        found.append(turn | said)
    return found


def from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def with_media(messages: list[Any], row: dict[str, Any]) -> list[Any]:
    """The media that an example lists beside its messages, at their places: parts without a value, or `<image>` in a
    text, as LLaMA-Factory marks them. ValueError unless each has one."""
    waiting = {
        kind: list(found if isinstance(found, list) else [found])
        for kind in MEDIA
        for found in (row.get(f"{kind}s") if row.get(f"{kind}s") is not None else row.get(kind),)
        if found is not None
    }
    if not waiting:
        return messages

    def take(kind: str) -> dict[str, Any]:
        if not waiting.get(kind):
            raise ValueError(f"the messages have places for more {kind}s than are listed; expected as many")
        return {"type": kind, kind: waiting[kind].pop(0)}

    def is_bare(part: Any) -> bool:
        own = isinstance(part, dict) and part.get("type") in waiting
        return own and all(value is None for key, value in part.items() if key not in ("type", "fps"))

    def placed(content: Any) -> Any:
        if isinstance(content, list):
            return [part | take(part["type"]) if is_bare(part) else part for part in content]
        pieces: list[Any] = [content]
        for kind in waiting if isinstance(content, str) else ():
            split: list[Any] = []
            for piece in pieces:
                texts = piece.split(f"<{kind}>") if isinstance(piece, str) else [piece]
                split += [part for text in texts[:-1] for part in (text, take(kind))] + texts[-1:]
            pieces = split
        if len(pieces) == 1:
            return content
        return [
            {"type": "text", "text": piece} if isinstance(piece, str) else piece
            for piece in pieces
            if not isinstance(piece, str) or piece.strip()
        ]

    found = [
        message | {"content": placed(message["content"])} if isinstance(message, dict) and "content" in message
        else message
        for message in messages
    ]  # fmt: skip
    if left := {kind: len(sources) for kind, sources in waiting.items() if sources}:
        raise ValueError(f"the example lists {shown(left)} more than its messages have places for; expected as many")
    return found


def source_of(source: Any, folder: Path) -> Any:
    """The source of a medium, its relative path from where the example's file lies."""
    if isinstance(source, dict):  # as datasets keeps a file, or a sound
        samples = source.get("array")
        if isinstance(samples, (list, np.ndarray)):
            return np.asarray(samples, np.float32), source.get("sampling_rate")
        return source.get("bytes") or from_folder(source.get("path"), folder)
    if isinstance(source, list):  # a film's frames
        return [source_of(one, folder) for one in source]
    return from_folder(source, folder)
