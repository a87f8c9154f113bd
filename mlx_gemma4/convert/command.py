"""The command `mlx_gemma4.convert`: a checkpoint of Google's or of MLX -> a model folder, with its drafter."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import mlx.core as mx

from mlx_gemma4 import flags
from mlx_gemma4.config import ModelConfig, computing_type, expanded
from mlx_gemma4.convert.card import base_of, name_of, write_card
from mlx_gemma4.convert.gguf import GGUFTensor, has_blocks
from mlx_gemma4.convert.job import (
    LATTICE_REPORT,
    Job,
    Source,
    copy_files,
    finished_folder,
    keep_job,
    make_job,
    open_drafter,
    open_gguf,
    open_target,
    part_of,
    write_model,
)
from mlx_gemma4.convert.recipes import BITS, RECIPES, Recipe, named_recipe, uniform_recipe
from mlx_gemma4.errors import CheckpointError, shown
from mlx_gemma4.flags import check_name, option, switch, whole
from mlx_gemma4.terminal import SizeBar, run
from mlx_gemma4.weights.load import DEMO, find_drafter, find_folder

SPARE_BYTES = 50_000_000  # of disk, for the tokenizer and what a file system needs itself
DRAFTER = "drafter"
SHOWN = 5  # names in one line


@dataclass(frozen=True)
class Settings:
    """What the options ask for, checked."""

    recipe: Recipe | None  # None: back to full precision
    dtype: mx.Dtype | None
    float32_scales: bool
    drafter: str | None  # a folder, a hub id or auto; None: without
    drafter_bits: int


def convert(
    hf_path: Annotated[str, option("MODEL", "A model folder, a hub id or a .gguf file.", "--hf-path", "--model")],
    mlx_path: Annotated[str, option("FOLDER", "Where the conversion goes.")] = "mlx_model",
    recipe: Annotated[
        str | None,
        option(
            "NAME",
            "4bit (the default), 8bit, mixed, or qat for weights on a 4-bit lattice, as a quantized .gguf's are.",
        ),
    ] = None,
    q_bits: Annotated[int | None, whole("Bits a weight: 2, 3, 4, 5, 6 or 8.")] = None,
    q_group_size: Annotated[int | None, whole("Weights a scale: 32, 64 or 128.")] = None,
    q_mode: Annotated[str | None, option("NAME", "affine (the default), mxfp4, nvfp4 or mxfp8.")] = None,
    dtype: Annotated[str | None, option("NAME", "Of the rest: bfloat16, float16, float32; else config.json's.")] = None,
    scales: Annotated[
        str | None, option("NAME", "Of --recipe qat: bfloat16, or float32, which is always exact.")
    ] = None,
    dequantize: Annotated[bool, switch("Back to full precision.", "--dequantize", "-d")] = False,
    drafter: flags.DrafterName = "auto",
    no_drafter: Annotated[bool, switch("Convert the model alone.", "--no-drafter")] = False,
    drafter_bits: Annotated[int, whole("Bits a weight of the drafter.")] = 4,
    media_from: Annotated[
        str | None, option("MODEL", "For a .gguf: where tokenizer and embedders for images and sounds are.")
    ] = None,
    upload_repo: Annotated[str | None, option("REPO", "Upload the conversion to the hub.")] = None,
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Convert Gemma 4 and its drafter for MLX, quantized, in less memory than the model has."""
    files = find_gguf(hf_path)
    is_packed = files is not None and has_blocks(files.text)
    settings = Settings(
        recipe=choose_recipe(recipe, q_bits, q_group_size, q_mode, dequantize, is_packed),
        dtype=computing_type(dtype),
        float32_scales=choose_scales(scales, recipe, is_packed),
        drafter=None if no_drafter else drafter,
        drafter_bits=drafter_bits,
    )
    if drafter_bits not in BITS["affine"]:
        raise ValueError(
            f"drafter-bits is {drafter_bits}; expected one of {', '.join(map(str, sorted(BITS['affine'])))}"
        )
    if media_from is not None and files is None:
        raise ValueError("media-from is for a .gguf file; a model folder has its own")
    output = check_output(expanded(mlx_path))
    if upload_repo is not None:
        from mlx_gemma4.convert.upload import check_login  # here: a conversion alone needs no HTTP client

        check_login()
    source = open_sources(hf_path, files, media_from)
    is_local = expanded(hf_path).exists()
    beside = (media_from or str(source.folder)) if is_local and files is not None else hf_path
    convert_folder(source, hf_path, beside, output, upload_repo or output.absolute().name, settings)
    if upload_repo is not None:
        from mlx_gemma4.convert.upload import upload

        upload(output, upload_repo)


# --- options -----------------------------------------------------------------------------------


