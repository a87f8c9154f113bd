"""A safetensors file, damaged or with tensors that are not what they should be: it loads and answers, or one line."""

import json
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .folders import check_folder, model_folder
from .mutate import edited, hurt, json_edits, places, text_of, weighted
from .surface import DEMO, demo

SHARE = 8
FILES = ("model.safetensors", "model.safetensors", "drafter/model.safetensors")
TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U32", "BOOL", "F8_E4M3", "F4", "X", 3, None)
FILLS = (float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-40, -1.0)
PREFIXES = (
    "model.",
    "language_model.model.",
    "base_model.model.",
    "_orig_mod.",
    "module.",
    "model.language_model.",
    "",
)

prepare = demo


@cache
def split(name: str) -> tuple[dict[str, Any], bytes]:
    data = (DEMO / name).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@cache
def tensors(name: str) -> list[str]:
    return sorted(key for key in split(name)[0] if key != "__metadata__")


def strategy() -> st.SearchStrategy[Any]:
    number = st.integers(0, 2**16)
    fill = st.tuples(st.just("fill"), number, st.sampled_from(FILLS))
    cast = st.tuples(st.just("cast"), number, st.sampled_from(["F64", "F32", "F16", "I32", "U8", "I64"]))
    other = st.one_of(
        st.tuples(st.just("type"), number, st.sampled_from(TYPES)),
        st.tuples(
            st.just("shape"),
            number,
            st.sampled_from(
                [[], [0], [1], [-1], [2**63], [10**400], ["a"], None, [2**31, 2**31], [1, 1, 1], "swap", "flat"]
            ),
        ),
        st.tuples(st.just("name"), number, st.sampled_from([*PREFIXES, "é", "\ud800", "a" * 5000, ".."])),
        st.tuples(st.just("all"), number, st.sampled_from(PREFIXES)),
        st.tuples(st.just("drop"), number, st.none()),
        st.tuples(
            st.just("more"),
            number,
            st.sampled_from(
                ["lm_head.weight", "model.lm_head.weight", "extra", "__metadata__", "model.layers.99.x", ""]
            ),
        ),
    )
    edit = weighted((3, fill), (3, cast), (2, other))
    header = st.fixed_dictionaries({"file": st.sampled_from(FILES), "edits": st.lists(edit, min_size=1, max_size=3)})
    raw = st.fixed_dictionaries({"file": st.sampled_from(FILES), "json": json_edits.filter(bool)})
    cuts = st.one_of(
        st.tuples(st.just("cut"), places), st.tuples(st.just("drop"), places, st.integers(1, 300)),
        st.tuples(st.just("insert"), places, st.binary(max_size=8)),
        st.tuples(st.just("number"), st.just(0), st.just("<Q"),
        st.sampled_from([0, 1, 8, 2**20, 2**31, 2**63, 2**64 - 1])),
        st.tuples(st.just("set"), places, st.integers(0, 255)),
    )  # fmt: skip
    bytewise = st.fixed_dictionaries({"file": st.sampled_from(FILES), "damage": st.lists(cuts, min_size=1, max_size=3)})
    return weighted((6, header), (1, raw), (1, bytewise))


def written(value: Any) -> bytes:
    """The file that an input says."""
    name = value["file"]
    header, data = split(name)
    if "damage" in value:
        return hurt((DEMO / name).read_bytes(), value["damage"])
    if "json" in value:
        head = text_of(edited(header, value["json"]))
        return struct.pack("<Q", len(head)) + head + data
    header = json.loads(json.dumps(header))
    values = bytearray(data)
    for change, number, what in value["edits"]:
        own = tensors(name)[number % len(tensors(name))]
        entry = header.get(own)
        if entry is None:
            continue
        start, end = entry["data_offsets"]
        if change == "type":
            entry["dtype"] = what
        elif change == "shape":
            shape = entry["shape"]
            entry["shape"] = shape[::-1] if what == "swap" else [int(np.prod(shape))] if what == "flat" else what
        elif change == "fill" and entry["dtype"] in ("F32", "F16", "BF16"):
            kind = {"F32": "<f4", "F16": "<f2", "BF16": "<f4"}[entry["dtype"]]
            with np.errstate(all="ignore"):
                one = np.array(what).astype(kind).tobytes()
            one = one[2:] if entry["dtype"] == "BF16" else one
            values[start:end] = one * ((end - start) // len(one))
        elif change == "cast" and entry["dtype"] == "F32":
            kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "U8": "u1", "I64": "<i8"}[what]
            with np.errstate(all="ignore"):
                new = np.frombuffer(values[start:end], "<f4").astype(kind).tobytes()
            entry["dtype"], entry["data_offsets"] = what, [len(values), len(values) + len(new)]
            values += new
        elif change == "name":
            header[what + own if what in PREFIXES else what] = header.pop(own)
        elif change == "all":
            header = {
                key if key == "__metadata__" else what + key.removeprefix("language_model."): entry
                for key, entry in header.items()
            }
        elif change == "drop":
            del header[own]
        elif change == "more":
            header[what] = dict(entry)
    # the tensors in a file must lie behind one another without holes, or it is refused for that alone
    packed, out = bytearray(), {}
    for key, entry in header.items():
        if key == "__metadata__" or not isinstance(entry, dict):
            out[key] = entry
            continue
        start, end = entry["data_offsets"]
        out[key] = entry | {"data_offsets": [len(packed), len(packed) + end - start]}
        packed += values[start:end]
    head = text_of(out)
    return struct.pack("<Q", len(head)) + head + bytes(packed)


def check(value: Any) -> str | None:
    with model_folder({value["file"]: written(value)}) as folder:
        return check_folder(folder, zlib.crc32(repr(value).encode()) % 4 == 0)
