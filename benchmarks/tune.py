"""How fast adapters are trained, and in how much memory, beside mlx-lm on the same text-only look-alike.

    python benchmarks/tune.py --length 512 --length 1024 --rank 8

Weights and tokens are random; half of each example is learnt. The two sides take turns, `--rounds` times, each time in
a process of its own, whose first update does not count; each figure is the median of all others. The defaults take a
minute or two on two CPU cores. The last line of standard output is JSON.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import typer
from mlx import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy_checkpoint import Shape, config

from mlx_gemma4.config import ModelConfig, read_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.tune.adapt import attach
from mlx_gemma4.tune.network import learnt_states
from mlx_gemma4.tune.rows import Branch, passage, row
from mlx_gemma4.tune.settings import Adapter
from mlx_gemma4.tune.step import Processes, slopes, update

SHAPE = Shape(
    hidden=256, mlp=1024, heads=4, kv_heads=2, head_dim=64, global_head_dim=128, window=256, vocab=32768, periods=1
)
UNCOUNTED = 1


@dataclass(frozen=True)
class Case:
    side: str  # "mlx_gemma4" | "mlx-lm"
    length: int  # tokens of an example
    batch: int
    rank: int
    grad_checkpoint: bool
    bits: int  # 0: float32
    steps: int


def examples(case: Case) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(200, SHAPE.vocab - 100, (case.batch, case.length)).tolist()


def quantized(model: nn.Module, bits: int) -> None:
    if bits:
        nn.quantize(model, 64, bits)
    mx.eval(model.parameters())


def model_config() -> ModelConfig:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config(SHAPE)))
        return read_config(Path(scratch))


def ours(case: Case) -> list[float]:
    """Seconds of each update."""
    own = model_config()
    model = Model(own)
    quantized(model.language_model, case.bits)
    attach(model, Adapter(rank=case.rank), (), 0)
    optimizer = optim.Adam(1e-4, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    members = [passage("", [Branch(ids, case.length // 2)], ()) for ids in examples(case)]
    rows = [row([member], own.text.sliding_window, lambda part: []) for member in members]
    states = partial(learnt_states, model, checkpoint=case.grad_checkpoint)
    processes, seconds = Processes(mx.distributed.init()), []
    mx.reset_peak_memory()
    for _ in range(case.steps + UNCOUNTED):
        began = time.perf_counter()
        update(model, optimizer, rows, partial(slopes, model, states=states), processes)
        seconds.append(time.perf_counter() - began)
    return seconds


def theirs(case: Case) -> list[float]:
    from mlx_lm.models import gemma4_text
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    text = config(SHAPE)["text_config"] | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    model = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(text))
    quantized(model, case.bits)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": case.rank, "scale": 10.0, "dropout": 0.0})
    seconds: list[float] = []

    class Times(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            seconds.append(1 / train_info["iterations_per_second"])

    rows = [(ids, case.length // 2) for ids in examples(case)]
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArgs(
            batch_size=case.batch, iters=case.steps + UNCOUNTED, steps_per_report=1, steps_per_save=10**9,
            adapter_file=str(Path(scratch) / "adapters.safetensors"), max_seq_length=case.length,
            grad_checkpoint=case.grad_checkpoint,
        )  # fmt: skip
        train(model, optim.Adam(1e-4), rows, None, args=args, training_callback=Times())
    return seconds


def measured(case: Case) -> dict[str, Any]:
    argv = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(
    length: Annotated[list[int], typer.Option(help="Tokens of an example; repeatable.")] = [128, 256],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Examples of an update.")] = 2,
    rank: Annotated[list[int], typer.Option(help="Repeatable.")] = [8],  # noqa: B006
    grad_checkpoint: Annotated[bool, typer.Option(help="Both sides.")] = True,
    bits: Annotated[int, typer.Option(help="Of the weights; 0 for float32.")] = 0,
    steps: Annotated[int, typer.Option(help="Updates of a round that count.")] = 2,
    rounds: Annotated[int, typer.Option(help="How often each side has its turn.")] = 2,
    case: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if case:
        own = Case(**json.loads(case))
        seconds = (ours if own.side == "mlx_gemma4" else theirs)(own)[UNCOUNTED:]
        print(json.dumps({"seconds": seconds, "peak": mx.get_peak_memory()}))
        return
    results = []
    for size, r in ((size, r) for size in length for r in rank):
        cases = [Case(side, size, batch, r, grad_checkpoint, bits, steps) for side in ("mlx_gemma4", "mlx-lm")]
        turns = [[measured(one) for one in cases] for _ in range(rounds)]
        pair = []
        for one, own_turns in zip(cases, zip(*turns, strict=True), strict=True):
            taken = median([seconds for turn in own_turns for seconds in turn["seconds"]])
            pair.append({"tokens_per_second": batch * size / taken, "peak": max(turn["peak"] for turn in own_turns)})
            results.append(asdict(one) | pair[-1])
        mine, other = pair
        print(
            f"{batch} x {size} tokens, rank {r}: {mine['tokens_per_second']:.0f} tokens/s, "
            f"{mine['peak'] / 1e9:.2f} GB; mlx-lm {other['tokens_per_second']:.0f}, {other['peak'] / 1e9:.2f} GB; "
            f"{mine['tokens_per_second'] / other['tokens_per_second']:.2f} x its speed, "
            f"{mine['peak'] / other['peak']:.2f} of its memory",
            flush=True,
        )
    print(json.dumps({"benchmark": "tune", "mlx": version("mlx"), "mlx_lm": version("mlx-lm"), "results": results}))


if __name__ == "__main__":
    typer.run(main)