def choose_recipe(
    name: str | None, bits: int | None, group_size: int | None, mode: str | None, dequantize: bool, is_packed: bool
) -> Recipe | None:
    """The recipe that the options ask for; None to dequantize. ValueError if they exclude each other.

    is_packed: it is for a .gguf that is quantized.
    """
    own = [
        text for text, value in (("q-bits", bits), ("q-group-size", group_size), ("q-mode", mode)) if value is not None
    ]
    asked = ([f"recipe {name}"] if name is not None else []) + own
    if dequantize:
        if asked or is_packed:
            raise ValueError(f"dequantize excludes {asked[0] if asked else 'a .gguf'}; expected one of them")
        return None
    if name is not None and own:
        raise ValueError(f"recipe excludes {own[0]}; expected one of them")
    if is_packed and asked and name != "qat":
        raise ValueError(f"the .gguf is quantized already and excludes {asked[0]}; expected recipe qat")
    if own:
        return uniform_recipe(bits, group_size, mode)
    return named_recipe(name or ("qat" if is_packed else RECIPES[0]))


def choose_scales(name: str | None, recipe: str | None, is_packed: bool) -> bool:
    """Whether a lattice's scales are float32."""
    if name not in (None, "bfloat16", "float32"):
        raise ValueError(f"scales is {shown(name)}; expected bfloat16 or float32")
    if name is not None and recipe != "qat" and not is_packed:
        raise ValueError("scales is for recipe qat; the others have the type of the rest, dtype")
    return name == "float32"


def check_output(path: Path, option: str = "mlx-path") -> Path:
    check_name(path, option)
    there = next(own for own in (path, *path.absolute().parents) if own.exists())
    if path.is_symlink() or path.name in ("", "..") or not there.is_dir():
        raise ValueError(f"{path} is no name for a new folder; expected one, for {option}")
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is a folder that is not empty; expected a new one, for {option}")
    check_name(part_of(path), option)
    return path


# --- what there is to convert ------------------------------------------------------------------


@dataclass(frozen=True)
class GGUF:
    """Files of llama.cpp's."""

    text: Path
    media: Path | None  # mmproj: the embedders for images and sounds


