"""The command `mlx_gemma4.fit`: whether a model fits into a machine's memory, and how long a context with it."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from mlx_gemma4 import __version__, flags
from mlx_gemma4.config import FULL, computing_type, expanded, read_given, with_kv_bits
from mlx_gemma4.convert.recipes import BITS, nbytes_at
from mlx_gemma4.errors import shown
from mlx_gemma4.flags import above_0, option, switch
from mlx_gemma4.model.split import SPLITS
from mlx_gemma4.planner import Footprint, Prediction, longest, memory_limit, predict
from mlx_gemma4.terminal import FAILED, run, size_text
from mlx_gemma4.tune.plan import TuningPlan, longest_row, of_plan, smaller_tuning
from mlx_gemma4.weights.computing import emulates_bfloat16
from mlx_gemma4.weights.link import even_latency
from mlx_gemma4.weights.load import (
    DEFAULT_MODEL,
    Checkpoint,
    Headers,
    find_drafter,
    find_folder,
    fitted,
    read_headers,
    shared_checkpoints,
)
from mlx_gemma4.weights.sharing import read_a_token
from mlx_gemma4.weights.tensors import INDEX, Tensor, by_path, from_header, indexed_files, list_tensors

# The part of a Mac's memory that Metal may hold: as Macs with 16 and 32, 64 and 96 GB have it (the logs in llama.cpp's
# issues 1826, 1870, 2011 and 3213). Newer systems allow some more.
METAL_SHARE, LARGE_MAC, SHARE_OF_LARGE = 2 / 3, 36 * 2**30, 3 / 4
UNITS = {"B": 1, "MB": 2**20, "GB": 2**30, "TB": 2**40}  # of memory, which is sold in powers of two
REPLY = 1024  # tokens of a context that are written and not read: generate's --max-tokens
USUAL_CONTEXT = 8192
SHORTEST = 1024  # a context below it is of little use


def parse_memory(text: str) -> int:
    """A Mac's memory, such as 16GB, in bytes."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([MGT]?B)\s*", text, re.IGNORECASE | re.ASCII)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"memory is {shown(text)}; expected a size such as 16GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def mac_room(memory: int) -> int:
    """What a Mac with so many bytes lets a model hold."""
    return int((SHARE_OF_LARGE if memory > LARGE_MAC else METAL_SHARE) * memory)


def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or demo.")] = DEFAULT_MODEL,
    context: Annotated[int | None, above_0("Tokens of prompt and reply together; 8192.")] = None,
    memory: Annotated[
        str | None, option("SIZE", "Of another Mac, such as 16GB; of several that share it: 16GB,24GB.")
    ] = None,
    hosts: Annotated[Path | None, option("FILE", "Of mlx.launch: asks these machines for their memory.")] = None,
    drafter: flags.DrafterName = "auto",
    dtype: flags.DType = None,
    kv_bits: flags.KvBits = None,
    tune: Annotated[bool, switch("For a step of mlx_gemma4.tune instead of a reply.", "--tune")] = False,
    max_seq_length: Annotated[int | None, above_0("Of --tune: tokens of the longest row; 2048.")] = None,
    batch_size: Annotated[int | None, above_0("Of --tune: its rows come one after the other; 1.")] = None,
    rank: Annotated[int | None, above_0("Of --tune: the adapter's; 8.")] = None,
    grad_checkpoint: Annotated[
        bool | None, switch("Of --tune: layers are computed twice, or not.", "--grad-checkpoint/--no-grad-checkpoint")
    ] = None,
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> int:
    """Say what memory a model needs and whether it is there; exit status 1 if not. No weights are read."""
    of_training = {
        "max-seq-length": max_seq_length, "batch-size": batch_size, "rank": rank, "grad-checkpoint": grad_checkpoint,
    }  # fmt: skip
    check_options(tune, of_training, context, kv_bits, drafter)
    computing = computing_type(dtype)
    rooms, where = rooms_asked(memory, hosts)
    if tune and len(rooms) > 1:
        raise ValueError(f"{len(rooms)} machines and tune; expected one")
    headers = headers_anywhere(model, None if tune else drafter, computing, kv_bits)
    most = headers.config.text.max_position_embeddings
    tokens = min(USUAL_CONTEXT, most) if context is None else context
    if tokens > most:
        raise ValueError(f"context is {tokens}; {model} takes at most {most}")
    if len(rooms) > 1:
        print(f"{model} with a context of {tokens} tokens, on {len(rooms)} machines that share it")
        return fit_machines(headers, rooms, tokens)
    checkpoint, (room,) = fitted(headers), rooms
    if tune:
        plan = TuningPlan(max_seq_length or 2048, rank or 8, grad_checkpoint is not False)
        print(f"{model}, tuned with {plan.text}, a batch of {batch_size or 1} row by row; {where} {size_text(room)}")
        return fit_tuning(checkpoint, plan, room)
    print(f"{model} with a context of {tokens} tokens; {where} {size_text(room)}")
    return fit_reply(checkpoint, tokens, room)


