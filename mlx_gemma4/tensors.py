"""Tensors in safetensors files: what the headers say of them, and their values, whole or by blocks of rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_gemma4.config import read_json
from mlx_gemma4.errors import CheckpointError

INDEX = "model.safetensors.index.json"

Shape = tuple[int, ...]
DTYPES: dict[str, mx.Dtype] = {  # by the name that safetensors has for them
    "F64": mx.float64,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "U64": mx.uint64,
    "U32": mx.uint32,
    "U16": mx.uint16,
    "U8": mx.uint8,
    "BOOL": mx.bool_,
    "C64": mx.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def element_count(shape: Shape) -> int:
    return prod(shape)


def nbytes(shape: Shape, dtype: mx.Dtype) -> int:
    return element_count(shape) * dtype.size


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk, or on the hub, where it cannot be read."""

    name: str  # as the checkpoint writes it
    file: Path
    shape: Shape
    dtype: mx.Dtype
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.dtype)

    def read(self) -> mx.array:
        """The whole tensor."""
        return self.rows(0, self.shape[0]) if self.shape else self.values(0, 1, ())

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows start … stop: blocks along the first dimension."""
        return self.values(start, stop, (stop - start, *self.shape[1:]))

    def values(self, start: int, stop: int, shape: Shape) -> mx.array:
        width = nbytes(self.shape[1:], self.dtype)
        found = read_bytes(self.file, self.offset + start * width, stop - start, width).view(self.dtype).reshape(shape)
        mx.eval(found)  # a view, but another thread could not make it
        return found


def read_bytes(file: Path, offset: int, rows: int, width: int) -> mx.array:
    """[rows, width] uint8, read into MLX's own memory: a mapped file's pages would count as the process's."""
    found = mx.zeros((rows, width), mx.uint8)
    mx.eval(found)
    with open(file, "rb") as opened:
        opened.seek(offset)
        if opened.readinto(np.asarray(found).data) < found.nbytes:  # a view
            expected = offset + found.nbytes
            raise CheckpointError(f"{file} ends early; expected {expected} bytes at least, so fetch it again")
    return found


# --- names -------------------------------------------------------------------------------------

# Google writes model.language_model.X and model.vision_embedder.X, MLX conversions language_model.model.X and
# vision_embedder.X. A path in `Model` is language_model.X and vision_embedder.X.
TEXT = "language_model."


def module_path(name: str) -> str:
    """A checkpoint's name for a tensor or module -> its path in `Model`."""
    name = name.removeprefix("model.")
    rest = name.removeprefix(f"{TEXT}model.")
    return name if rest == name else TEXT + rest


def conversion_name(path: str) -> str:
    """A path in `Model` -> the name that MLX conversions give it; `module_path` goes back."""
    rest = path.removeprefix(TEXT)
    return path if rest == path else f"{TEXT}model.{rest}"


# --- files -------------------------------------------------------------------------------------


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their path in the model, from the files' headers alone."""
    return {module_path(tensor.name): tensor for file in weight_files(folder) for tensor in tensors_in(file)}


def tensors_in(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file; CheckpointError if it is damaged."""
    try:
        with safe_open(file, framework="numpy"):  # checks the whole header, and the file's size by it
            pass
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is damaged or incomplete ({error}); expected a whole safetensors file, so fetch it again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    return from_header(file, header, 8 + size)


def from_header(file: Path, header: Mapping[str, Mapping[str, Any]], start: int) -> list[Tensor]:
    """The tensors of which a safetensors header tells; start: where in the file its offsets count from."""
    found = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{name} is stored as {entry['dtype']}; supported are {', '.join(DTYPES)}")
        dtype, offset = DTYPES[entry["dtype"]], start + entry["data_offsets"][0]
        found.append(Tensor(name, file, tuple(entry["shape"]), dtype, offset))
    return found


def weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} has no model*.safetensors; expected a model folder")
        return files
    files = indexed_files(folder)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing[0]}, {len(missing)} of {len(files)} weight files missing")
    return files


def indexed_files(folder: Path) -> list[Path]:
    """The weight files that a folder's index names, whether they are there or not."""
    index = folder / INDEX
    try:
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} has no weight_map; expected the file of each tensor under this key") from None
