"""Tensors in safetensors files: what the headers say of them, and their values, whole or by blocks of rows."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_gemma4.config import COMPUTING, check_no_pointer, of_gguf, read_json
from mlx_gemma4.errors import CheckpointError, one_line, shown

INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 2**25  # of rows read at once

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
FLOATING = tuple(COMPUTING.values())  # the types that a checkpoint's floating numbers may have


class Rows(Protocol):
    """A tensor that is read by blocks of its first dimension."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    def rows(self, start: int, stop: int) -> mx.array: ...


def nbytes(shape: Shape, dtype: mx.Dtype) -> int:
    return prod(shape) * dtype.size


def block_ranges(tensor: Rows) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks that a tensor is read by."""
    rows = prod(tensor.shape[:1])  # of a single number 1
    step = max(1, BLOCK_BYTES * rows // max(1, nbytes(tensor.shape, tensor.dtype)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def have_same_values(one: Rows, other: Rows) -> bool:
    """Whether two tensors are equal, whatever types they are stored in."""
    return one.shape == other.shape and all(
        mx.array_equal(one.rows(start, stop), other.rows(start, stop)) for start, stop in block_ranges(one)
    )


Own = TypeVar("Own", bound="Tensor")


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk, or on the hub, where it cannot be read."""

    name: str  # as the checkpoint writes it
    file: Path
    shape: Shape
    dtype: mx.Dtype
    offset: int  # of its first byte in the file
    # bytes from row to row in the file, of a part of the columns; None: rows lie together
    pitch: int | None = field(default=None, kw_only=True)

    def part_of_rows(self: Own, start: int, stop: int) -> Own:
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * self.row_bytes)

    def part_of_columns(self: Own, start: int, stop: int) -> Own:
        """Of a matrix."""
        offset = self.offset + start * self.dtype.size
        return replace(self, shape=(self.shape[0], stop - start), offset=offset, pitch=self.row_bytes)

    @property
    def row_bytes(self) -> int:
        return nbytes(self.shape[1:], self.dtype)

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
        width = self.row_bytes
        pitch = width if self.pitch is None else self.pitch
        found = read_bytes(self.file, self.offset + start * pitch, stop - start, width, pitch)
        found = found.view(self.dtype).reshape(shape)
        mx.eval(found)  # a view, but another thread could not make it
        return found


def read_bytes(file: Path, offset: int, rows: int, width: int, pitch: int) -> mx.array:
    """[rows, width] uint8, read into MLX's own memory: a mapped file's pages would count as the process's.

    pitch: from the beginning of a row to that of the next.
    """
    found = mx.zeros((rows, width), mx.uint8)
    mx.eval(found)
    views = [np.asarray(found)] if width == pitch else np.asarray(found)
    with open(file, "rb", buffering=0) as opened:
        for number, view in enumerate(views):
            opened.seek(offset + number * pitch)
            if opened.readinto(view.data) < view.nbytes:
                expected = offset + (rows - 1) * pitch + width
                raise CheckpointError(f"{file} ends early; expected {expected} bytes at least, so fetch it again")
    return found


# --- names -------------------------------------------------------------------------------------

# Google writes model.language_model.X and model.vision_embedder.X, MLX conversions language_model.model.X and
# vision_embedder.X. A path in `Model` is language_model.X and vision_embedder.X. A head of its own stands outside of
# the decoder in both: lm_head, language_model.lm_head.
TEXT = "language_model."
HEAD, EMBEDDING = "language_model.lm_head", "language_model.embed_tokens"


def module_path(name: str) -> str:
    """A checkpoint's name for a tensor or module -> its path in `Model`."""
    name = name.removeprefix("model.")
    if re.match(r"lm_head(\.|$)", name):
        return TEXT + name
    rest = name.removeprefix(f"{TEXT}model.")
    return name if rest == name else TEXT + rest


def conversion_name(path: str) -> str:
    """A path in `Model` -> the name that MLX conversions give it; `module_path` goes back."""
    rest = path.removeprefix(TEXT)
    return path if rest == path or path.startswith(HEAD) else f"{TEXT}model.{rest}"


# --- files -------------------------------------------------------------------------------------


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their path in the model, from the files' headers alone."""
    return by_path(tensor for file in weight_files(folder) for tensor in tensors_in(file))


def by_path(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """CheckpointError if a path has two tensors, for then nobody knows which is meant."""
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        other = found.setdefault(module_path(tensor.name), tensor)
        if other.file != tensor.file:
            raise CheckpointError(
                f"{shown(tensor.name)} is in {other.file.name} and in {tensor.file}; expected one set of weights"
            )
        if other is not tensor:
            raise CheckpointError(
                f"{tensor.file} has {shown(other.name)} and {shown(tensor.name)}, names of one tensor; expected one"
            )
    return found


def tensors_in(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file; CheckpointError if it is damaged."""
    try:
        with safe_open(file, framework="numpy"):  # checks the whole header, and the file's size by it
            pass
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except SafetensorError as error:
        with open(file, "rb") as opened:
            check_no_pointer(file, opened.read(100))
        raise CheckpointError(
            f"{file} is damaged or incomplete ({one_line(error)}); expected a whole safetensors file, so fetch it again"
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
            raise CheckpointError(
                f"{file}: {shown(name)} is stored as {shown(entry['dtype'])}, which MLX does not have; expected one "
                f"of {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        found.append(Tensor(name, file, tuple(entry["shape"]), DTYPES[entry["dtype"]], start + begin))
        if found[-1].nbytes != end - begin:
            raise CheckpointError(
                f"{file}: {shown(name)} has {end - begin} bytes; expected {found[-1].nbytes} for its shape"
            )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's one set of weights; CheckpointError if there is none, a part of one, or two."""
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} has no model*.safetensors; expected a model folder{of_gguf(folder)}")
        check_one_set(folder, [file.name for file in files])
        return files
    files = indexed_files(folder)
    check_there(folder, [file.relative_to(folder).as_posix() for file in files])
    return files


SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def check_one_set(folder: Path, names: list[str]) -> None:
    """Whether the files of a folder without an index belong together: all shards of one count, or none a shard."""
    shards = [match for match in map(SHARD.fullmatch, names) if match]
    sets = {(match[1], match[3]): match[0] for match in shards}
    others = [name for name in names if not SHARD.fullmatch(name)]
    if len(sets) > 1 or (sets and "model.safetensors" in others):
        first, second = [*sets.values(), *others][:2]
        raise CheckpointError(
            f"{folder} has two sets of weights and no {INDEX}: {first} and {second}; expected one of them"
        )
    for stem, count in sets:
        check_there(folder, [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)])


def check_there(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing[0]}, {len(missing)} of {len(names)} weight files missing")


def indexed_files(folder: Path) -> list[Path]:
    """The weight files that a folder's index names, whether they are there or not."""
    index = folder / INDEX
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} has no weight_map; expected the file of each tensor under this key") from None
    for name in names:
        if not isinstance(name, str) or not is_inside(name):
            raise CheckpointError(f"{index} names {shown(name)}; expected a file in its folder")
    return [folder / name for name in sorted(names)]


def is_inside(name: str) -> bool:
    """Whether a name is that of a file in a folder or its subfolders, whatever links there are."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and len(name.encode(errors="replace")) < 256
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts
