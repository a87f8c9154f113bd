"""A fused folder computes what model and adapter do, keeps what the adapter changes, and is whole or not there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters import EVEN, converted, logits, random_adapter
from conftest import Run
from toy_checkpoint import write_checkpoint, write_drafter

from mlx_gemma4.commands.fuse import main
from mlx_gemma4.convert.command import convert
from mlx_gemma4.convert.fused import FusedTensor, with_adapter
from mlx_gemma4.convert.job import open_gguf, open_target
from mlx_gemma4.convert.recipes import uniform_recipe
from mlx_gemma4.weights.adapter import write_adapter, write_peft
from mlx_gemma4.weights.tensors import list_tensors

SMALL = 0.02  # of what is added: a tenth of a 4-bit step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source in bfloat16, what it is at 4 bits, and adapters whose changes are small."""
    place = tmp_path_factory.mktemp("fuse")
    write_checkpoint(place / "source", EVEN, dtype=mx.bfloat16)
    write_drafter(place / "source" / "drafter", EVEN)
    converted(place / "base", place / "source", uniform_recipe(4, 64, None))
    for name, dora in (("lora", False), ("dora", True)):
        weights = random_adapter(EVEN, dora=dora, lengths=1.02)
        write_adapter(place / name, weights, name, 3, SMALL, -1)
    write_peft(place / "peft", random_adapter(EVEN), "lora", 3, SMALL, None)
    return place