def check_options(
    tune: bool, of_training: Mapping[str, int | None], context: int | None, kv_bits: int | None, drafter: str | None
) -> None:
    """ValueError for options of training without it, and for those that it has no use for."""
    given = [f"{name} is {value}" for name, value in of_training.items() if value is not None]
    if given and not tune:
        raise ValueError(f"{given[0]} without tune; expected --tune too")
    if tune and context is not None:
        raise ValueError(f"context is {context} and tune; expected --max-seq-length for a row of training")
    if tune and kv_bits is not None:
        raise ValueError(f"kv-bits is {kv_bits} and tune; expected one of them, for training keeps no caches")
    if tune and drafter not in ("auto", None):
        raise ValueError(f"drafter is {drafter!r} and tune; expected one of them, for training takes no drafter")


def rooms_asked(memory: str | None, hosts: Path | None) -> tuple[list[int], str]:
    """What each machine lets a model hold, and of one alone which it is, in words."""
    if memory is not None and hosts is not None:
        raise ValueError(f"memory is {shown(memory)} and hosts {str(hosts)!r}; expected one of them")
    if hosts is not None:
        return rooms_of(read_hosts(hosts)), "that machine lets a model hold"
    if memory is None:
        return [memory_limit()], "this machine lets a model hold"
    sizes = [parse_memory(each) for each in memory.split(",")]
    part = "three quarters" if sizes[0] > LARGE_MAC else "two thirds"
    return [mac_room(size) for size in sizes], f"a Mac with {sizes[0] / 2**30:.3g} GB lets a model hold ({part})"


def fit_reply(checkpoint: Checkpoint, tokens: int, room: int) -> int:
    model, most = checkpoint.footprint, checkpoint.config.text.max_position_embeddings
    found = of_context(model, tokens)
    print_table({
        "weights": found.weights, "drafter": found.drafter, "sliding caches": found.sliding, "full caches": found.full,
        "workspace": found.workspace, "together": found.peak,
    })  # fmt: skip
    longest_context = longest(lambda length: fits(model, length, room), most)
    changes = smaller(checkpoint, tokens, longest_context, room)
    return verdict(found.peak, room, f"context that fits is {longest_context}", changes)


def print_table(parts: Mapping[str, int]) -> None:
    """Bytes by what they are for, without what takes none."""
    print("\n".join(f"  {name:<16}{size_text(nbytes):>10}" for name, nbytes in parts.items() if nbytes))


def verdict(peak: int, room: int, longest_that_fits: str, changes: Iterator[str]) -> int:
    """The exit status."""
    if peak <= room:
        print(f"It fits, with {size_text(room - peak)} left; the longest {longest_that_fits}.")
        return 0
    print(f"It does not fit: {size_text(peak - room)} are missing.")
    print(f"What would make it fit: {'; '.join(changes) or 'no single change; a smaller model'}.")
    return FAILED


# --- machines that share it --------------------------------------------------------------------

# Bytes a second that a Mac's memory gives: M4, M4 Pro, M4 Max.
BANDWIDTHS = (120e9, 273e9, 546e9)
ASKED = "import mlx_gemma4, mlx_gemma4.planner as own; print(mlx_gemma4.__version__, own.memory_limit())"


def fit_machines(headers: Headers, rooms: Sequence[int], tokens: int) -> int:
    print("\n".join(f"  machine {rank:<8}{size_text(room):>10} of room" for rank, room in enumerate(rooms)))
    reading: dict[str, list[int]] = {}
    for split in SPLITS:
        try:
            parts = [shared_checkpoints(headers, rooms, rank, split)[split] for rank in range(len(rooms))]
        except ValueError as error:
            print(f"By {split}: {error}.")
            continue
        peaks = [of_context(own.footprint, tokens).peak for own in parts]
        missing = [max(0, peak - room) for peak, room in zip(peaks, rooms, strict=True)]
        said = f"does not fit, {size_text(max(missing))} are missing"
        if not max(missing):
            most = headers.config.text.max_position_embeddings
            pairs = list(zip(parts, rooms, strict=True))
            length = longest(lambda count: all(fits(own.footprint, count, room) for own, room in pairs), most)  # noqa: B023
            said = f"fits; the longest context that fits is {length}"
            reading[split] = [read_a_token(own.tensors, own.share, len(rooms)) for own in parts if own.share]
        print(f"By {split}: {', '.join(map(size_text, peaks))}: {said}.")
    if len(reading) > 1:
        even = [
            even_latency(headers.config.text, *([count / bandwidth for count in own] for own in reading.values()))
            for bandwidth in BANDWIDTHS
        ]
        latencies = ", ".join(
            f"{1e6 * latency:.3g} µs at {bandwidth / 1e9:.0f} GB/s"
            for latency, bandwidth in zip(even, BANDWIDTHS, strict=True)
        )
        print(f"By tensors is faster where an exchange takes less than {latencies} of memory bandwidth.")
    return 0 if reading else FAILED


