"""How close the planner's predictions of memory are to the peaks that MLX measures, each in a process of its own.

Shapes are look-alikes with random weights, made here: no download. The JSON is the last line.
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy_checkpoint import Shape, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, Sampling, generate, load
from mlx_gemma4.convert.command import convert
from mlx_gemma4.decoding.controller import MAX_DRAFTS
from mlx_gemma4.planner import predict
from mlx_gemma4.weights.load import footprint_of, parameters

REPEATS = 2  # on a busy machine MLX hands over less at once, and takes less


@dataclass(frozen=True)
class Case:
    """A request to a model: sizes are tokens; layers = 6 · periods."""

    prompt: int
    reply: int
    drafter: bool
    hidden: int = 256
    mlp: int = 1024
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    global_head_dim: int = 128
    window: int = 128
    vocab: int = 65536
    periods: int = 1
    dtype: str = "float32"
    bits: int | None = None
    kv_bits: int | None = None

    def shape(self) -> Shape:
        return Shape(
            hidden=self.hidden, mlp=self.mlp, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            global_head_dim=self.global_head_dim, window=self.window, vocab=self.vocab, periods=self.periods,
        )  # fmt: skip


TALL = Case(1000, 40, False, periods=4, hidden=512, mlp=2048, window=512, vocab=8192)
CASES = [
    Case(60, 8, False),
    Case(512, 8, False),
    Case(1300, 8, False),
    Case(1300, 8, True),
    Case(200, 12, True, bits=4),
    Case(3000, 40, True, dtype="bfloat16"),
    TALL,
    replace(TALL, drafter=True, bits=4, dtype="bfloat16"),
    replace(TALL, prompt=5000, hidden=1024, mlp=4096, heads=16, vocab=32768, periods=2),
    Case(200, 4700, False, vocab=4096, window=64),  # outgrows what is reserved at first
]
# A small model, so that reading takes minutes.
LONG = [
    Case(prompt, 16, drafter, hidden=64, mlp=128, heads=2, kv_heads=1, head_dim=32, vocab=4096, window=256)
    for prompt in (100_000, 140_000)
    for drafter in (False, True)
]
# Heads of the full layers as wide as the 12B's: what quantized caches save of the peak.
CACHES = [replace(LONG[0], prompt=32_768, global_head_dim=512, kv_bits=bits) for bits in (None, 8, 4)]


def measure(case: Case) -> tuple[int, int, int]:
    """Bytes measured and predicted, and those of the full layers' caches, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "made"
        write_checkpoint(folder, case.shape(), dtype=getattr(mx, case.dtype))
        if case.drafter:
            write_drafter(folder / "drafter", case.shape(), dtype=getattr(mx, case.dtype))
        if case.bits:
            convert(hf_path=str(folder), mlx_path=str(folder.with_name("quantized")), q_bits=case.bits)
            folder = folder.with_name("quantized")
        model, processor = load(folder, "auto" if case.drafter else None, kv_bits=case.kv_bits)
    longer = max(model.config.text.max_position_embeddings, case.prompt + case.reply + 1)
    model.config = replace(
        model.config,
        generation=replace(model.config.generation, eos_token_ids=()),
        text=replace(model.config.text, max_position_embeddings=longer),
    )
    others = mx.get_active_memory() - sum(array.nbytes for array in parameters(model).values())
    prompt = Prompt([200 + place % 100 for place in range(case.prompt)])
    peak = 0
    for _ in range(REPEATS if case.prompt < 20_000 else 1):
        reply = generate(
            model, processor, prompt, max_tokens=case.reply, sampling=Sampling(temperature=0),
            draft_length=MAX_DRAFTS if case.drafter else 0, repetition_detection="off",
        )  # fmt: skip
        peak = max(peak, reply.stats.peak_memory - others)
    predicted = predict(footprint_of(model), case.prompt, case.reply)
    return peak, predicted.peak, predicted.full


def main(
    long: Annotated[
        bool, typer.Option(help="Prompts of 100,000 tokens and more instead: a quarter of an hour.")
    ] = False,
    caches: Annotated[bool, typer.Option(help="Quantized caches behind 32,768 tokens instead: as long.")] = False,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if one is not None:
        print(json.dumps(measure(Case(**json.loads(one)))))
        return
    print(f"{platform.processor() or platform.machine()}, MLX {version('mlx')}")
    print(f"{'prompt':>7} {'reply':>6} {'drafter':>8} {'measured':>10} {'predicted':>10} {'ratio':>6} {'caches':>9}")
    results: list[dict[str, Any]] = []
    for case in LONG if long else CACHES if caches else CASES:
        command = [sys.executable, __file__, "--one", json.dumps(asdict(case))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured, predicted, full = json.loads(done.stdout.splitlines()[-1])
        ratio = predicted / measured
        results.append(asdict(case) | {"measured": measured, "predicted": predicted, "ratio": ratio, "caches": full})
        print(
            f"{case.prompt:7} {case.reply:6} {'yes' if case.drafter else 'no':>8} {measured / 1e6:7.1f} MB "
            f"{predicted / 1e6:7.1f} MB {ratio:6.3f} {full / 1e6:6.1f} MB",
            flush=True,
        )
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    typer.run(main)
