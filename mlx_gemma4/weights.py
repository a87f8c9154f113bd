"""From a folder to a model: which tensors there are, whether they fit, and their values."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_gemma4.arrange import arrange
from mlx_gemma4.config import ModelConfig, Quantization, read_config
from mlx_gemma4.drafter import Drafter, DrafterConfig, check_fit, read_drafter_config
from mlx_gemma4.errors import CheckpointError, a, one_line
from mlx_gemma4.memory import Footprint, check_memory, footprint
from mlx_gemma4.model import Model
from mlx_gemma4.processor import Processor, load_processor
from mlx_gemma4.source import SHOWN_CHARACTERS
from mlx_gemma4.tensors import Tensor, list_tensors, module_path

logger = logging.getLogger("mlx_gemma4")

DRAFTER_BITS, DRAFTER_GROUP_SIZE = 4, 64  # of a partner in full precision: its acceptance stays, its cost falls
DEFAULT_MODEL = "mlx-community/gemma-4-12B-it-4bit"
DEMO = Path(__file__).with_name("demo")
# Parts a conversion may have left out; the rest of the model is then used without them.
OPTIONAL_PARTS = {"vision": ("vision_embedder.", "embed_vision."), "audio": ("embed_audio.",)}
NAMED = 20  # tensors named in one warning


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
    if not isinstance(path_or_hub_id, str | Path):
        raise CheckpointError(f"path_or_hub_id is {a(path_or_hub_id)}; expected a model folder or a hub id")
    text = str(path_or_hub_id)
    name = repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")
    if text == "demo":
        return DEMO
    try:
        folder = Path(path_or_hub_id).expanduser()
        if text and folder.is_dir():
            return folder
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; expected a model folder or a hub id")
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us, a `~user` who does not exist
        raise CheckpointError(
            f"{name} cannot be read: {one_line(error)}; expected a model folder or a hub id"
        ) from None
    if text.count("/") != 1 or text.startswith(("/", ".", "~")) or text.endswith("/"):
        raise CheckpointError(f"{name} is no folder; expected a model folder or a hub id such as owner/name")
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
    if not isinstance(drafter, str | Path):
        raise CheckpointError(f"drafter is {a(drafter)}; expected 'auto', a folder, a hub id or None")
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


def without_missing_parts(config: ModelConfig, paths: Collection[str]) -> ModelConfig:
    """The configuration without the modalities of which the checkpoint has no tensor (text-only conversions)."""
    found = {part: any(path.startswith(own) for path in paths) for part, own in OPTIONAL_PARTS.items()}
    return replace(
        config, vision=config.vision if found["vision"] else None, audio=config.audio if found["audio"] else None
    )


def load_values(checkpoint: Checkpoint) -> Iterator[int]:
    """Read the tensors one by one, so that memory peaks at the weights; yields the bytes of each."""
    model, tensors = checkpoint.model, checkpoint.tensors
    for path in sorted(parameters(model), key=lambda path: (tensors[path].file, tensors[path].offset)):
        model.load_weights([(path, tensors[path].read())], strict=False)
        yield tensors[path].nbytes
    if model.drafter is not None and checkpoint.drafter is not None:
        quantize_drafter(model.drafter, checkpoint.drafter)
    arrange(model)


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


def load(
    path_or_hub_id: str | Path, drafter: str | Path | None = "auto", kv_bits: int | None = None
) -> tuple[Model, Processor]:
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
