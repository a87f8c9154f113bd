"""Tensors by blocks of rows: what is stored packed read as what it stands for, all written as shards with an index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_gemma4.config import Quantization
from mlx_gemma4.weights.tensors import DTYPE_NAMES, INDEX, Shape, Tensor, nbytes

SHARD_BYTES = 2**30  # a file's size, if no single tensor is larger
HEADER_BYTES = 2**17  # kept free at a shard's beginning, for what it holds is known at its end: about 800 names


@dataclass(frozen=True)
class PackedTensor:
    """A quantized tensor, whose rows are read as what they stand for, float32: whoever writes them rounds them once."""

    name: str
    quantization: Quantization
    weight: Tensor
    scales: Tensor
    biases: Tensor | None

    @property
    def dtype(self) -> mx.Dtype:
        return mx.float32

    @property
    def shape(self) -> Shape:
        return (self.weight.shape[0], self.weight.shape[1] * 32 // self.quantization.bits)

    def rows(self, start: int, stop: int) -> mx.array:
        own = self.quantization
        scales = self.scales.rows(start, stop)
        biases = None if self.biases is None else self.biases.rows(start, stop)
        if biases is not None:  # in float32, or scale · q and the sum are both rounded
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = self.weight.rows(start, stop)
        return mx.dequantize(weight, scales, biases, own.group_size, own.bits, own.mode).astype(mx.float32)


class ShardWriter:
    """Writes tensors into `model-….safetensors` of at most SHARD_BYTES and, when closed, their index.

    Blocks go to their places in the file as they come, so that no more than one is in memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards: list[dict[str, Any]] = []  # each one's header
        self.file: BinaryIO | None = None
        self.end = 0  # of the data in the open shard
        self.group: dict[str, int] = {}  # where the next block of each tensor of the open group goes
        self.nbytes = 0  # of all tensors

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.file is not None:
            self.file.close()

    def begin(self, group: Mapping[str, tuple[Shape, mx.Dtype]]) -> None:
        """Make room for the tensors of one module, which stay in one file."""
        size = sum(nbytes(shape, dtype) for shape, dtype in group.values())
        if self.file is None or (self.end and not self.has_room(group, size)):
            self.open_shard()
        header, self.group = self.shards[-1], {}
        for name, (shape, dtype) in group.items():
            stop = self.end + nbytes(shape, dtype)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [self.end, stop]}
            self.group[name] = self.end
            self.end = stop
        self.nbytes += size

    def has_room(self, group: Mapping[str, tuple[Shape, mx.Dtype]], size: int) -> bool:
        entries = len(self.shards[-1]) + len(group)
        names = sum(map(len, [*self.shards[-1], *group]))
        return HEADER_BYTES + self.end + size <= SHARD_BYTES and names + 100 * entries < HEADER_BYTES

    def write(self, blocks: Mapping[str, mx.array]) -> None:
        """The next rows of the open group's tensors."""
        assert self.file is not None
        for name, block in blocks.items():
            self.file.seek(HEADER_BYTES + self.group[name])
            self.file.write(np.asarray(mx.contiguous(block).view(mx.uint8)).data)
            self.group[name] += block.nbytes

    def drop(self) -> None:
        """Take the open group back."""
        header = self.shards[-1]
        begins = [header.pop(name)["data_offsets"] for name in self.group]
        self.end = min(start for start, _ in begins)
        self.nbytes -= sum(stop - start for start, stop in begins)

    def open_shard(self) -> None:
        self.close_shard()
        self.shards.append({})
        self.file, self.end = open(self.part(len(self.shards)), "wb"), 0  # noqa: SIM115 (open for long)

    def part(self, number: int) -> Path:
        return self.folder / f"shard-{number}.part"

    def close_shard(self) -> None:
        if self.file is None:
            return
        header = json.dumps({"__metadata__": {"format": "mlx"}} | self.shards[-1], separators=(",", ":")).encode()
        self.file.truncate(HEADER_BYTES + self.end)
        self.file.seek(0)
        size = HEADER_BYTES - 8
        self.file.write(size.to_bytes(8, "little") + header.ljust(size))
        self.file.close()
        self.file = None

    def close(self) -> None:
        """Write the open shard's header, name the files and write their index."""
        self.close_shard()
        count = len(self.shards)
        places: dict[str, str] = {}
        for number, header in enumerate(self.shards, 1):
            name = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            self.part(number).rename(self.folder / name)
            places |= dict.fromkeys(header, name)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(places.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=4), encoding="utf-8")
