"""A checkpoint with an adapter in its matrices, and how much of the adapter what was written of it has kept."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_gemma4.config import Quantization
from mlx_gemma4.convert.job import Job, Outcome, Source, make_job, open_target
from mlx_gemma4.convert.recipes import Recipe
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.weights.adapter import read_adapter
from mlx_gemma4.weights.tensors import EMBEDDING, Rows, Shape, block_ranges
from mlx_gemma4.weights.whole import quantization_by_path, quantization_of

# Of matrices whose base is quantized and stays as it is elsewhere: a delta is mostly smaller than a 4-bit step.
ADAPTED_BITS = 8
PROBED_ROWS = 64  # of a matrix, to see whether two checkpoints are of one model
FARTHEST = 0.6  # what rounding to 2 bits changes, as a part; of another model it is 1 and more


@dataclass(frozen=True, eq=False)
class FusedTensor:
    """A matrix and what an adapter adds to it, by rows."""

    base: Rows
    lora_a: mx.array  # [r, columns] float32
    lora_b: mx.array  # [rows, r] float32, the scale in it
    gain: mx.array | None  # [rows], of DoRA: the rows' lengths

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> Shape:
        return self.base.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.base.dtype

    def rows(self, start: int, stop: int) -> mx.array:
        found = self.base.rows(start, stop).astype(mx.float32) + self.lora_b[start:stop] @ self.lora_a
        if self.gain is not None:
            found = found * (self.gain[start:stop] / mx.linalg.norm(found, axis=1))[:, None]
        return found


def with_adapter(source: Source, adapter: Path, model: Source) -> Source:
    """A checkpoint with the parts of an adapter of `model`, which is it or made of it, added to its matrices."""
    matrices = {
        path.removesuffix(".weight"): tensor.shape
        for path, tensor in model.tensors.items()
        if path.endswith(".weight") and len(tensor.shape) == 2 and path != f"{EMBEDDING}.weight"
    }
    parts = {path: tensor.read() for path, tensor in read_adapter(adapter, matrices).items()}
    for path, value in parts.items():
        if not mx.isfinite(value).all().item():
            raise CheckpointError(f"{path} in {adapter} is not finite; expected an adapter of sound numbers")
    fused: dict[str, Rows] = dict(source.tensors)
    for path in sorted({path.rpartition(".")[0] for path in parts}):
        factors = parts[f"{path}.lora_a"], parts[f"{path}.lora_b"], parts.get(f"{path}.gain")
        fused[f"{path}.weight"] = FusedTensor(source.tensors[f"{path}.weight"], *factors)
    return replace(source, tensors=fused)


def fused_paths(source: Source) -> list[str]:
    return [path for path, tensor in source.tensors.items() if isinstance(tensor, FusedTensor)]


def quantization_by_tensor(source: Source) -> dict[str, Quantization | None]:
    """Of every matrix of a checkpoint by its path."""
    known = quantization_by_path(source.parsed, "")
    return {
        path: quantization_of(path.removesuffix(".weight"), known) if is_packed(source, path) else None
        for path, tensor in source.tensors.items()
        if path.endswith(".weight") and len(tensor.shape) == 2
    }


def is_packed(source: Source, path: str) -> bool:
    return f"{path.removesuffix('.weight')}.scales" in source.stored


def adapted_job(fused: Source, model: Source) -> Job:
    """How to write a model whose adapted matrices are those of `fused`, which is it or its original; what is not
    adapted stays as it is.

    Of the original they get the model's own bits, of a quantized model 8.
    """
    planned: dict[str, Quantization | None] = {}
    outcome, tensors = Outcome(), dict(model.stored)
    for path, own in quantization_by_tensor(model).items():
        if not isinstance(fused.tensors[path], FusedTensor):
            outcome.used[path] = own
            continue
        module = path.removesuffix(".weight")
        for part in ("scales", "biases"):
            tensors.pop(f"{module}.{part}", None)
        tensors[path] = fused.tensors[path]
        if own is not None and fused.is_quantized:
            own = Quantization(own.group_size if own.mode == "affine" else 32, ADAPTED_BITS, "affine")
        planned[path] = own
    job = make_job(model, Recipe("full precision", None), None)
    return replace(job, tensors=tensors, planned=planned, outcome=outcome)


def check_same_model(source: Source, model: Source) -> None:
    """CheckpointError unless the source is what the model was converted from, as far as shapes and some rows say."""
    if source.is_quantized:
        raise CheckpointError(f"{source.folder} is quantized; expected the original weights, for --source")
    for path, tensor in model.tensors.items():
        if path not in source.tensors or source.tensors[path].shape != tensor.shape:
            raise CheckpointError(f"{source.folder} has no {path} as the model has it; expected its source")
    for path in list(model.tensors)[:: max(1, len(model.tensors) // 8)]:
        if len(model.tensors[path].shape) == 2:
            rows = min(PROBED_ROWS, model.tensors[path].shape[0])
            one, other = (own.tensors[path].rows(0, rows).astype(mx.float32) for own in (source, model))
            if (mx.linalg.norm(one - other) > FARTHEST * mx.linalg.norm(one)).item():
                raise CheckpointError(f"{path} is another in {source.folder} than in the model; expected its source")


def share_kept(source: Source, folder: Path) -> float:
    """How much of what an adapter changes is in a folder that was written: 1 is all, 0 nothing.

    The part along the change of what was written less the base, over all adapted matrices; rounding does not favour it.
    """
    written: Mapping[str, Rows] = open_target(folder).tensors
    along = size = 0.0
    for path in fused_paths(source):
        fused = source.tensors[path]
        assert isinstance(fused, FusedTensor)
        for start, stop in block_ranges(fused):
            base = fused.base.rows(start, stop).astype(mx.float32)
            change, found = fused.rows(start, stop) - base, written[path].rows(start, stop).astype(mx.float32) - base
            along, size = along + float((found * change).sum()), size + float(mx.square(change).sum())
    return along / size if size else 1.0
