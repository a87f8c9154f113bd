"""From a folder to a model: which tensors there are, whether they fit, and their values."""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlx_gemma4.config import CheckpointError, ModelConfig, read_config
from mlx_gemma4.model import Model
from mlx_gemma4.prompt import Processor, load_processor

INDEX = "model.safetensors.index.json"
# Parts a conversion may have left out; the rest of the model is then used without them.
OPTIONAL_PARTS = {"vision": ("vision_embedder.", "embed_vision."), "audio": ("embed_audio.",)}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk."""

    name: str  # as the checkpoint writes it
    file: Path
    shape: tuple[int, ...]
    nbytes: int


def module_path(name: str) -> str:
    """A checkpoint's name for a tensor or module -> its path in `Model`.

    Google writes model.language_model.X and model.vision_embedder.X, MLX conversions language_model.model.X and
    vision_embedder.X.
    """
    name = name.removeprefix("model.")
    rest = name.removeprefix("language_model.model.")
    return name if rest == name else f"language_model.{rest}"


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their path in the model, from the files' headers alone."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118: not a dict
                    view = opened.get_slice(name)
                    shape = tuple(view.get_shape())
                    size = ITEM_BYTES.get(view.get_dtype(), 1)
                    for side in shape:
                        size *= side
                    found[module_path(name)] = Tensor(name, file, shape, size)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or incomplete ({error}); expected a whole safetensors file") from None
    return found


def weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} has no model*.safetensors; expected a model folder")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError):
        raise CheckpointError(f"{index} is damaged; expected a JSON object with a weight_map") from None
    if missing := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(f"{folder} lacks {missing[0]}, {len(missing)} of {len(names)} weight files missing")
    return [folder / name for name in names]


def build_model(config: ModelConfig, tensors: dict[str, Tensor]) -> Model:
    """An empty model, quantized where the tensors are."""
    model = Model(config)
    overrides = {module_path(path): own for path, own in config.quantization_overrides.items()}

    def quantization(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        if f"{path}.scales" not in tensors:
            return False
        own = overrides.get(path, config.quantization)
        if own is None:
            raise CheckpointError(f"{path} is quantized, but config.json has no quantization")
        return {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}

    try:
        nn.quantize(model, class_predicate=quantization)
    except ValueError as error:
        raise CheckpointError(f"config.json has a quantization that MLX cannot do: {error}") from None
    return model


def check_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """CheckpointError for a tensor that is missing or of another shape; a warning for tensors without a place."""
    expected = {path: array.shape for path, array in tree_flatten(model.parameters())}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}")
    for path, shape in expected.items():
        if tensors[path].shape != shape:
            raise CheckpointError(f"{tensors[path].name} has shape {list(tensors[path].shape)}; expected {list(shape)}")
    if unknown := sorted(tensors[path].name for path in tensors.keys() - expected.keys()):
        warnings.warn(f"the model has no place for {len(unknown)} tensors, left out: {', '.join(unknown)}", stacklevel=2)


def check_memory(needed: int) -> None:
    """MemoryError if the weights alone are more than the machine lets a model hold."""
    room = memory_limit()
    if needed > room:
        raise MemoryError(
            f"the weights need {needed / 1e9:.1f} GB and this machine has {room / 1e9:.1f} GB for them; "
            "expected a smaller model or fewer bits a weight"
        )


def memory_limit() -> int:
    """Bytes a model may hold here: Metal's working set, a GPU's memory, or the machine's."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_values(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[int]:
    """Read the tensors one by one, so that memory peaks at the weights; yields the bytes of each."""
    places = {path for path, _ in tree_flatten(model.parameters())}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        try:
            arrays = mx.load(str(file))
        except RuntimeError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        values = {path: arrays.pop(tensors[path].name) for path in places & tensors.keys() if tensors[path].file == file}
        model.load_weights(list(values.items()), strict=False)
        del arrays
        while values:
            path, value = values.popitem()
            mx.eval(value)
            yield tensors[path].nbytes


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The model folder on this machine, downloaded if it is a hub id. CheckpointError if there is none."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; expected a model folder or a hub id")
    text = str(path_or_hub_id)
    if text.count("/") != 1 or text.startswith(("/", ".", "~")) or text.endswith("/"):
        raise CheckpointError(f"{text!r} is no folder; expected a model folder or a hub id such as owner/name")
    from mlx_gemma4.hub import download  # here: a folder needs no HTTP client

    return download(text)


def load(path_or_hub_id: str | Path, drafter: str | Path | None = "auto") -> tuple[Model, Processor]:
    """A model and its processor, from a folder or a hub id.

    drafter: "auto" or None; drafting is not there yet, and anything else is refused.
    CheckpointError (a ValueError) for a checkpoint that is missing, damaged or of another kind, MemoryError if its
    weights cannot fit here, ConnectionError if the hub cannot be reached.
    """
    check_drafter(drafter)
    checkpoint = open_checkpoint(find_folder(path_or_hub_id))
    processor = load_processor(checkpoint.folder, checkpoint.config)
    for _ in load_values(checkpoint.model, checkpoint.tensors):
        pass
    return checkpoint.model, processor


def check_drafter(drafter: str | Path | None) -> None:
    if drafter not in ("auto", None):
        raise ValueError(f"drafter is {str(drafter)!r}; expected 'auto' or none, for drafting is not there yet")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that has been looked through: it is whole and fits, and nothing is loaded yet."""

    folder: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    model: Model  # shapes only

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Look through a model folder. CheckpointError if anything is missing or wrong, MemoryError if it cannot fit."""
    config = read_config(folder)
    tensors = list_tensors(folder)
    config = without_missing_parts(config, tensors)
    model = build_model(config, tensors)
    check_tensors(model, tensors)
    checkpoint = Checkpoint(folder, config, tensors, model)
    check_memory(checkpoint.nbytes)
    return checkpoint


def without_missing_parts(config: ModelConfig, tensors: dict[str, Tensor]) -> ModelConfig:
    """The configuration without the modalities of which the checkpoint has no tensor (text-only conversions)."""
    found = {part: any(path.startswith(own) for path in tensors) for part, own in OPTIONAL_PARTS.items()}
    return replace(
        config, vision=config.vision if found["vision"] else None, audio=config.audio if found["audio"] else None
    )
