"""From a folder or a hub id to a model: what is found there, looked through, and loaded."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from mlx_gemma4 import __version__
from mlx_gemma4.config import ModelConfig, Quantization, computing_type, expanded, read_config, with_kv_bits
from mlx_gemma4.errors import CheckpointError, a, one_line, shown
from mlx_gemma4.media.source import SHOWN_CHARACTERS
from mlx_gemma4.model.arrange import arrange, widen_scalar
from mlx_gemma4.model.cache import array_shapes
from mlx_gemma4.model.drafter import Drafter, DrafterConfig, check_fit, read_drafter_config
from mlx_gemma4.model.float16 import float16_is_safe
from mlx_gemma4.model.matrix import settle_gains
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.split import SPLITS, LayerShare, Share, join_machines
from mlx_gemma4.planner import Footprint, check_memory, footprint, memory_limit
from mlx_gemma4.prompt.processor import Processor, load_processor
from mlx_gemma4.weights.adapter import AdapterTensor, attach, choosable, matrices_of, read_adapter
from mlx_gemma4.weights.computing import as_loaded, choose_dtype, emulates_bfloat16, load_value
from mlx_gemma4.weights.link import Link, time_link, time_reading, token_seconds
from mlx_gemma4.weights.peers import anywhere, check_alike, watch
from mlx_gemma4.weights.sharing import here, read_a_token, shared, shares_by
from mlx_gemma4.weights.tensors import Tensor, list_tensors
from mlx_gemma4.weights.whole import (
    DRAFTER_ROOT,
    check_tensors,
    quantization_by_path,
    quantize_empty,
    settle_drafter,
    settle_parts,
)

logger = logging.getLogger("mlx_gemma4")

DRAFTER_BITS, DRAFTER_GROUP_SIZE = 4, 64  # of a partner in full precision: its acceptance stays, its cost falls
DEFAULT_MODEL = "mlx-community/gemma-4-12B-it-4bit"
DEMO = Path(__file__).parents[1] / "demo"


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
            made = " (mlx_gemma4.convert makes one of GGUF)" if folder.suffix == ".gguf" else ""
            raise CheckpointError(f"{folder} is a file; expected a model folder{made} or a hub id")
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
        raise ConnectionError(f"{error}; the model demo, which is in this package, needs no network") from None


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
                raise CheckpointError(f"adapter has {shown(name)}: {shown(folder)}; expected a name and a folder")
        return {name: expanded(folder) for name, folder in adapter.items()} or None
    if adapter is not None and not isinstance(adapter, str | Path):
        raise CheckpointError(f"adapter is {a(adapter)}; expected an adapter's folder, several by name, or None")
    return None if adapter is None else expanded(adapter)


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
    if folder == expanded(path_or_hub_id):
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

    @property
    def group(self) -> mx.distributed.Group | None:
        """Of the machines that share the model, where they are there."""
        return None if self.share is None else self.share.group

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
    drafter: str | Path | None,
    dtype: mx.Dtype | None,
    kv_bits: int | None,
    adapter: str | Path | Mapping[str, str | Path] | None,
    group: mx.distributed.Group | None,
    split: str | None,
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
    emulated = anywhere(group, emulates_bfloat16())  # all compute in one type, and float16 is everywhere
    headers = read_headers(folder, drafter, list_tensors, dtype, kv_bits, adapter, emulated)
    if group is None or not is_shared:
        return fitted(headers)
    described = [
        (path, tensor.shape, str(tensor.dtype), tensor.scale if isinstance(tensor, AdapterTensor) else None)
        for tensors in (headers.tensors, *headers.added)
        for path, tensor in sorted(tensors.items())
    ]
    check_alike(group, repr((__version__, split, headers.config, headers.drafter_config, described)))
    room = mx.distributed.all_gather(mx.array([memory_limit() // 2**20]), group=group)
    found = shared_checkpoints(headers, cast(list[int], room.tolist()), group.rank(), split)
    own = found[choose(headers.config, found, group) if len(found) > 1 else next(iter(found))]
    return replace(own, share=replace(cast(Share | LayerShare, own.share), group=group))


def read_headers(
    folder: Path,
    drafter: DrafterChoice | None,
    tensors_of: Callable[[Path], dict[str, Tensor]],
    dtype: mx.Dtype | None,
    kv_bits: int | None,
    adapter: Adapters,
    emulated: bool,
) -> Headers:
    """As `look_through`; of the whole model, also if several machines will share it. tensors_of: lists a folder's
    tensors, as `list_tensors`. emulated: whether bfloat16 is, by one of the GPUs."""
    config, tensors = settle_parts(read_config(folder), tensors_of(folder))
    quantization = quantization_by_path(config, "")
    own = None if drafter is None else read_drafter_config(drafter.folder)
    if drafter is not None and own is not None:
        check_fit(own, config.text)
        own, found = settle_drafter(own, tensors_of(drafter.folder))
        tensors |= {DRAFTER_ROOT + path: tensor for path, tensor in found.items()}
        quantization |= quantization_by_path(own, DRAFTER_ROOT)
    if dtype is None:
        dtype = choose_dtype(tensors, quantization, emulated)
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
    expected = parameters(model)
    check_tensors(expected, tensors)
    loaded = {path: as_loaded(path, tensors, config) for path in expected}
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
    if split is not None and not (isinstance(split, str) and split in SPLITS):
        raise ValueError(f"split is {shown(split)}; expected {' or '.join(SPLITS)}")


def load_values(checkpoint: Checkpoint) -> Iterator[int]:
    """Read the tensors, as `read_values`, and make the model ready to run."""
    yield from read_values(checkpoint)
    settle_gains(checkpoint.model)
    model, share = checkpoint.model, checkpoint.share
    if checkpoint.config.dtype == mx.float16:
        check_float16(checkpoint)
    arrange(model, share)
    if share is not None:
        join_machines(model, share)


def check_float16(checkpoint: Checkpoint) -> None:
    """CheckpointError, on all machines, if one of them has weights for which float16 has no room."""
    reason = float16_is_safe(checkpoint.model, checkpoint.share)
    if anywhere(checkpoint.group, reason is not None):
        raise CheckpointError(f"{reason or 'another machine has no room'}; expected bfloat16 or float32, for dtype")


def read_values(checkpoint: Checkpoint) -> Iterator[int]:
    """Read the tensors one by one, so that memory peaks at the weights; yields the bytes of each.

    The model has the checkpoint's names and order, as what is trained has; it is not yet ready to run.
    """
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
    if group is not None and not isinstance(group, mx.distributed.Group):
        raise ValueError(f"group is {shown(group)}; expected mx.distributed.init()")
    if group is not None and group.size() > 1:
        watch(group)
    checkpoint = find_checkpoint(path_or_hub_id, drafter, asked, kv_bits, adapter, group, split)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    for _ in load_values(checkpoint):
        pass
    return checkpoint.model, processor
