"""Damage: to bytes, and to what JSON holds."""

import copy
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

HEADER = 512  # bytes in which most of a format is decided
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 255, 256, 257, 32767, 32768, 65535, 65536, 89_000_000, 2**24 - 1, 2**31 - 1,
    2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """One of the strategies, each as often as its number says (one_of takes what stands twice for once)."""
    numbers = [index for index, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(numbers).flatmap(lambda index: choices[index][1])


# --- bytes -------------------------------------------------------------------------------------

places = st.one_of(st.integers(0, HEADER), st.integers(0, 2**24))
damage = st.one_of(
    st.tuples(st.just("set"), places, st.integers(0, 255)),
    st.tuples(st.just("flip"), places, st.integers(0, 7)),
    st.tuples(
        st.just("number"), places, st.sampled_from(["<H", ">H", "<I", ">I", "<Q", ">Q"]), st.sampled_from(NUMBERS)
    ),
    st.tuples(st.just("cut"), places),
    st.tuples(st.just("drop"), places, st.integers(1, 300)),
    st.tuples(st.just("again"), places, st.integers(1, 300)),
    st.tuples(st.just("insert"), places, st.binary(max_size=16)),
    st.tuples(st.just("zero"), places, st.integers(1, 300)),
)


def damaged(seeds: Sequence[bytes], most: int = 6) -> st.SearchStrategy[bytes]:
    """One of the seeds, damaged in a few places, its checksums sometimes made right again."""
    numbers = st.integers(0, len(seeds) - 1)
    return st.builds(
        lambda number, edits, repaired: repair(hurt(seeds[number], edits)) if repaired else hurt(seeds[number], edits),
        numbers,
        st.lists(damage, max_size=most),
        st.booleans(),
    )


def hurt(data: bytes, edits: Sequence[tuple[Any, ...]]) -> bytes:
    for name, place, *more in edits:
        at = place % (len(data) + 1)
        before, after = data[:at], data[at:]
        if name == "set":
            data = before + bytes([more[0]]) + after[1:]
        elif name == "flip":
            data = before + bytes([after[0] ^ 1 << more[0]]) + after[1:] if after else data
        elif name == "number":
            form, value = more
            number = struct.pack(form, value % 256 ** struct.calcsize(form))
            data = before + number + after[len(number) :]
        elif name == "cut":
            data = before
        elif name == "drop":
            data = before + after[more[0] :]
        elif name == "again":
            data = before + after[: more[0]] + after
        elif name == "insert":
            data = before + more[0] + after
        else:
            data = before + bytes(len(after[: more[0]])) + after[more[0] :]
    return data


def repair(data: bytes) -> bytes:
    """Right checksums, without which a PNG or an Ogg is refused before anything else is looked at."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return png_repaired(data)
    if data[:4] == b"OggS":
        return ogg_repaired(data)
    return data


def png_repaired(data: bytes) -> bytes:
    whole, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            break
        whole += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return whole + data[at:]


def ogg_table() -> list[int]:
    table = []
    for crc in range(256):
        crc <<= 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
        table.append(crc & 0xFFFFFFFF)
    return table


OGG_TABLE = ogg_table()


def ogg_crc(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc = (crc << 8 & 0xFFFFFFFF) ^ OGG_TABLE[crc >> 24 ^ byte]
    return crc


def ogg_repaired(data: bytes) -> bytes:
    starts = [at for at in range(len(data)) if data.startswith(b"OggS", at)] + [len(data)]
    pages = [data[start:end] for start, end in pairwise(starts)]
    whole = [page[:22] + bytes(4) + page[26:] for page in pages if len(page) >= 27]
    return b"".join(page[:22] + struct.pack("<I", ogg_crc(page)) + page[26:] for page in whole)


# --- JSON --------------------------------------------------------------------------------------

RAW = "\ue123raw:"  # what follows is written as it is: numbers that Python's writer refuses
LEAVES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 5, 64, 70, 1.5, -0.5, 0.0, 1e-320, 1e308, float("inf"), float("nan"), 2**31 - 1,
    2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, RAW + "9" * 5000, RAW + "[" * 3000 + "]" * 3000, "", "a", " ", "1",
    "true", "bfloat16", "<bos>", "<|turn>", "../../etc/passwd", "/etc/passwd", "a\x00b", "\ud800", "é\u202e\n\x1b[31m",
    "x" * 10000, [], {}, [[]], [None], [0], [-1], [1, 106], {"": ""}, {"a": {"a": {"a": 1}}}, [1] * 3000,
)  # fmt: skip
json_edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "replace", "delete", "swap", "rename", "wrap", "double"]),
        st.integers(0, 2**16),
        st.sampled_from(LEAVES),
        st.integers(0, 2**16),
    ),
    max_size=3,
)


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from spots(entry)


def edited(document: Any, edits: Sequence[Any]) -> Any:
    """A copy of a JSON value with some of its places changed."""
    document = json.loads(json.dumps(document))
    for name, number, leaf, other in edits:
        found = list(spots(document))
        if not found:
            break
        holder, key = found[number % len(found)]
        if name == "replace":
            holder[key] = copy.deepcopy(leaf)
        elif name == "delete":
            del holder[key]
        elif name == "swap":
            second, second_key = found[other % len(found)]
            holder[key] = json.loads(json.dumps(second[second_key]))
        elif name == "wrap":
            holder[key] = [holder[key]]
        elif name == "rename" and isinstance(holder, dict):
            holder[leaf if isinstance(leaf, str) else f"{key}_"] = holder.pop(key)
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[f"{key}."] = holder[key]
    return document


def text_of(document: Any) -> bytes:
    text = json.dumps(document, indent=1)
    marker = json.dumps(RAW)[1:-1]
    while marker in text:
        start = text.index('"' + marker)
        end = text.index('"', start + 1)
        text = text[:start] + text[start + 1 + len(marker) : end] + text[end + 1 :]
    return text.encode()
