"""llama.cpp's GGUF files: which tensors there are, and their values by blocks of rows.

Of the metadata only what names the model is kept. Formats: ggml-org/ggml docs/gguf.md, ggml-quants.c.
"""

import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_gemma4.convert.lattice import Lattice, keep_lattice
from mlx_gemma4.errors import CheckpointError, shown
from mlx_gemma4.weights.tensors import Rows, Shape, read_bytes

ARCHITECTURE, MEDIA_ARCHITECTURE = "gemma4", "clip"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
Q4_0, Q8_0, Q6_K = 2, 8, 14
# Values and bytes of a block by type; the others of ggml's are not supported.
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), Q6_K: (256, 210)}
PLAIN = {0: ("<u4", mx.float32), 1: ("<u2", mx.float16), 30: ("<u2", mx.bfloat16)}
SUPPORTED = "F32, F16, BF16, Q4_0, Q8_0 and Q6_K"

# llama.cpp's names -> paths in the model; None: dropped on purpose. Norms are stored as w, as here.
NAMES = {
    "token_embd.weight": "language_model.embed_tokens.weight",
    "output.weight": "language_model.lm_head.weight",
    "output_norm.weight": "language_model.norm.weight",
    "rope_freqs.weight": None,  # follow from the config
}
LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "layer_output_scale.weight": "layer_scalar",
}
# The embedders for images and sounds, which are in a file of their own (mmproj-….gguf).
MEDIA_NAMES = {
    "v.patch_embd.weight": "vision_embedder.patch_dense.weight",
    "v.patch_embd.bias": "vision_embedder.patch_dense.bias",
    "v.patch_norm.1.weight": "vision_embedder.patch_ln1.weight",
    "v.patch_norm.1.bias": "vision_embedder.patch_ln1.bias",
    "v.patch_norm.2.weight": "vision_embedder.patch_ln2.weight",
    "v.patch_norm.2.bias": "vision_embedder.patch_ln2.bias",
    "v.patch_norm.3.weight": "vision_embedder.pos_norm.weight",
    "v.patch_norm.3.bias": "vision_embedder.pos_norm.bias",
    "v.position_embd.weight": "vision_embedder.pos_embedding",
    "mm.input_projection.weight": "embed_vision.embedding_projection.weight",
    "mm.a.input_projection.weight": "embed_audio.embedding_projection.weight",
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file."""

    name: str
    file: Path
    shape: Shape  # rows first, as elsewhere; the file has it the other way round
    kind: int
    offset: int  # of its first byte in the file
    dtype: mx.Dtype  # that its values are given in

    def rows(self, start: int, stop: int) -> mx.array:
        if self.kind in PLAIN:
            stored, dtype = PLAIN[self.kind]
            plain = mx.array(self.read(start, stop).view(stored)).view(dtype)
            return plain.reshape(-1, *self.shape[1:]).astype(self.dtype)
        blocks = self.blocks(start, stop)
        if self.kind == Q4_0:
            q, d = unpack_q4_0(blocks)
            values = q * d[:, None]
        elif self.kind == Q8_0:
            d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
            values = d * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
        else:
            values = unpack_q6_k(blocks)
        return mx.array(values.reshape(-1, *self.shape[1:])).astype(self.dtype)

    def lattice(self, start: int, stop: int, float32_scales: bool) -> Lattice:
        """The blocks of a Q4_0 tensor's rows, codes as they are."""
        return keep_lattice(*unpack_q4_0(self.blocks(start, stop)), float32_scales)

    def blocks(self, start: int, stop: int) -> np.ndarray:
        """[blocks, bytes of one] uint8."""
        return self.read(start, stop).reshape(-1, BLOCKS[self.kind][1])

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self.nbytes // self.shape[0]
        return np.asarray(read_bytes(self.file, self.offset + start * size, stop - start, size, size))

    @property
    def is_packed(self) -> bool:
        """Whether it is quantized."""
        return self.kind not in PLAIN

    @property
    def nbytes(self) -> int:
        values, size = BLOCKS[self.kind]
        return math.prod(self.shape) // values * size


@dataclass(frozen=True)
class MediaTensor:
    """A tensor that llama.cpp rearranges: it is small, and read whole."""

    stored: GGUFTensor
    shape: Shape
    path: str

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def dtype(self) -> mx.Dtype:
        return self.stored.dtype

    def rows(self, start: int, stop: int) -> mx.array:
        whole = self.stored.rows(0, self.stored.shape[0])
        if self.path.endswith("pos_embedding"):  # x and y first -> position first
            return whole.swapaxes(0, 1)[start:stop]
        pixels = self.shape[-1]
        side = math.isqrt(pixels // 3)  # colours first -> colours of a pixel together
        whole = whole.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        return whole.reshape(self.shape)[start:stop]


def pixels_by_colour(rows: mx.array) -> mx.array:
    """[..., side · side · 3], the colours of a pixel together -> one colour after the other, as llama.cpp has it."""
    side = math.isqrt(rows.shape[-1] // 3)
    return mx.unflatten(rows, -1, (side, side, 3)).moveaxis(-1, -3).flatten(-3)


def unpack_q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, 18] bytes: a float16 d, then 16 bytes of q + 8, the low halves first -> q [n, 32], d [n], both float32."""
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)[:, 0]
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return codes.astype(np.float32) - 8, d


def unpack_q6_k(blocks: np.ndarray) -> np.ndarray:
    """[n, 210] bytes: 128 of low bits, 64 of high bits, 16 int8 scales, a float16 d -> [n, 256] float32."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # [n, half, 4, 32]
    high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    d = np.ascontiguousarray(blocks[:, 208:]).view("<f2").astype(np.float32)
    return (q * (d * scales)[:, :, None]).reshape(-1, 256)


def model_path(name: str) -> str | None:
    """llama.cpp's name of a tensor -> its path in the model; None for one that is not needed."""
    if name in NAMES:
        return NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is None or match[2] not in LAYER_NAMES:
        raise CheckpointError(f"the GGUF has a tensor {name}; expected those of {ARCHITECTURE}")
    return f"language_model.layers.{match[1]}.{LAYER_NAMES[match[2]]}"


def list_text(file: Path, dtype: mx.Dtype) -> dict[str, Rows]:
    """The tensors of the text model by their path, with values in `dtype`; CheckpointError if the file holds none."""
    found: dict[str, Rows] = {}
    for tensor in list_gguf(file, ARCHITECTURE, dtype):
        if (path := model_path(tensor.name)) is not None:
            found[path] = replace(tensor, shape=(1,)) if path.endswith("layer_scalar") else tensor
    return found


def list_media(file: Path, dtype: mx.Dtype) -> dict[str, Rows]:
    """The same for the embedders for images and sounds in an mmproj file, as the model has them."""
    found: dict[str, Rows] = {}
    for tensor in list_gguf(file, MEDIA_ARCHITECTURE, dtype):
        if tensor.name not in MEDIA_NAMES:
            raise CheckpointError(f"{file} has a tensor {tensor.name}; expected the embedders of {ARCHITECTURE}")
        path = MEDIA_NAMES[tensor.name]
        if path.endswith("pos_embedding") and len(tensor.shape) == 3:
            found[path] = MediaTensor(tensor, (tensor.shape[1], tensor.shape[0], tensor.shape[2]), path)
        elif "patch_dense.weight" in path:
            found[path] = MediaTensor(tensor, (tensor.shape[0], math.prod(tensor.shape[1:])), path)
        else:
            found[path] = MediaTensor(tensor, tensor.shape, path) if "patch_ln1" in path else tensor
    return found


def has_blocks(file: Path) -> bool:
    """Whether the text model of a file is quantized, all or some of it."""
    return any(tensor.is_packed for tensor in list_gguf(file, ARCHITECTURE, mx.float32))


def list_gguf(file: Path, architecture: str, dtype: mx.Dtype) -> list[GGUFTensor]:
    try:
        with open(file, "rb") as opened:
            infos, start = read_infos(file, opened, architecture)
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError):
        raise CheckpointError(
            f"{file} is damaged or incomplete; expected a whole GGUF file, so fetch it again"
        ) from None
    found = []
    for name, shape, kind, offset in infos:
        if kind not in BLOCKS:
            raise CheckpointError(f"{name} is stored as ggml's type {kind}; supported are {SUPPORTED}")
        tensor = GGUFTensor(name, file, shape, kind, start + offset, dtype)
        if shape[-1] % BLOCKS[kind][0] or tensor.offset + tensor.nbytes > file.stat().st_size:
            raise CheckpointError(f"{file} ends before or within {name}; expected a whole GGUF file, so fetch it again")
        found.append(tensor)
    return found


def read_infos(file: Path, opened: BinaryIO, expected: str) -> tuple[list[tuple[str, Shape, int, int]], int]:
    """Name, shape, type and offset of every tensor, and where in the file offsets count from."""
    magic, version, tensors, entries = take(opened, "4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(f"{file} is no GGUF of version 2 or 3")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = take_string(opened)
        metadata[key] = take_value(opened, take(opened, "I")[0])
    architecture = metadata.get("general.architecture")
    if architecture != expected:
        raise CheckpointError(f"{file} holds the architecture {shown(architecture)}; expected {expected!r}")
    infos = []
    for _ in range(tensors):
        name = take_string(opened)
        dimensions = take(opened, "I")[0]
        shape = take(opened, f"{dimensions}Q")
        if not dimensions:
            raise struct.error(f"{name} has no dimensions")
        infos.append((name, shape[::-1], *take(opened, "IQ")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise struct.error(f"an alignment of {alignment!r}")
    return infos, -(-opened.tell() // alignment) * alignment


def take(opened: BinaryIO, layout: str) -> tuple[Any, ...]:
    size = struct.calcsize("<" + layout)
    return struct.unpack("<" + layout, opened.read(size))


def take_string(opened: BinaryIO) -> str:
    return take_bytes(opened).decode()


def take_bytes(opened: BinaryIO) -> bytes:
    (size,) = take(opened, "Q")
    found = opened.read(size)
    if len(found) < size:
        raise struct.error("the file ends here")
    return found


def take_value(opened: BinaryIO, kind: int) -> Any:
    """A metadata value; an array is passed over: they are the tokenizer's, up to half a million strings."""
    if kind == STRING:
        return take_string(opened)
    if kind != ARRAY:
        if kind not in SCALARS:
            raise struct.error(f"no such type: {kind}")
        return take(opened, SCALARS[kind])[0]
    item, count = take(opened, "IQ")
    if item in SCALARS:
        opened.seek(count * struct.calcsize(SCALARS[item]), 1)
        return None
    for _ in range(count):
        if item == STRING:
            take_bytes(opened)
        else:
            take_value(opened, item)
    return None