def find_gguf(path_or_hub_id: str) -> GGUF | None:
    """The .gguf files that are meant, downloaded if they are on the hub; None for a model folder."""
    path = expanded(path_or_hub_id)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return GGUF(path, only([file for file in path.parent.glob("*.gguf") if is_media(file)]))
    if not path.is_dir():
        if path_or_hub_id.count("/") != 1 or not path_or_hub_id.lower().endswith("gguf"):
            return None
        from mlx_gemma4.weights.hub import GGUF_PATTERNS, download

        path = download(path_or_hub_id, GGUF_PATTERNS)
    elif any(path.glob("model*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    text = only([file for file in files if not is_media(file)])
    return GGUF(text, only([file for file in files if is_media(file)])) if text is not None else None


def is_media(file: Path) -> bool:
    return "mmproj" in file.name.lower()


def only(files: list[Path]) -> Path | None:
    if len(files) > 1:
        raise CheckpointError(
            f"{files[0].parent} has {len(files)} .gguf files of a kind; expected one, as {files[0].name} alone"
        )
    return files[0] if files else None


def open_sources(hf_path: str, files: GGUF | None, media_from: str | None) -> Source:
    """The target, looked through; downloaded if it is a hub id."""
    if files is None:
        folder = find_folder(hf_path)
        check_tokenizer(folder)
        return open_target(folder)
    if media_from is None and not (files.text.parent / "config.json").exists():
        what = "tokenizer" if files.media else "tokenizer and the embedders for images and sounds"
        raise CheckpointError(
            f"{files.text} holds the text model alone; expected --media-from, a model folder or hub id with "
            f"config.json, {what}, such as google/gemma-4-12B-it"
        )
    folder = find_settings(media_from, files)
    check_tokenizer(folder)
    return open_gguf(files.text, files.media, folder)


def find_settings(media_from: str | None, files: GGUF) -> Path:
    """The folder of config.json and tokenizer; weights are downloaded only if the embedders are needed from there."""
    if media_from is None:
        return files.text.parent
    if files.media is None or expanded(media_from).exists():
        return find_folder(media_from)
    from mlx_gemma4.weights.hub import SETTINGS, download

    return download(media_from, SETTINGS)


def check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder} has no tokenizer.json; expected a model folder with its tokenizer")


def target_job(source: Source, name: str, settings: Settings) -> Job:
    if settings.recipe is None:
        if not source.is_quantized:
            raise CheckpointError(f"{name} is not quantized; expected a quantized model, to dequantize")
        return make_job(source, Recipe("full precision", None), settings.dtype)
    if source.is_quantized:
        raise CheckpointError(f"{name} is quantized already; expected the original, or dequantize to get near it")
    job = make_job(source, settings.recipe, settings.dtype, settings.float32_scales)
    if settings.recipe.lattice and not job.on_lattice:
        raise none_on_lattice(job, name)
    return job


def none_on_lattice(job: Job, name: str) -> CheckpointError:
    expected = "a …-qat-q4_0-unquantized checkpoint for recipe qat, or another recipe"
    if any(isinstance(tensor, GGUFTensor) and tensor.is_packed for tensor in job.tensors.values()):
        expected = "a .gguf in Q4_0 or in full precision"  # which of the recipes take no other than qat
    return CheckpointError(
        f"none of the {len(job.planned)} matrices of {name} lies on a 4-bit lattice; expected {expected}"
    )


def drafter_job(source: Source, settings: Settings) -> Job:
    """The drafter by the recipe's kind, at its own bits; one that is quantized stays as it is."""
    if settings.recipe is None:
        return make_job(source, Recipe("full precision", None), settings.dtype)
    if source.is_quantized:
        return keep_job(source, settings.dtype)
    recipe = uniform_recipe(settings.drafter_bits, None, None)
    recipe = replace(recipe, strict=False, lattice=settings.recipe.lattice)
    return make_job(source, recipe, settings.dtype, settings.float32_scales)


def find_drafter_source(target: Source, beside: str, drafter: str | None) -> Source | None:
    choice = find_drafter(beside, target.folder, drafter)
    if choice is None:
        if drafter is not None:
            note("there is no drafter beside the model: it is converted alone")
        return None
    assert isinstance(target.parsed, ModelConfig)
    note(f"drafter: {choice.name}")
    return open_drafter(choice.folder, target.parsed)


# --- converting --------------------------------------------------------------------------------


def convert_folder(source: Source, hf_path: str, beside: str, output: Path, name: str, settings: Settings) -> None:
    """Write the model folder `output`, whose card says `name`: all or nothing.

    beside: the model next to which a drafter is looked for.
    """
    jobs = {"": target_job(source, hf_path, settings)}
    if (found := find_drafter_source(source, beside, settings.drafter)) is not None:
        jobs[DRAFTER] = drafter_job(found, settings)
    with written(jobs, output, "Converting") as part:
        if settings.recipe is not None and settings.recipe.lattice and not jobs[""].outcome.lattices:
            raise none_on_lattice(jobs[""], hf_path)
        base_model = base_of(source.folder) if expanded(hf_path).exists() else hf_path
        is_demo = source.folder.resolve() == DEMO.resolve()  # it holds no weights of Google's
        recipe = settings.recipe.name if settings.recipe is not None else "full precision"
        add_rest(part, jobs, source, name, name_of(hf_path), None if is_demo else base_model, recipe)


@contextmanager
def written(jobs: Mapping[str, Job], output: Path, title: str) -> Iterator[Path]:
    """The models of some folders, in one that gets its name `output` when the block, which adds the rest, has ended
    without an error; then what became of them is said."""
    check_disk(output, sum(job.nbytes for job in jobs.values()))
    with finished_folder(output) as part:
        steps = (write_model(job, part / folder) for folder, job in jobs.items())
        with SizeBar(title) as bar:
            bar.count(chain.from_iterable(steps), sum(job.source_nbytes for job in jobs.values()))
        yield part
    for folder, job in jobs.items():
        print_outcome(output / folder, job)


def add_rest(
    part: Path, jobs: Mapping[str, Job], origin: Source, name: str, made_from: str, base_model: str | None, recipe: str
) -> None:
    """What a model folder has beside its weights: tokenizer and settings, which are those of `origin`, and a card."""
    target = jobs[""]
    assert isinstance(origin.parsed, ModelConfig) and isinstance(target.source.parsed, ModelConfig)
    if (said := copy_files(origin.folder, part, origin.parsed.generation)) is not None:
        note(said)
    write_card(
        part, name=name, source=made_from, base_model=base_model, recipe=recipe, target=target.outcome.figures,
        drafter=jobs[DRAFTER].outcome.figures if DRAFTER in jobs else None, config=target.source.parsed,
    )  # fmt: skip


def check_disk(output: Path, needed: int) -> None:
    """OSError if the disk has no room for the conversion."""
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if needed + SPARE_BYTES > free:
        raise OSError(
            f"the conversion needs {(needed + SPARE_BYTES) / 1e9:.2f} GB and the disk of {parent} has "
            f"{free / 1e9:.2f} GB free; expected more room, or fewer bits a weight"
        )


def print_outcome(folder: Path, job: Job) -> None:
    """What was written, and what of it is not as the recipe has it."""
    outcome = job.outcome
    print(f"{folder}: {outcome.figures.text}")
    left = [path for path, own in outcome.used.items() if own is None and job.planned.get(path) is None]
    if left and any(outcome.used.values()):
        note(f"not quantized, for the group size does not divide their columns: {some(left)}")
    if not outcome.lattices:
        return
    blocks = sum(line.blocks for line in outcome.lattices)
    inexact = sum(line.inexact for line in outcome.lattices)
    worst = max(outcome.lattices, key=lambda line: line.error)
    text = f"{len(outcome.lattices)} of {len(outcome.used)} matrices are kept on their lattice, {blocks} blocks of 32"
    if inexact:
        text += (
            f"; {inexact} ({100 * inexact / blocks:.1f} %) no bfloat16 scale gives back exactly, with a largest error "
            f"of {worst.error:.3g} in {worst.name}; {folder / LATTICE_REPORT} has them matrix by matrix"
        )
    note(text)
    kept = {line.name for line in outcome.lattices}
    off = [path for path in outcome.used if job.source.names[path] not in kept]
    if off:
        note(f"not on a lattice, and quantized as usual: {some(off)}")


def some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def note(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> int:
    return run(convert)
