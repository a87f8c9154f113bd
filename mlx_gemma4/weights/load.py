"""From a folder to a model: which tensors there are, whether they fit, and their values."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from mlx_gemma4 import __version__
from mlx_gemma4.config import (
    QUOTED,
    ModelConfig,
    Quantization,
    TextConfig,
    computing_type,
    quoted,
    read_config,
    with_kv_bits,
)
from mlx_gemma4.errors import CheckpointError, a, one_line, shown
from mlx_gemma4.media.source import SHOWN_CHARACTERS
from mlx_gemma4.model.arrange import arrange, widen_scalar
from mlx_gemma4.model.cache import array_shapes
from mlx_gemma4.model.drafter import Drafter, DrafterConfig, check_fit, read_drafter_config
from mlx_gemma4.model.float16 import LIMIT, float16_is_safe
from mlx_gemma4.model.matrix import settle_gains
from mlx_gemma4.model.model import Model, check_process, remember_process
from mlx_gemma4.model.split import SPLITS, LayerShare, Share, join_machines
from mlx_gemma4.planner import Footprint, check_memory, footprint, memory_limit
from mlx_gemma4.prompt.processor import Processor, load_processor
from mlx_gemma4.weights.adapter import AdapterTensor, attach, choosable, matrices_of, read_adapter
from mlx_gemma4.weights.link import Link, time_link, time_reading, token_seconds
from mlx_gemma4.weights.peers import check_alike, watch
from mlx_gemma4.weights.sharing import here, read_a_token, shared, shares_by
from mlx_gemma4.weights.tensors import (
    DTYPE_NAMES,
    EMBEDDING,
    FLOATING,
    HEAD,
    TEXT,
    Rows,
    Tensor,
    block_ranges,
    conversion_name,
    have_same_values,
    list_tensors,
    module_path,
)

logger = logging.getLogger("mlx_gemma4")

DRAFTER_ROOT = "drafter."  # of the paths of its tensors, beside the model's
DRAFTER_BITS, DRAFTER_GROUP_SIZE = 4, 64  # of a partner in full precision: its acceptance stays, its cost falls
DEFAULT_MODEL = "mlx-community/gemma-4-12B-it-4bit"
DEMO = Path(__file__).parents[1] / "demo"
# Parts a conversion may have left out; the rest of the model is then used without them.
OPTIONAL_PARTS = {"vision": ("vision_embedder.", "embed_vision."), "audio": ("embed_audio.",)}
NAMED = 4  # tensors named in one warning, which stays a line

Stored = TypeVar("Stored", bound=Rows)


def quantize_empty(model: nn.Module, tensors: Mapping[str, Tensor], quantization: Mapping[str, Quantization]) -> None:
    """Give an empty model quantized modules where the tensors are; quantization: as `quantization_by_path`."""

    def parameters_of(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        scales = tensors.get(f"{path}.scales")
        if scales is None:
            return False
        own = quantization_of(path, quantization)
        if (own.mode == "affine") != (scales.dtype in FLOATING):
            stored = DTYPE_NAMES[scales.dtype]
            expected = "BF16, F16 or F32" if own.mode == "affine" else "U8"
            raise CheckpointError(
                f"{quoted(scales.name)} is stored as {stored} and config.json says mode {own.mode}; expected {expected}"
            )
        return {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}

    try:
        nn.quantize(model, class_predicate=parameters_of)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json has a quantization that MLX cannot do: {error}") from None


def quantization_of(path: str, quantization: Mapping[str, Quantization]) -> Quantization:
    """Of a quantized module: its own, or the default of the model or drafter that it belongs to."""
    root = DRAFTER_ROOT if path.startswith(DRAFTER_ROOT) else ""
    own = quantization.get(path) or quantization.get(root)
    if own is None:
        raise CheckpointError(f"{path} is quantized, but config.json has no quantization")
    return own


def quantization_by_path(config: ModelConfig | DrafterConfig, root: str) -> dict[str, Quantization]:
    """By the path of a module; the default by `root`, which all paths begin with."""
    default = {root: config.quantization} if config.quantization else {}
    return default | {root + module_path(name): own for name, own in config.quantization_overrides.items()}


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError for a tensor that is missing, of another shape or kind; a warning for those without a place."""
    expected = parameters(model)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}"
            + foreign_names([tensor.name for tensor in tensors.values()], missing[0])
        )
    for path, array in expected.items():
        own = tensors[path]
        if own.shape != array.shape:
            raise CheckpointError(f"{own.name} has shape {quoted(list(own.shape))}; expected {list(array.shape)}")
        allowed = FLOATING if array.dtype in FLOATING else (array.dtype,)
        if own.dtype not in allowed:
            names = " or ".join(DTYPE_NAMES[dtype] for dtype in allowed)
            raise CheckpointError(f"{own.name} is stored as {DTYPE_NAMES[own.dtype]}; expected {names}")
    if unknown := sorted(tensors[path].name for path in tensors.keys() - expected.keys()):
        names = ", ".join(name[:QUOTED] for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        logger.warning("the model has no place for %d tensors, left out: %s%s", len(unknown), names, more)


# What other libraries add to the names of tensors.
WRAPPERS = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")
FOREIGN_PARTS = {
    "qweight": "GPTQ's or AWQ's",
    "weight_packed": "compressed-tensors'",
    "weight_scale": "compressed-tensors' or fp8's",
    "weight_scale_inv": "fp8's",
    "absmax": "bitsandbytes'",
    "lora_A": "a LoRA adapter's",
}


def foreign_names(names: Sequence[str], path: str) -> str:
    """What is to be said of a checkpoint whose tensors are named otherwise; `path`: of one that is missing."""
    ends = tuple(f".{own}" for own in (path, conversion_name(path)))
    prefixed = next((name for name in names if name.endswith(ends)), None)
    wrapper = next((own for own in WRAPPERS if any(f".{own}" in f".{name}" for name in names)), None)
    if wrapper is None and prefixed is not None:
        wrapper = prefixed[: -len(path)].removesuffix("model.").removesuffix(TEXT)
    if wrapper:
        return f"; its names have {quoted(wrapper)} in front, expected them as Google or MLX writes them"
    parts = [part for name in names for part in name.split(".")[-3:]]
    foreign = next((FOREIGN_PARTS[part] for part in parts if part in FOREIGN_PARTS), None)
    return f"; its tensors are {foreign}, expected the original checkpoint or MLX's quantization" if foreign else ""


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """All parameters by their path."""
    found: dict[str, mx.array] = {}
    tree_flatten(model.parameters(), destination=found)
    return found


def footprint_of(model: Model) -> Footprint:
    """Of a model that is loaded."""
    return footprint(model.config, parameters(model))


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
    from mlx_gemma4.weights.hub import PATTERNS, download  # here: a folder needs no HTTP client

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


Adapters = Path | dict[str, Path] | None  # one for all requests; by name, for requests to choose from
BASE = "base"  # what a request may call the model without any of them


def find_adapter(adapter: str | Path | Mapping[str, str | Path] | None) -> Adapters:
    if isinstance(adapter, Mapping):
        for name, folder in adapter.items():
            if not isinstance(name, str) or name in ("", BASE) or not isinstance(folder, str | Path):
                raise CheckpointError(f"adapter has {quoted(name)}: {quoted(folder)}; expected a name and a folder")
        return {name: Path(folder).expanduser() for name, folder in adapter.items()} or None
    if adapter is not None and not isinstance(adapter, str | Path):
        raise CheckpointError(f"adapter is {a(adapter)}; expected an adapter's folder, several by name, or None")
    return None if adapter is None else Path(adapter).expanduser()


def find_drafter(
    path_or_hub_id: str | Path,
    folder: Path,
    drafter: str | Path | None,
    patterns: Sequence[str] | None = None,
    adapter: Adapters = None,
) -> DrafterChoice | None:
    """The drafter to use with the model in `folder`, which was asked for as `path_or_hub_id`.

    "auto": the subfolder `drafter/` of the adapter, if it is one, else the model's, else, for a hub id, the published
    partner; None where there is none. patterns: as in `find_folder`.
    """
    if drafter is None:
        return None
    if not isinstance(drafter, str | Path):
        raise CheckpointError(f"drafter is {a(drafter)}; expected 'auto', a folder, a hub id or None")
    if drafter != "auto":
        return DrafterChoice(find_folder(drafter, patterns), str(drafter), quantize=False)
    for own in (*([adapter / "drafter"] if isinstance(adapter, Path) else []), folder / "drafter"):
        if own.is_dir():
            return DrafterChoice(own, str(own), quantize=False)
    if folder == Path(path_or_hub_id).expanduser():
        return None
    from mlx_gemma4.weights.hub import PATTERNS, download_partner

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
    share: Share | LayerShare | None = None  # of several machines
    group: mx.distributed.Group | None = None  # of these, if they are there

    @property
    def nbytes(self) -> int:
        """To read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Headers:
    """What a folder and its drafter's say before anything is read; tensors and quantization by path."""

    folder: Path
    config: ModelConfig
    model: Model  # the whole one's shapes; `fitted` makes of it what one machine loads
    tensors: dict[str, Tensor]
    quantization: dict[str, Quantization]
    drafter: DrafterChoice | None
    drafter_config: DrafterConfig | None
    added: Sequence[Mapping[str, AdapterTensor]] = ()  # by adapters, of the whole model


def find_checkpoint(
    path_or_hub_id: str | Path,
    drafter: str | Path | None = "auto",
    dtype: mx.Dtype | None = None,
    kv_bits: int | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    group: mx.distributed.Group | None = None,
    split: str | None = None,
) -> Checkpoint:
    """`open_checkpoint` of what is called so, fetched where it has to be. ConnectionError if the hub cannot be
    reached."""
    folder, own = find_folder(path_or_hub_id), find_adapter(adapter)
    choice = find_drafter(path_or_hub_id, folder, drafter, adapter=own)
    return open_checkpoint(folder, choice, dtype, kv_bits, own, group, split)


def open_checkpoint(
    folder: Path,
    drafter: DrafterChoice | None,
    dtype: mx.Dtype | None = None,
    kv_bits: int | None = None,
    adapter: Adapters = None,
    group: mx.distributed.Group | None = None,
    split: str | None = None,
) -> Checkpoint:
    """Look through a model folder. CheckpointError if anything is missing or wrong, MemoryError if it cannot fit.

    dtype: to compute in; None: see `choose_dtype`. kv_bits: of what full layers keep; None: that type's. adapter: a
    folder, or several by name. group: of machines that share the model, by "tensors" or "layers"; None: the faster.
    ValueError if it cannot be shared so.
    """
    checkpoint = look_through(folder, drafter, dtype, kv_bits, adapter, group, split)
    check_memory(checkpoint.footprint)
    return checkpoint


def look_through(
    folder: Path,
    drafter: DrafterChoice | None,
    dtype: mx.Dtype | None = None,
    kv_bits: int | None = None,
    adapter: Adapters = None,
    group: mx.distributed.Group | None = None,
    split: str | None = None,
) -> Checkpoint:
    """A checkpoint of any size; as `open_checkpoint`."""
    is_shared = group is not None and group.size() > 1
    if split is not None and not is_shared:
        raise ValueError(f"split is {split!r} on one machine; expected several, started by mlx.launch")
    headers = read_headers(folder, drafter, list_tensors, dtype, kv_bits, adapter, is_shared)
    if group is None or not is_shared:
        return fitted(headers)
    if headers.config.dtype == mx.float16:  # whose ranges hang on whole rows of an MLP
        raise ValueError("dtype is float16 and several machines share the model; expected bfloat16 or float32")
    described = [
        (path, tensor.shape, str(tensor.dtype), tensor.scale if isinstance(tensor, AdapterTensor) else None)
        for tensors in (headers.tensors, *headers.added)
        for path, tensor in sorted(tensors.items())
    ]
    check_alike(group, repr((__version__, split, headers.config, headers.drafter_config, described)))
    room = mx.distributed.all_gather(mx.array([memory_limit() // 2**20]), group=group)
    found = shared_checkpoints(headers, cast(list[int], room.tolist()), group.rank(), split)
    own = choose(headers.config, found, group) if len(found) > 1 else next(iter(found))
    return replace(found[own], group=group)


def read_headers(
    folder: Path,
    drafter: DrafterChoice | None,
    tensors_of: Callable[[Path], dict[str, Tensor]],
    dtype: mx.Dtype | None,
    kv_bits: int | None,
    adapter: Adapters = None,
    is_shared: bool = False,
) -> Headers:
    """As `look_through`; of the whole model, also if several machines will share it. tensors_of: lists a folder's
    tensors, as `list_tensors`."""
    config, tensors = settle_parts(read_config(folder), tensors_of(folder))
    quantization = quantization_by_path(config, "")
    own = None if drafter is None else read_drafter_config(drafter.folder)
    if drafter is not None and own is not None:
        check_fit(own, config.text)
        own, found = settle_drafter(own, tensors_of(drafter.folder))
        tensors |= {DRAFTER_ROOT + path: tensor for path, tensor in found.items()}
        quantization |= quantization_by_path(own, DRAFTER_ROOT)
    if dtype is None:
        dtype = own_dtype(tensors, quantization) if is_shared else choose_dtype(tensors, quantization)
    config = replace(config, dtype=dtype, text=with_kv_bits(config.text, kv_bits))
    for attention in config.text.attention.values():
        array_shapes(attention, dtype)  # that they can be packed
    if isinstance(adapter, dict):
        config = replace(config, adapters=tuple(adapter))
    folders = [*adapter.values()] if isinstance(adapter, dict) else [] if adapter is None else [adapter]
    model = Model(config)
    matrices = matrices_of(model)
    added = [read_adapter(each, matrices) for each in folders]
    return Headers(folder, config, model, tensors, quantization, drafter, own, added)


def fitted(headers: Headers, share: Share | LayerShare | None = None) -> Checkpoint:
    """The model, or what one of several machines holds of it, and that it is whole."""
    config, tensors, quantization, added = headers.config, headers.tensors, headers.quantization, headers.added
    model, drafter, own = headers.model, headers.drafter, headers.drafter_config
    if share is not None:
        tensors = shared(tensors, share, config.text)
        added = [shared(each, share, config.text) for each in added]
        config = replace(config, text=share.of(config.text))
        model = Model(config)
    if own is not None:
        model.drafter = Drafter(own)
    if isinstance(share, LayerShare):
        share.leave_out(model)
        quantization = here(quantization, share)
    quantize_empty(model, tensors, quantization)
    if added:
        parts = choosable(added) if config.adapters else added[0]
        attach(model, parts)
        tensors = {**tensors, **parts}
    check_tensors(model, tensors)
    loaded = {path: as_loaded(path, tensors, config) for path in parameters(model)}
    size = footprint(config, loaded)
    if drafter is not None and own is not None and model.drafter is not None and will_quantize(model.drafter, drafter):
        size = replace(size, drafter=quantized_nbytes(Drafter(own), config.dtype))
    return Checkpoint(headers.folder, config, tensors, model, drafter, size, share)


def shared_checkpoints(
    headers: Headers, memories: Sequence[int], rank: int, split: str | None
) -> dict[str, Checkpoint]:
    """What one of several machines holds, by `split` or either way. ValueError if the model cannot be shared so."""
    found: dict[str, Checkpoint] = {}
    refused: list[ValueError] = []
    for name in SPLITS if split is None else [split]:
        try:
            own = shares_by(name, headers.config.text, headers.tensors, memories)[rank]
            found[name] = fitted(headers, own)
        except ValueError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found


def choose(config: ModelConfig, found: Mapping[str, Checkpoint], group: mx.distributed.Group) -> str:
    """The faster of the splits that fit on all machines; one line says which."""
    machines, bandwidth, link = group.size(), time_reading(config.dtype), time_link(group)
    mx.clear_cache()  # of what was timed
    own = [
        (read_a_token(each.tensors, cast(Share | LayerShare, each.share), machines) / bandwidth, each.footprint.fits)
        for each in found.values()
    ]
    # the slowest exchange counts: the same numbers on all machines
    told = mx.array([*astuple(link), *(number for pair in own for number in pair)], mx.float32)
    latency, rate, *every = np.asarray(mx.distributed.all_gather(told[None], group=group)).T
    link = Link(float(latency.max()), float(rate.min()))
    seconds = {
        split: (not fits.all(), token_seconds(split, config.text, config.dtype.size, reading.tolist(), link))
        for split, reading, fits in zip(found, every[::2], every[1::2], strict=True)
    }
    best = min(seconds, key=lambda split: seconds[split])
    expected = ", ".join(
        f"{1 / time:.3g} tokens/s by {split}" + " without room" * misses for split, (misses, time) in seconds.items()
    )
    logger.info(
        "%d machines share the model by %s: %s expected, %.3g ms an exchange; --split fixes it",
        machines, best, expected, 1e3 * link.latency,
    )  # fmt: skip
    return best


def check_split(split: str | None) -> None:
    """ValueError if it is none."""
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {shown(split)}; expected {' or '.join(SPLITS)}")


def settle_parts(config: ModelConfig, tensors: dict[str, Stored]) -> tuple[ModelConfig, dict[str, Stored]]:
    """The configuration as the tensors have it, without the modalities of which there is none (text-only conversions),
    and those of them that count."""
    found = {part: any(path.startswith(own) for path in tensors) for part, own in OPTIONAL_PARTS.items()}
    vision, audio = config.vision if found["vision"] else None, config.audio if found["audio"] else None
    is_tied = has_tied_head(config.text, tensors)
    if is_tied:
        tensors = {path: tensor for path, tensor in tensors.items() if not path.startswith(f"{HEAD}.")}
    text = replace(config.text, tie_word_embeddings=is_tied)
    return replace(config, text=text, vision=vision, audio=audio), tensors


def has_tied_head(text: TextConfig, tensors: Mapping[str, Rows]) -> bool:
    """Whether the embedding is the head: there is no other, or one with the same values. The config may be wrong."""
    own = {path.removeprefix(HEAD): tensor for path, tensor in tensors.items() if path.startswith(f"{HEAD}.")}
    if not own:
        if not text.tie_word_embeddings:
            raise CheckpointError("tie_word_embeddings is False and there is no lm_head.weight; expected it, or True")
        return True
    table = {
        path.removeprefix(EMBEDDING): tensor for path, tensor in tensors.items() if path.startswith(f"{EMBEDDING}.")
    }
    if any(isinstance(tensor, Tensor) and not tensor.file.exists() for tensor in own.values()):
        return text.tie_word_embeddings  # on the hub: the values are not here to compare
    return own.keys() == table.keys() and all(have_same_values(own[part], table[part]) for part in own)


def settle_drafter(config: DrafterConfig, tensors: dict[str, Tensor]) -> tuple[DrafterConfig, dict[str, Tensor]]:
    """A drafter's embedding is its head and nothing else: a head of its own takes that place."""
    head = {path: tensor for path, tensor in tensors.items() if path.startswith(f"{HEAD}.")}
    if not head:
        if not config.text.tie_word_embeddings:
            raise CheckpointError("tie_word_embeddings of the drafter is False and there is no lm_head.weight")
        return config, tensors
    rest = {path: own for path, own in tensors.items() if not path.startswith((f"{HEAD}.", "embed_tokens."))}
    overrides = {
        path: own for path, own in config.quantization_overrides.items() if module_path(path) != "embed_tokens"
    }
    overrides = {"embed_tokens" if module_path(path) == HEAD else path: own for path, own in overrides.items()}
    renamed = {f"embed_tokens{path.removeprefix(HEAD)}": tensor for path, tensor in head.items()}
    text = replace(config.text, tie_word_embeddings=False)
    return replace(config, text=text, quantization_overrides=overrides), rest | renamed


# --- computing type ----------------------------------------------------------------------------

# GPUs before the M3's have no bfloat16: MLX computes it in float32, and rounds (1.34 times as long for a prompt).
EMULATED = re.compile(r"applegpu_g1[34]")
FLOAT16_END = 65520  # what float16 rounds to infinity begins here
BFLOAT16_ERROR = 2.0**-9 / 3**0.5  # root of the mean square, as a part of what is rounded, at most


def emulates_bfloat16() -> bool:
    return EMULATED.match(str(mx.device_info().get("architecture", ""))) is not None


def choose_dtype(tensors: Mapping[str, Tensor], quantization: Mapping[str, Quantization]) -> mx.Dtype:
    """The type to compute in where none is asked for: the checkpoint's own, but float16 where bfloat16 is emulated."""
    own = own_dtype(tensors, quantization)
    if own != mx.bfloat16 or not emulates_bfloat16():
        return own
    for path, tensor in tensors.items():
        if not is_table(path, tensor) and tensor.dtype in FLOATING and is_worse_in_float16(tensor):
            logger.info("computes in bfloat16, which this GPU emulates: float16 would change %s", tensor.name)
            return own
    if (bound := largest_score(tensors)) > LIMIT:
        logger.info("computes in bfloat16, which this GPU emulates: scores may reach %.3g, beyond float16", bound)
        return own
    logger.info("computes in float16: this GPU emulates the checkpoint's bfloat16")
    return mx.float16


def largest_score(tensors: Mapping[str, Tensor]) -> float:
    """A bound on what attention's products of queries and keys can be, which no power of two could make smaller."""
    found = {path: tensor for path, tensor in tensors.items() if path.endswith(("q_norm.weight", "k_norm.weight"))}
    if not all(tensor.file.exists() for tensor in found.values()):  # on the hub
        return 0.0
    size = {path: float(mx.abs(tensor.read().astype(mx.float32)).max()) for path, tensor in found.items()}
    keys = {tensor.shape: 1.0 for tensor in found.values()}  # the drafter reads those of its own width
    for path in size:
        if "k_norm" in path:
            keys[found[path].shape] = max(keys[found[path].shape], size[path])
    return max(
        (
            found[path].shape[0]
            * size[path]
            * max(size.get(path.replace("q_norm", "k_norm"), keys[found[path].shape]), 1)
            for path in size
            if "q_norm" in path
        ),
        default=0.0,
    )


def own_dtype(tensors: Mapping[str, Tensor], quantization: Mapping[str, Quantization]) -> mx.Dtype:
    """The type of most weights of the decoder's matrices: that of the matrix, or of the scales if these float.

    Norms and the rest count only where no matrix has a type: trainers save some of them as float32.
    """
    tables: dict[mx.Dtype, int] = dict.fromkeys(FLOATING, 0)
    others = dict(tables)
    for path, tensor in tensors.items():
        scales = tensors.get(f"{path.removesuffix('.weight')}.scales", tensor)
        if scales.dtype not in FLOATING or path.startswith(DRAFTER_ROOT):
            continue
        if not is_table(path, tensor):
            others[tensor.dtype] = others.get(tensor.dtype, 0) + math.prod(tensor.shape)
        else:
            packed = 1 if scales is tensor else 32 // quantization_of(path.removesuffix(".weight"), quantization).bits
            tables[scales.dtype] += packed * math.prod(tensor.shape)
    votes = tables if any(tables.values()) else others
    return max(FLOATING, key=lambda dtype: votes[dtype])


def is_table(path: str, tensor: Tensor) -> bool:
    """Whether a tensor is a matrix, quantized or not."""
    return path.endswith(".weight") and len(tensor.shape) == 2


def is_worse_in_float16(tensor: Tensor) -> bool:
    """Whether float16 rounds a tensor's values more than bfloat16 did, or has no room for one of them."""
    if not tensor.file.exists():  # on the hub
        return False
    lost = least = mx.array(0.0)
    for start, stop in block_ranges(tensor):
        values = tensor.rows(start, stop).astype(mx.float32)
        lost = lost + mx.square(values.astype(mx.float16) - values).sum()
        least = least + mx.square(values * BFLOAT16_ERROR).sum()
    return not bool(lost <= least)  # infinite, or no number


def loaded_dtype(tensor: Tensor, config: ModelConfig) -> mx.Dtype:
    """All that floats has one type; packed weights and scales of a byte stay. The lengths of DoRA's rows are divided by
    others that are nearly the same: float32."""
    if isinstance(tensor, AdapterTensor) and tensor.is_gain:
        return mx.float32
    return config.dtype if tensor.dtype in FLOATING else tensor.dtype


def as_loaded(path: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """A tensor's type, and its size once the model is arranged: a layer's scalar becomes as long as a row."""
    like = tensors[path.replace("layer_scalar", "input_layernorm.weight")]
    return replace(tensors[path], dtype=loaded_dtype(tensors[path], config), shape=like.shape)


def load_value(tensor: Tensor, config: ModelConfig) -> mx.array:
    """A tensor's values in the type to compute in.

    A norm for which float16 has no room stays as wide as it is; CheckpointError if it is another tensor.
    """
    value = tensor.read()
    dtype = loaded_dtype(tensor, config)
    if dtype == mx.float16 and FLOAT16_END <= (largest := float(mx.maximum(value.max(), -value.min()))) < math.inf:
        if len(tensor.shape) > 1:
            raise CheckpointError(
                f"{tensor.name} holds {largest:.6g}, beyond float16; expected bfloat16 or float32, for dtype"
            )
        dtype = mx.float32
    value = value.astype(dtype)
    mx.eval(value)
    return value


# --- values ------------------------------------------------------------------------------------


def load_values(checkpoint: Checkpoint) -> Iterator[int]:
    """Read the tensors, as `read_values`, and make the model ready to run."""
    yield from read_values(checkpoint)
    settle_gains(checkpoint.model)
    if checkpoint.config.dtype == mx.float16 and (reason := float16_is_safe(checkpoint.model)):
        raise CheckpointError(f"{reason}; expected bfloat16 or float32, for dtype")
    arrange(checkpoint.model)
    if checkpoint.share is not None and checkpoint.group is not None:
        join_machines(checkpoint.model, checkpoint.share, checkpoint.group)


def read_values(checkpoint: Checkpoint) -> Iterator[int]:
    """Read the tensors one by one, so that memory peaks at the weights; yields the bytes of each.

    The model has the checkpoint's names and order, as what is trained has; it is not yet ready to run.
    """
    check_process()
    remember_process()
    model, tensors = checkpoint.model, checkpoint.tensors
    for path in sorted(parameters(model), key=lambda path: (tensors[path].file, tensors[path].offset)):
        model.load_weights([(path, load_value(tensors[path], checkpoint.config))], strict=False)
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


def quantized_nbytes(empty: Drafter, dtype: mx.Dtype) -> int:
    """What a partner in full precision comes to."""
    empty.set_dtype(dtype)
    for layer in empty.layers:
        widen_scalar(layer)
    nn.quantize(empty, DRAFTER_GROUP_SIZE, DRAFTER_BITS)
    return sum(array.nbytes for array in parameters(empty).values())


def load(
    path_or_hub_id: str | Path,
    drafter: str | Path | None = "auto",
    kv_bits: int | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    dtype: str | None = None,
    group: mx.distributed.Group | None = None,
    split: str | None = None,
) -> tuple[Model, Processor]:
    """A model and its processor, from a folder or a hub id.

    drafter: a folder or hub id; None: none; "auto": the model folder's subfolder `drafter/`, else the published
    partner of a hub id. Which it took is logged, by the logger `mlx_gemma4`.
    dtype: "bfloat16", "float16" or "float32", of hidden states, caches and all weights that are not packed; None: the
    checkpoint's own, that of its matrices or scales, but float16 for bfloat16 on GPUs that emulate it (M1, M2), if no
    scale loses by it.
    kv_bits: 8 or 4, of the keys and values that full layers keep; None: as they are computed. It saves memory at long
    contexts and costs some quality (`mlx_gemma4.evaluate --kv-bits` measures it).
    adapter: a folder that `mlx_gemma4.tune`, mlx-lm or PEFT has written, LoRA or DoRA; or several, {name: folder}, of
    which a request chooses one, `generate(…, adapter=name)`, or none.
    group: machines that share the model, `mx.distributed.init()`, under `mlx.launch`; each reads its part. split: by
    "tensors" or "layers"; None: what is faster here, by the link between them.
    CheckpointError (a ValueError) for a checkpoint that is missing, damaged or of another kind, MemoryError if its
    weights cannot fit here, ConnectionError if the hub cannot be reached.
    """
    asked = computing_type(dtype)
    check_split(split)
    if group is not None and group.size() > 1:
        watch(group)
    checkpoint = find_checkpoint(path_or_hub_id, drafter, asked, kv_bits, adapter, group, split)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    for _ in load_values(checkpoint):
        pass
    return checkpoint.model, processor
