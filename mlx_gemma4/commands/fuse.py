"""The command `mlx_gemma4.fuse`: a model and an adapter -> a model folder without an adapter, for any engine."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from mlx_gemma4 import flags
from mlx_gemma4.config import ModelConfig, expanded
from mlx_gemma4.convert.card import base_of, name_of
from mlx_gemma4.convert.command import DRAFTER, add_rest, check_output, note, written
from mlx_gemma4.convert.fused import adapted_job, check_same_model, fused_paths, share_kept, with_adapter
from mlx_gemma4.convert.job import Job, Outcome, Source, keep_job, make_job, open_drafter, open_target
from mlx_gemma4.convert.recipes import Recipe, named_recipe
from mlx_gemma4.flags import option, switch
from mlx_gemma4.terminal import SizeBar, run, size_text
from mlx_gemma4.weights.load import DEFAULT_MODEL, find_drafter, find_folder
from mlx_gemma4.weights.tensors import nbytes

FULL_PRECISION = Recipe("full precision", None)


def fuse(
    adapter_path: Annotated[Path, option("FOLDER", "Of mlx_gemma4.tune, mlx-lm or PEFT.")],
    model: Annotated[
        str, option("MODEL", "What the adapter was trained on: a folder or hub id.", "--model", "-m")
    ] = DEFAULT_MODEL,
    save_path: Annotated[Path, option("FOLDER", "Where it goes.")] = Path("fused_model"),
    source: Annotated[
        str | None, option("MODEL", "The model's original weights: nothing of the adapter is lost.")
    ] = None,
    recipe: Annotated[str | None, option("NAME", "4bit, 8bit, mixed or qat; else the bits that the model has.")] = None,
    dequantize: Annotated[bool, switch("In full precision.", "--dequantize", "-d")] = False,
    gguf: Annotated[bool, switch("llama.cpp's files too: Q4_0, Q8_0 or BF16, as the bits are.", "--gguf")] = False,
    drafter: flags.DrafterName = "auto",
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Put an adapter into the weights of its model, tensor by tensor."""
    if recipe is not None and dequantize:
        raise ValueError(f"dequantize excludes recipe {recipe}; expected one of them")
    if gguf and find_spec("gguf") is None:
        raise ValueError("--gguf needs the library gguf; expected mlx_gemma4[tune] to be installed")
    chosen = None if recipe is None else named_recipe(recipe)
    output, adapter = check_output(expanded(save_path), "save-path"), expanded(adapter_path)
    base = open_target(find_folder(model))
    original = base if source is None else open_target(find_folder(source))
    if source is not None:
        check_same_model(original, base)
    fused = with_adapter(original, adapter, base)
    jobs = {"": how_to_write(fused, base, chosen, dequantize)}
    choice = find_drafter(model, base.folder, drafter, adapter=adapter)
    assert isinstance(base.parsed, ModelConfig)
    if choice is not None:
        own = open_drafter(choice.folder, base.parsed)
        jobs[DRAFTER] = make_job(own, FULL_PRECISION, None) if dequantize else keep_job(own, None)
    name = output.absolute().name
    with written(jobs, output, "Fusing") as part:
        kept = share_kept(fused, part)
        made_from = f"{name_of(source or model)} with the adapter {name_of(str(adapter))}"
        base_model = base_of(original.folder) if expanded(source or model).exists() else source or model
        bits = recipe or ("full precision" if dequantize or not base.is_quantized else "as the model")
        add_rest(part, jobs, base, name, made_from, base_model, bits)
        if gguf:
            write_gguf(fused, part, name, gguf_kind(jobs[""].outcome))
    for file in sorted(output.glob("*.gguf")):
        print(f"{file}: {size_text(file.stat().st_size)}")
    print(f"{len(fused_paths(fused))} matrices are adapted; {100 * kept:.1f} % of what the adapter changes is kept")


def how_to_write(fused: Source, base: Source, recipe: Recipe | None, dequantize: bool) -> Job:
    """base: the model; fused: that with the adapter, or its source."""
    if dequantize:
        return make_job(fused, FULL_PRECISION, None)
    if recipe is None:
        if fused.is_quantized:
            note("without --source what is adapted is stored at 8 bits: on fewer most of what was learnt would be lost")
        return adapted_job(fused, base)
    if fused.is_quantized:
        raise ValueError(
            f"recipe {recipe.name} would round weights that are quantized already; expected the original ones too, "
            "--source, or no recipe"
        )
    job = make_job(fused, recipe, None)
    if recipe.lattice and not job.on_lattice:
        raise ValueError(
            f"with the adapter none of the {len(job.planned)} matrices lies on a 4-bit lattice; expected another "
            f"recipe than {recipe.name}"
        )
    return job


def gguf_kind(outcome: Outcome) -> str:
    """The kind of file whose matrices have the bits that were written; mixed ones count as the most."""
    bits = max((0 if own is None else own.bits for path, own in outcome.used.items() if ".layers." in path), default=0)
    return "BF16" if not bits else "Q4_0" if bits <= 4 else "Q8_0"


def write_gguf(fused: Source, part: Path, name: str, kind: str) -> None:
    from mlx_gemma4.convert.export import export  # here: a folder alone needs no gguf

    total = sum(nbytes(own.shape, own.dtype) for own in fused.tensors.values())
    with SizeBar(f"Writing {kind}") as bar:
        bar.count(export(fused, part, name, kind), total)


def main() -> int:
    return run(fuse)