@pytest.fixture
def run(in_process: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return in_process("mlx_gemma4.fuse", main)


def kept(output: str) -> float:
    return float(output.rsplit("; ", 1)[1].split(" %")[0]) / 100


# What is fused, how, whose logits it is compared with, and how far they may be: bfloat16's and 8 or 4 bits' rounding.
CASES = {
    "at 8 bits beside the others": ("base", "lora", [], "base", 0.1),
    "from the source at the model's bits": ("base", "lora", ["--source", "source"], "source", 0.5),
    "dora from the source": ("base", "dora", ["--source", "source"], "source", 0.5),
    "from the source at other bits": ("base", "peft", ["--source", "source", "--recipe", "8bit"], "source", 0.1),
    "in full precision": ("base", "peft", ["--dequantize"], "base", 0.03),
    "source in full precision": ("base", "dora", ["--source", "source", "--dequantize"], "source", 0.03),
    "a model that is not quantized": ("source", "peft", [], "source", 0.03),
    "and then quantized": ("source", "lora", ["--recipe", "8bit"], "source", 0.1),
}
WHOLE = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"]


def error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The root of the mean square, of the logits' spread."""
    return max(float((one - other).std() / other.std()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_fused_folder_keeps_what_the_adapter_changes_and_is_whole(run: Run, place: Path, case: str) -> None:
    base, adapter, options, like, far = CASES[case]
    words = [place / word if word == "source" else word for word in options]
    status, out, err = run("--model", place / base, "--adapter-path", place / adapter, "--save-path", "fused", *words)
    assert status == 0, err
    assert kept(out) > 0.9, out
    folder = Path("fused")
    config = json.loads((folder / "config.json").read_text())
    assert ("quantization" in config) == ("--dequantize" not in options and (base == "base" or "--recipe" in options))
    for name in [*WHOLE, "drafter/config.json"]:
        assert (folder / name).is_file(), name
    assert any(path.startswith("vision_embedder.") for path in list_tensors(folder))
    adapted = logits(place / like, adapter=place / adapter, dtype="float32")
    found = error(logits(folder, dtype="float32"), adapted)
    assert found < far, found
    assert ("stored at 8 bits" in err) == (case == "at 8 bits beside the others")


@pytest.mark.parametrize(
    ("options", "kind"), [(["--dequantize"], "BF16"), ([], "Q8_0"), (["--source", "source"], "Q4_0")]
)
def test_llama_cpp_s_files_hold_the_fused_model(run: Run, place: Path, options: list[str], kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    words = [place / word if word == "source" else word for word in options]
    base = ["--model", place / "base", "--adapter-path", place / "lora", "--save-path", "fused", "--gguf"]
    status, out, err = run(*base, *words)
    assert status == 0, err
    files = Path(f"fused/fused-{kind}.gguf"), Path("fused/mmproj-fused.gguf")
    assert all(f"\n{file}: " in out for file in files)
    text, media = (gguf.GGUFReader(file) for file in files)
    assert text.get_field("general.architecture").contents() == "gemma4"
    assert len(text.get_field("tokenizer.ggml.tokens").contents()) == EVEN.vocab
    assert media.get_field("clip.vision.projector_type").contents() == "gemma4uv"
    assert {tensor.name for tensor in text.tensors} >= {"rope_freqs.weight", "token_embd.weight", "blk.0.attn_q.weight"}
    back = open_gguf(*files, Path("fused"))
    base = open_target(place / "base")
    fused = with_adapter(open_target(place / "source") if "source" in options else base, place / "lora", base)
    assert back.tensors.keys() == fused.tensors.keys()
    bound = {"BF16": 0.01, "Q8_0": 0.02, "Q4_0": 0.2}[kind]
    for path, tensor in fused.tensors.items():
        found, value = (own.rows(0, own.shape[0]).astype(mx.float32) for own in (back.tensors[path], tensor))
        assert mx.linalg.norm(found - value).item() <= bound * mx.linalg.norm(value).item(), path


def test_what_is_not_adapted_stays_as_it_is(run: Run, place: Path) -> None:
    write_adapter(Path("one"), random_adapter(EVEN, ("mlp.up_proj",), layers=1), "lora", 3, 1.0, 1)
    status, _, err = run("--model", place / "base", "--adapter-path", "one", "--save-path", "fused")
    assert status == 0, err
    before, after = list_tensors(place / "base"), list_tensors(Path("fused"))
    assert before.keys() == after.keys()
    changed = {path for path in before if not mx.array_equal(before[path].read(), after[path].read()).item()}
    assert {path.rpartition(".")[0] for path in changed} == {"language_model.layers.5.mlp.up_proj"}
    config = json.loads(Path("fused/config.json").read_text())["quantization"]
    assert config["bits"] == 4 and config["language_model.model.layers.5.mlp.up_proj"]["bits"] == 8


@pytest.mark.parametrize("scales", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", [[], ["--source", "original"]])
def test_a_lattice_that_is_not_adapted_is_kept(run: Run, place: Path, options: list[str], scales: str) -> None:
    """Quantized anew it would be rounded, from whichever weights."""
    shutil.copytree(place / "source", "original")
    weights = mx.load("original/model.safetensors")
    codes = np.array([-8, *range(-3, 4)] * 4, np.float32)  # of a block, whose grid MLX would lay otherwise
    for name, value in weights.items():
        if value.ndim == 2 and name.endswith("_proj.weight"):
            weights[name] = mx.array(np.resize(0.06 * codes, value.shape)).astype(mx.bfloat16)
    Path("original/model.safetensors").unlink()
    mx.save_safetensors("original/model.safetensors", weights)
    convert(hf_path="original", mlx_path="lattice", recipe="qat", scales=scales)
    write_adapter(Path("one"), random_adapter(EVEN, ("mlp.up_proj",), layers=1), "lora", 3, 1.0, 1)
    status, _, err = run("--model", "lattice", "--adapter-path", "one", "--save-path", "fused", *options)
    assert status == 0, err
    before, after = list_tensors(Path("lattice")), list_tensors(Path("fused"))
    changed = {
        path
        for path, old in before.items()
        if old.dtype != after[path].dtype or not mx.array_equal(old.read(), after[path].read()).item()
    }
    assert {path.rpartition(".")[0] for path in changed} == {"language_model.layers.5.mlp.up_proj"}


def test_an_adapter_that_is_not_finite_is_refused_before_anything_is_written(run: Run, place: Path) -> None:
    adapter = random_adapter(EVEN, ("mlp.up_proj",), layers=1)
    adapter["language_model.layers.5.mlp.up_proj.lora_b"] *= mx.nan
    write_adapter(Path("one"), adapter, "lora", 3, 1.0, 1)
    status, out, err = run("--model", place / "base", "--adapter-path", "one", "--save-path", "fused")
    assert (status, out) == (2, "") and not Path("fused").exists()
    assert "language_model.layers.5.mlp.up_proj.lora_b in one is not finite" in err


def test_an_adapter_of_what_the_model_has_not_is_refused(run: Run, place: Path) -> None:
    """Though its source has it."""
    shutil.copytree(place / "base", "text")
    for file in Path("text").glob("model*"):
        file.unlink()
    tensors = {own.name: own.read() for path, own in list_tensors(place / "base").items() if "embed_audio" not in path}
    mx.save_safetensors("text/model.safetensors", tensors)
    words = ["--model", "text", "--adapter-path", place / "lora", "--save-path", "fused", "--source", place / "source"]
    status, _, err = run(*words)
    assert status == 2 and "are none of this model, first 'embed_audio.embedding_projection.lora_a'" in err
    write_adapter(Path("one"), random_adapter(EVEN, ("mlp.up_proj",)), "lora", 3, 1.0, -1)
    assert run(*words, "--adapter-path", "one")[0] == 0
    assert list_tensors(Path("fused")).keys() == list_tensors(Path("text")).keys()
    assert "\nText, images, video in; text out" in Path("fused/README.md").read_text()


def test_rounded_on_the_base_s_grid_little_would_be_kept(place: Path) -> None:
    """Why the source, or 8 bits."""
    model = open_target(place / "base")
    fused = with_adapter(model, place / "lora", model)
    along = size = 0.0
    for tensor in fused.tensors.values():
        if isinstance(tensor, FusedTensor):
            base, whole = tensor.base.rows(0, tensor.shape[0]).astype(mx.float32), tensor.rows(0, tensor.shape[0])
            back = mx.dequantize(*mx.quantize(whole, 64, 4), 64, 4)
            along += ((back - base) * (whole - base)).sum().item()
            size += mx.square(whole - base).sum().item()
    assert along / size < 0.7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "4bit"], "--source"),
        (["--recipe", "4bit", "--dequantize"], "expected one of them"),
        (["--recipe", "5bit"], "expected one of"),
        (["--source", "base"], "is quantized; expected the original weights"),
        (["--source", "stranger"], "expected its source"),
        (["--source", "nowhere"], "no folder"),
        (["--source", "source", "--recipe", "qat"], "with the adapter none of the 45 matrices lies on a 4-bit lattice"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    run: Run, place: Path, options: list[str], said: str
) -> None:
    if "stranger" in options:
        write_checkpoint(Path("stranger"), EVEN, seed=5)
    words = [place / word if word in ("base", "source") else word for word in options]
    before = {file.name for file in Path().iterdir()}
    status, out, err = run("--model", place / "base", "--adapter-path", place / "lora", "--save-path", "fused", *words)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert {file.name for file in Path().iterdir()} == before


def test_killed_while_fusing_nothing_half_written_has_the_folder_s_name(place: Path, tmp_path: Path) -> None:
    words = ["--model", place / "base", "--adapter-path", place / "lora", "--save-path", tmp_path / "fused"]
    code = (
        "import os, signal\n"
        "from mlx_gemma4.convert import job\n"
        "write = job.write_tensor\n"
        "def stopped(*given):\n"
        "    stopped.count = getattr(stopped, 'count', 0) + 1\n"
        "    if stopped.count == 20: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    yield from write(*given)\n"
        "job.write_tensor = stopped\n"
        "from mlx_gemma4.entry import fuse\n"
        "fuse()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == []
