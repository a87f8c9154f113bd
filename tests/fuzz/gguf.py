"""GGUF files, damaged: `mlx_gemma4.convert` makes a folder of them, or says in one line what is wrong."""

import re
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
from hypothesis import strategies as st

from . import commands
from .judge import Fault
from .judge import check as must
from .mutate import NUMBERS, hurt
from .surface import DEMO, run_command

SHARE = 4
HIDDEN, MLP, HEADS, VOCABULARY = 256, 768, 4, 1856  # the demo's
KINDS = library.GGMLQuantizationType

prepare = commands.prepare


def shapes() -> dict[str, tuple[int, ...]]:
    """llama.cpp's names of the demo's tensors."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(6):
        is_full = layer == 5
        head, kv = (128, 1) if is_full else (64, 2)
        own: dict[str, tuple[int, ...]] = {
            "attn_q": (HEADS * head, HIDDEN), "attn_k": (kv * head, HIDDEN), "attn_v": (kv * head, HIDDEN),
            "attn_output": (HIDDEN, HEADS * head),
            "attn_q_norm": (head,), "attn_k_norm": (head,), "attn_norm": (HIDDEN,), "post_attention_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "post_ffw_norm": (HIDDEN,), "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP),
            "layer_output_scale": (1,),
        }  # fmt: skip
        if is_full:
            del own["attn_v"]
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    return found


@cache
def whole() -> bytes:
    """What llama.cpp would write of the demo, its values at random."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "whole.gguf"
        writer = library.GGUFWriter(file, "gemma4")
        writer.add_token_list([f"piece{n}" for n in range(20)])
        writer.add_token_scores([0.5] * 20)
        writer.add_string("general.name", "toy")
        writer.add_uint32("general.file_type", 2)
        for tensor, shape in shapes().items():
            value = random.normal(0, 0.02, shape).astype(np.float32)
            if len(shape) == 2:
                writer.add_tensor(tensor, library.quants.quantize(value, KINDS.Q4_0), raw_dtype=KINDS.Q4_0)
            else:
                writer.add_tensor(tensor, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


@cache
def header_size() -> int:
    """Up to the last tensor's description, and a little of what follows."""
    data = whole()
    return data.rindex(b"layer_output_scale.weight") + 64


def strategy() -> st.SearchStrategy[Any]:
    place = st.integers(0, header_size())
    tensor = st.sampled_from(sorted(shapes()))
    edit = st.one_of(
        st.tuples(st.just("set"), place, st.integers(0, 255)),
        st.tuples(st.just("number"), place, st.sampled_from(["<I", "<Q"]), st.sampled_from(NUMBERS)),
        st.tuples(st.just("drop"), place, st.integers(1, 40)),
        st.tuples(st.just("again"), place, st.integers(1, 40)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("cut"), st.integers(0, 2**24)),
        st.tuples(st.just("set"), st.integers(0, 2**24), st.integers(0, 255)),
    )
    about = st.one_of(  # of one tensor's description: dimensions, type, offset
        st.tuples(
            tensor,
            st.sampled_from(["count", "first", "second", "kind", "offset"]),
            st.sampled_from([*NUMBERS, 12, 14, 30, 39]),
        ),
    )
    return st.fixed_dictionaries(
        {
            "damage": st.lists(edit, max_size=3),
            "tensors": st.lists(about, max_size=2),
            "data": st.sampled_from([0, 0, 0, 1, 2]),
        }
    )


def written(value: Any) -> bytes:
    data = bytearray(whole())
    for name, part, number in value["tensors"]:
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        (count,) = struct.unpack_from("<I", data, at)
        if count > 4:
            continue
        places = {
            "count": at,
            "first": at + 4,
            "second": at + 12,
            "kind": at + 4 + 8 * count,
            "offset": at + 8 + 8 * count,
        }
        form = "<I" if part in ("count", "kind") else "<Q"
        struct.pack_into(form, data, places[part], number % 256 ** struct.calcsize(form))
    if value["data"]:  # all weights infinite or not a number
        start = header_size() + 64
        data[start:] = (b"\x00\x7c" if value["data"] == 1 else b"\xff\xff") * ((len(data) - start + 1) // 2)
    return hurt(bytes(data), value["damage"])


def check(value: Any) -> str | None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "toy.gguf").write_bytes(written(value))
        (folder / "model").symlink_to(DEMO)
        words = ["--hf-path", "toy.gguf", "--media-from", "model", "--mlx-path", "out", "--no-drafter"]
        ran = run_command("convert", [word.encode() for word in words], name)
        left = sorted(path.name for path in folder.iterdir() if path.name not in ("toy.gguf", "model"))
    err = ran.err.decode(errors="replace")
    if "Traceback (most recent call last)" in err:
        last = re.findall(r'mlx_gemma4/(\S+)", line (\d+)', err)
        raise Fault(f"a traceback, at {':'.join(last[-1]) if last else '?'}", err[-3000:])
    if ran.status == 0:
        return None
    must(ran.status in (1, 2), f"convert ended with status {ran.status}", err)
    commands.check_error(err, "convert", [])
    must(not left, "files are left behind", left)
    return "refused"
