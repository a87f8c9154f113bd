"""From a folder to a model: which tensors there are, whether they fit, and their values."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlx_gemma4.config import CheckpointError, ModelConfig, Quantization, read_config, read_json
from mlx_gemma4.drafter import Drafter, DrafterConfig, check_fit, read_drafter_config
from mlx_gemma4.memory import Footprint, check_memory, footprint
from mlx_gemma4.model import Model
from mlx_gemma4.processor import Processor, load_processor

logger = logging.getLogger("mlx_gemma4")

DRAFTER_BITS, DRAFTER_GROUP_SIZE = 4, 64  # of a partner in full precision: its acceptance stays, its cost falls
DEFAULT_MODEL = "mlx-community/gemma-4-12B-it-4bit"
DEMO = Path(__file__).with_name("demo")
INDEX = "model.safetensors.index.json"
# Parts a conversion may have left out; the rest of the model is then used without them.
OPTIONAL_PARTS = {"vision": ("vision_embedder.", "embed_vision."), "audio": ("embed_audio.",)}
NAMED = 20  # tensors named in one warning
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
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    view = opened.get_slice(name)
                    shape = tuple(view.get_shape())
                    size = ITEM_BYTES.get(view.get_dtype(), 1)
                    for side in shape:
                        size *= side
                    found[module_path(name)] = Tensor(name, file, shape, size)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is damaged or incomplete ({error}); expected a whole safetensors file, so fetch it again"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
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


def quantize_empty(model: nn.Module, tensors: dict[str, Tensor], quantization: Mapping[str, Quantization]) -> None:
    """Give an empty model quantized modules where the tensors are.

    quantization: by the beginning of a module's path, the longest one counts.
    """

    def parameters_of(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        if f"{path}.scales" not in tensors:
            return False
        prefix = max((prefix for prefix in quantization if path.startswith(prefix)), key=len, default=None)
        if prefix is None:
            raise CheckpointError(f"{path} is quantized, but config.json has no quantization")
        own = quantization[prefix]
        return {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}

    try:
        nn.quantize(model, class_predicate=parameters_of)
    except ValueError as error:
        raise CheckpointError(f"config.json has a quantization that MLX cannot do: {error}") from None


def quantization_by_path(config: ModelConfig | DrafterConfig, root: str) -> dict[str, Quantization]:
    default = {root: config.quantization} if config.quantization else {}
    return default | {root + module_path(path): own for path, own in config.quantization_overrides.items()}


def check_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """CheckpointError for a tensor that is missing or of another shape; a warning for tensors without a place."""
    expected = {path: array.shape for path, array in parameters(model).items()}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}")
    for path, shape in expected.items():
        if tensors[path].shape != shape:
            raise CheckpointError(f"{tensors[path].name} has shape {list(tensors[path].shape)}; expected {list(shape)}")
    if unknown := sorted(tensors[path].name for path in tensors.keys() - expected.keys()):
        names = ", ".join(unknown[:NAMED]) + (f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else "")
        logger.warning("the model has no place for %d tensors, left out: %s", len(unknown), names)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """All parameters by their path."""
    found: dict[str, mx.array] = {}
    tree_flatten(model.parameters(), destination=found)
    return found


def find_folder(path_or_hub_id: str | Path, patterns: Sequence[str] | None = None) -> Path:
    """The model folder on this machine, downloaded if it is a hub id. CheckpointError if there is none.

    "demo" is the small model inside this package (a folder of that name is ./demo). patterns: of a hub id's files, the
    names of those that are wanted; None: all that this package reads.
    """
    text = str(path_or_hub_id)
    if text == "demo":
        return DEMO
    try:
        folder = Path(path_or_hub_id).expanduser()
        if text and folder.is_dir():
            return folder
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; expected a model folder or a hub id")
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us, a `~user` who does not exist
        raise CheckpointError(f"{text!r} cannot be read: {error}; expected a model folder or a hub id") from None
    if text.count("/") != 1 or text.startswith(("/", ".", "~")) or text.endswith("/"):
        raise CheckpointError(f"{text!r} is no folder; expected a model folder or a hub id such as owner/name")
    from mlx_gemma4.hub import PATTERNS, download  # here: a folder needs no HTTP client

    try:
        return download(text, patterns or PATTERNS)
    except ConnectionError as error:
        if text != DEFAULT_MODEL:
            raise
        raise ConnectionError(f"{error}; the small model in this package needs no network: --model demo") from None


@dataclass(frozen=True)
class DrafterChoice:
    folder: Path
    name: str
    quantize: bool  # to 4 bits if it is not quantized yet


def find_drafter(
    path_or_hub_id: str | Path, folder: Path, drafter: str | Path | None, patterns: Sequence[str] | None = None
) -> DrafterChoice | None:
    """The drafter to use with the model in `folder`, which was asked for as `path_or_hub_id`.

    "auto": its subfolder `drafter/`, else, for a hub id, the published partner; None where there is none. patterns: as
    in `find_folder`.
    """
    if drafter is None:
        return None
    if drafter != "auto":
        return DrafterChoice(find_folder(drafter, patterns), str(drafter), quantize=False)
    own = folder / "drafter"
    if own.is_dir():
        return DrafterChoice(own, str(own), quantize=False)
    if folder == Path(path_or_hub_id).expanduser():
        return None
    from mlx_gemma4.hub import PATTERNS, download_partner

    partner = download_partner(str(path_or_hub_id), patterns or PATTERNS)
    return DrafterChoice(*partner, quantize=True) if partner else None


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that has been looked through: it is whole and fits, and nothing is loaded yet."""

    folder: Path
    config: ModelConfig
    tensors: dict[str, Tensor]  # by path; the drafter's begin with `drafter.`
    model: Model  # shapes only
    drafter: DrafterChoice | None
    footprint: Footprint  # once it is loaded

    @property
    def nbytes(self) -> int:
        """To read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(folder: Path, drafter: DrafterChoice | None) -> Checkpoint:
    """Look through a model folder. CheckpointError if anything is missing or wrong, MemoryError if it cannot fit."""
    checkpoint = look_through(folder, drafter, list_tensors)
    check_memory(checkpoint.footprint)
    return checkpoint


def look_through(
    folder: Path, drafter: DrafterChoice | None, tensors_of: Callable[[Path], dict[str, Tensor]]
) -> Checkpoint:
    """A checkpoint of any size; CheckpointError as above. tensors_of: lists a folder's tensors, as `list_tensors`."""
    config = read_config(folder)
    tensors = tensors_of(folder)
    config = without_missing_parts(config, tensors)
    model = Model(config)
    quantization = quantization_by_path(config, "")
    if drafter is not None:
        own = read_drafter_config(drafter.folder)
        check_fit(own, config.text)
        model.drafter = Drafter(own)
        tensors |= {f"drafter.{path}": tensor for path, tensor in tensors_of(drafter.folder).items()}
        quantization |= quantization_by_path(own, "drafter.")
    quantize_empty(model, tensors, quantization)
    check_tensors(model, tensors)
    found = footprint(config.text, {path: tensors[path] for path in parameters(model)})
    if drafter is not None and model.drafter is not None and will_quantize(model.drafter, drafter):
        found = replace(found, drafter=quantized_nbytes(Drafter(own)))
    return Checkpoint(folder, config, tensors, model, drafter, found)