def read_hosts(file: Path) -> list[str]:
    """The machines of a hostfile of mlx.launch, as ssh knows them."""
    data = read_given(file, str(file))
    try:
        found = json.loads(data)
        names = [str(host["ssh"]) for host in (found["hosts"] if isinstance(found, dict) else found)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f'{file} is no hostfile of mlx.launch; expected [{{"ssh": NAME, "ips": […]}}, …]') from None
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if not names or twice:
        raise ValueError(f"{file} has {f'{twice[0]!r} twice' if twice else 'no host'}; expected each machine once")
    return names


def rooms_of(hosts: Sequence[str]) -> list[int]:
    """What each lets a model hold. ValueError for one that cannot be reached or has another version."""
    rooms = []
    for host in hosts:
        command = [sys.executable, "-c", ASKED]
        if host not in ("127.0.0.1", "localhost"):  # as mlx.launch: the same Python on each
            command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", host, shlex.join(command)]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            why = (said.strip().splitlines() or ["no answer"])[-1]
            raise ValueError(
                f"{host} cannot be asked: {why}; expected ssh to reach it, and this package there"
            ) from None
        if told[:1] != [__version__]:
            raise ValueError(f"{host} has version {told[0] if told else 'none'}; expected {__version__}, as here")
        rooms.append(int(told[1]))
    return rooms


# --- tuning ------------------------------------------------------------------------------------


def fit_tuning(checkpoint: Checkpoint, plan: TuningPlan, room: int) -> int:
    found = of_plan(checkpoint, plan)
    print_table({
        "weights": found.weights, "adapter, Adam": found.adapter, "kept of layers": found.kept,
        "workspace": found.workspace, "together": found.peak,
    })  # fmt: skip
    said = f"row that fits is {longest_row(checkpoint, plan, room)} tokens"
    return verdict(found.peak, room, said, smaller_tuning(checkpoint, plan, room))


# --- arithmetic --------------------------------------------------------------------------------


def of_context(model: Footprint, tokens: int) -> Prediction:
    """The memory for a context that a reply fills, of generate's usual length or half of it."""
    reply = min(REPLY, max(1, tokens // 2))
    return predict(model, max(1, tokens - reply), reply)


def fits(model: Footprint, tokens: int, room: int) -> bool:
    return of_context(model, tokens).peak <= room


def smaller(checkpoint: Checkpoint, tokens: int, longest_context: int, room: int) -> Iterator[str]:
    """Single changes that make it fit, the smallest first: they cost length, then speed, then quality."""
    own = checkpoint.footprint
    if longest_context >= min(SHORTEST, tokens):
        yield f"a context of {longest_context} tokens"
    if own.drafter and fits(replace(own, drafter=0), tokens, room):
        yield "no drafter (--drafter none)"
    for bits in (8, 4) if own.text.attention[FULL].kv_bits is None else ():
        packed = replace(own, text=with_kv_bits(own.text, bits))
        if can_be_packed(packed) and fits(packed, tokens, room):
            yield f"caches in {bits} bits (--kv-bits {bits})"
            break
    for bits in sorted(BITS["affine"], reverse=True):
        weights = nbytes_at(checkpoint.config, bits)
        if fits(replace(own, weights=weights), tokens, room):
            yield f"{bits} bits a weight ({size_text(weights)}, mlx_gemma4.convert --q-bits {bits})"
            return


def can_be_packed(model: Footprint) -> bool:
    try:
        model.row_bytes(FULL)
    except ValueError:  # the sizes of its heads
        return False
    return True


# --- what is in a folder or on the hub ---------------------------------------------------------


def headers_anywhere(
    path_or_hub_id: str, drafter: str | None, dtype: mx.Dtype | None = None, kv_bits: int | None = None
) -> Headers:
    """Of a checkpoint; of a hub's only the configurations are downloaded, and its files' headers read."""
    settings = ["*config.json", f"*{INDEX}"]
    folder = find_folder(path_or_hub_id, settings)
    choice = find_drafter(path_or_hub_id, folder, drafter, settings)
    inner = folder / "drafter"
    origins: dict[Path, tuple[str, str]] = {}  # of snapshots: the hub id, and the beginning of their files' names there
    if not is_folder(path_or_hub_id):
        origins |= {folder: (path_or_hub_id, ""), inner: (path_or_hub_id, "drafter/")}
    if choice is not None and choice.folder != inner and not is_folder(choice.name):
        origins[choice.folder] = choice.name, ""

    def tensors_of(own: Path) -> dict[str, Tensor]:
        return remote_tensors(own, *origins[own]) if own in origins else list_tensors(own)

    return read_headers(folder, choice, tensors_of, dtype, kv_bits, None, emulates_bfloat16())


def is_folder(path_or_hub_id: str) -> bool:
    return expanded(path_or_hub_id).is_dir()


def remote_tensors(snapshot: Path, hub_id: str, inside: str) -> dict[str, Tensor]:
    """The tensors of a snapshot that may lack its weights: the headers of the files on the hub tell of them."""
    files = indexed_files(snapshot) if (snapshot / INDEX).exists() else [snapshot / "model.safetensors"]
    if all(file.exists() for file in files):
        return list_tensors(snapshot)
    from mlx_gemma4.weights.hub import read_header

    return by_path(tensor for file in files for tensor in from_header(file, read_header(hub_id, inside + file.name), 0))


def main() -> int:
    return run(fit)