def without_missing_parts(config: ModelConfig, tensors: dict[str, Tensor]) -> ModelConfig:
    """The configuration without the modalities of which the checkpoint has no tensor (text-only conversions)."""
    found = {part: any(path.startswith(own) for path in tensors) for part, own in OPTIONAL_PARTS.items()}
    return replace(
        config, vision=config.vision if found["vision"] else None, audio=config.audio if found["audio"] else None
    )


def load_values(checkpoint: Checkpoint) -> Iterator[int]:
    """Read the tensors one by one, so that memory peaks at the weights; yields the bytes of each."""
    model, tensors = checkpoint.model, checkpoint.tensors
    places = parameters(model).keys()
    for file in sorted({tensor.file for tensor in tensors.values()}):
        try:
            arrays = cast(dict[str, mx.array], mx.load(str(file)))
        except RuntimeError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        values = {
            path: arrays.pop(tensors[path].name) for path in places & tensors.keys() if tensors[path].file == file
        }
        model.load_weights(list(values.items()), strict=False)
        del arrays
        while values:
            path, value = values.popitem()
            mx.eval(value)
            yield tensors[path].nbytes
    if model.drafter is not None and checkpoint.drafter is not None:
        quantize_drafter(model.drafter, checkpoint.drafter)


def quantize_drafter(drafter: Drafter, choice: DrafterChoice) -> None:
    """Quantize a partner that was found in full precision, and say which drafter it is."""
    note = ""
    if will_quantize(drafter, choice):
        nn.quantize(drafter, DRAFTER_GROUP_SIZE, DRAFTER_BITS)
        for array in parameters(drafter).values():  # one by one, as they are loaded
            mx.eval(array)
        note = f", quantized to {DRAFTER_BITS} bits"
    logger.info("drafter: %s%s", choice.name, note)


def will_quantize(drafter: Drafter, choice: DrafterChoice) -> bool:
    return choice.quantize and isinstance(drafter.embed_tokens, nn.Embedding)


def quantized_nbytes(empty: Drafter) -> int:
    """What a partner in bfloat16, as they are published, comes to."""
    empty.set_dtype(mx.bfloat16)
    nn.quantize(empty, DRAFTER_GROUP_SIZE, DRAFTER_BITS)
    return sum(array.nbytes for array in parameters(empty).values())


def load(path_or_hub_id: str | Path, drafter: str | Path | None = "auto") -> tuple[Model, Processor]:
    """A model and its processor, from a folder or a hub id.

    drafter: a folder or hub id; None: none; "auto": the model folder's subfolder `drafter/`, else the published
    partner of a hub id. Which it took is logged, by the logger `mlx_gemma4`.
    CheckpointError (a ValueError) for a checkpoint that is missing, damaged or of another kind, MemoryError if its
    weights cannot fit here, ConnectionError if the hub cannot be reached.
    """
    folder = find_folder(path_or_hub_id)
    checkpoint = open_checkpoint(folder, find_drafter(path_or_hub_id, folder, drafter))
    processor = load_processor(checkpoint.folder, checkpoint.config)
    for _ in load_values(checkpoint):
        pass
    return checkpoint.model, processor
