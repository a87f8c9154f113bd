"""Training: its gradients, its results, and that it goes on where it stopped."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from machines import free_port
from mlx import nn
from toy_checkpoint import TINY, Shape, config, write_checkpoint

from mlx_gemma4 import Prompt, Sampling, generate, load
from mlx_gemma4.config import read_config
from mlx_gemma4.convert.command import main as convert
from mlx_gemma4.model.decoder import Decoder
from mlx_gemma4.model.drafter import Drafter
from mlx_gemma4.model.matrix import blocks
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.tune.loss import BLOCK, learnt, surprises
from mlx_gemma4.tune.network import hidden_states, learnt_states, turns_of
from mlx_gemma4.tune.plan import TuningPlan, of_plan
from mlx_gemma4.tune.rows import Branch, Row, passage, row
from mlx_gemma4.tune.state import flat, save, trees_of
from mlx_gemma4.weights.load import find_drafter, open_checkpoint, read_values
from mlx_gemma4.weights.tensors import conversion_name

pytest.importorskip("mlx_lm")
from mlx_gemma4.tune import command
from mlx_gemma4.tune.adapt import attach
from mlx_gemma4.tune.drafter import followers, propose, unfreeze_matrices, write_drafter
from mlx_gemma4.tune.run import Data, Rows, Schedule
from mlx_gemma4.tune.settings import Adapter, Settings
from mlx_gemma4.tune.step import gradients, rate_at

ROOT = Path(__file__).parents[2]


def opened(folder: Path, seed: int = 0, **adapter: Any) -> Model:
    """With an adapter that already says something: as it begins, half of its gradients are zero."""
    checkpoint = open_checkpoint(folder, None)
    for _ in read_values(checkpoint):
        pass
    attach(checkpoint.model, Adapter(**adapter), (), seed)
    for path, value in flat(checkpoint.model.trainable_parameters()):
        if path.endswith("lora_b"):
            checkpoint.model.load_weights([(path, 0.05 * mx.random.normal(value.shape))], strict=False)
    return checkpoint.model


def text_row(lengths: tuple[int, ...] = (150, 40), seed: int = 0) -> Row:
    rng = random.Random(seed)
    ids = [[2, *(rng.randrange(200, 400) for _ in range(length - 1))] for length in lengths]
    return row([passage(str(n), [Branch(own, 5)], ()) for n, own in enumerate(ids)], TINY.window, lambda part: [])


def plain_gradients(model: Model, one: Row) -> dict[str, mx.array]:
    def total(weights: Any) -> mx.array:
        model.update(weights)
        logits = model.language_model.head(hidden_states(model, one, checkpoint=False)[0])[0]
        return nn.losses.cross_entropy(logits[mx.array(one.places)], mx.array(one.targets)).sum()

    weights = model.trainable_parameters()
    found = mx.grad(total)(weights)
    model.update(weights)
    return dict(flat(found))


def slopes(model: Model, one: Row, checkpoint: bool = True) -> tuple[mx.array, Any]:
    return gradients(model, one, lambda: learnt_states(model, one, checkpoint))


def furthest(found: Any, wanted: dict[str, mx.array]) -> float:
    pairs = [(value, wanted[path]) for path, value in flat(found)]
    assert len(pairs) == len(wanted)
    return max(float(mx.linalg.norm(one - two) / mx.linalg.norm(two)) for one, two in pairs)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_all_logits_at_once(tiny_folder: Path, kind: str, checkpoint: bool) -> None:
    model, one = opened(tiny_folder, fine_tune_type=kind, rank=4), text_row()
    assert len(one.targets) > BLOCK
    each, found = slopes(model, one, checkpoint)
    assert furthest(found, plain_gradients(model, one)) < 1e-5
    hidden = hidden_states(model, one, checkpoint=False)[0][0][mx.array(one.places)]
    assert mx.allclose(each, surprises(model.language_model, hidden, mx.array(one.targets)), atol=1e-4)


def decoder_of(folder: Path, **sizes: int) -> Decoder:
    (folder / "config.json").write_text(json.dumps(config(replace(TINY, periods=1, **sizes))))
    return Model(read_config(folder)).language_model


def test_four_arrays_of_a_blocks_logits_are_alive(tmp_path: Path) -> None:
    """However many blocks there are."""
    decoder = decoder_of(tmp_path, vocab=16384)
    decoder.freeze()
    hidden, targets = mx.random.normal((4 * BLOCK, 64)), mx.arange(4 * BLOCK)
    mx.eval(hidden, decoder.parameters())
    (_, stages), by = mx.value_and_grad(lambda own: learnt(decoder, own, targets, mx.ones(4 * BLOCK))[::2])(hidden)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for stage in stages:
        mx.eval(stage)
    mx.eval(by)
    assert mx.get_peak_memory() - before < 4.3 * BLOCK * 16384 * 4


def test_a_head_that_learns_has_the_gradient_of_all_logits_at_once(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path)
    decoder.embed_tokens.weight = mx.random.normal(decoder.embed_tokens.weight.shape, key=mx.random.key(0))
    hidden, targets = mx.random.normal((2 * BLOCK - 9, 64), key=mx.random.key(1)), mx.arange(2 * BLOCK - 9)
    weights = mx.random.uniform(shape=targets.shape, key=mx.random.key(2))

    def own(head: mx.array, hidden: mx.array) -> mx.array:
        decoder.embed_tokens.weight = head
        return learnt(decoder, hidden, targets, weights)[0]

    def plain(head: mx.array, hidden: mx.array) -> mx.array:
        decoder.embed_tokens.weight = head
        return (weights * nn.losses.cross_entropy(decoder.head(hidden[None])[0], targets)).sum()

    head = decoder.embed_tokens.weight
    for mine, theirs in zip(*(mx.grad(way, (0, 1))(head, hidden) for way in (own, plain)), strict=True):
        assert mx.linalg.norm(mine - theirs) < 1e-5 * mx.linalg.norm(theirs)


def test_examples_in_one_row_are_as_if_alone(tiny_folder: Path) -> None:
    model, both = opened(tiny_folder, rank=4), text_row()
    _, found = slopes(model, both)
    rng = random.Random(0)
    ids = [[2, *(rng.randrange(200, 400) for _ in range(length - 1))] for length in (150, 40)]
    alone = [slopes(model, row([passage("", [Branch(own, 5)], ())], TINY.window, lambda part: []))[1] for own in ids]
    summed = {path: one + two for (path, one), (_, two) in zip(*map(flat, alone), strict=True)}
    assert furthest(found, summed) < 1e-5


def test_the_loss_has_the_slope_that_differences_show(tiny_folder: Path) -> None:
    model, one = opened(tiny_folder, rank=4), text_row((40,))
    by = dict(flat(slopes(model, one)[1]))
    for path, value in flat(model.trainable_parameters())[::17]:
        way = mx.random.normal(value.shape, key=mx.random.key(1))
        way = way / mx.linalg.norm(way)

        def loss(by: float, path: str = path, value: mx.array = value, way: mx.array = way) -> float:
            model.load_weights([(path, value + by * way)], strict=False)
            hidden = hidden_states(model, one, checkpoint=False)[0][0]
            return float(surprises(model.language_model, hidden[mx.array(one.places)], mx.array(one.targets)).sum())

        wanted = (loss(0.02) - loss(-0.02)) / 0.04
        model.load_weights([(path, value)], strict=False)
        assert abs(wanted - float((by[path] * way).sum())) < 0.02 * max(1.0, abs(wanted))


QUANTIZABLE = Shape(hidden=64, mlp=128, heads=4, head_dim=32, global_head_dim=64)


def test_over_quantized_weights_gradients_are_those_over_the_same_values(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", QUANTIZABLE)
    for source, target, options in (("whole", "q", ["--recipe", "4bit"]), ("q", "plain", ["--dequantize"])):
        argv = ["convert", "--hf-path", str(tmp_path / source), "--mlx-path", str(tmp_path / target), *options]
        assert run(argv, convert) == 0
    one, values = text_row(), []
    for name in ("q", "plain"):
        model = opened(tmp_path / name, rank=4)
        assert isinstance(model.language_model.layers[0].mlp.up_proj.linear, nn.QuantizedLinear) == (name == "q")
        values.append(slopes(model, one)[1])
    assert furthest(values[0], dict(flat(values[1]))) < 1e-4
    assert whole.exists()


def test_no_block_of_the_head_changes_the_loss(tiny_folder: Path) -> None:
    model = opened(tiny_folder)
    hidden = mx.random.normal((2 * BLOCK + 3, TINY.hidden), key=mx.random.key(0))
    targets = mx.arange(len(hidden))
    _, each, _ = learnt(model.language_model, hidden, targets, mx.ones(targets.shape))
    logits = model.language_model.head(hidden[None])[0]
    assert mx.allclose(each, nn.losses.cross_entropy(logits, targets), atol=1e-5)


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(n, 100, 1.0, 10) for n in range(100)]
    assert rates[10] == 1
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.2 and 0 <= rates[-1] < 0.01
    assert rate_at(0, 1, 1.0, 0) == 1


def test_a_schedule_without_end_takes_no_time(tiny: tuple[Model, Processor]) -> None:
    """Every example once before any comes again, beginning with the longest row."""
    own = [[passage(str(n), [Branch([2] * (600 if n == 777 else 9), 5)], ())] for n in range(1000)]
    settings = Settings(Adapter(), 10**11, 2, 2, 1e-4, 0, 2048, 200, 100, 25, 0, True, 0, None)
    found = Schedule(Rows(tiny[1], settings, Data(own, 0)), settings, 1)
    assert len(found) == 10**11 // 2
    assert 777 in found[0]
    assert sorted(index for number in range(250) for index in found[number]) == list(range(1000))
    assert len(found[len(found) - 1]) == 4
    assert next(iter(found)) == found[0]


# --- the command -------------------------------------------------------------------------------


def run(argv: list[str], main: Any = command.main) -> int:
    before, sys.argv = sys.argv, argv
    try:
        status: int = main()
        return status
    finally:
        sys.argv = before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng, folder = random.Random(0), tmp_path / "data"
    folder.mkdir()
    rows = [
        {"prompt": f"say {letter}", "completion": letter * rng.choice((2, 3))}
        for letter in (rng.choice("abcdef") for _ in range(23))
    ]
    for name, own in (("train", rows), ("valid", rows[:5]), ("test", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
    return folder


def options(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    own = ["tune", "--model", str(model), "--data", str(data), "--adapter-path", str(out)]
    return [*own, "--iters", "12", "--batch-size", "3", "--steps-per-eval", "5", "--save-every", "2", *more]


def test_it_learns_and_is_used_by_load(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"say {letter}", "completion": letter * 3} for letter in "abcdefgh"]
    for name in ("train", "valid", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    argv = options(tiny_folder, data, tmp_path / "out", "--learning-rate", "0.004", "--test", "--iters", "60")
    assert run([*argv, "--batch-size", "8", "--steps-per-eval", "20"]) == 0
    printed = capsys.readouterr().out
    assert "8 of 8 replies are the expected ones" in printed
    model, processor = load(tiny_folder, adapter=tmp_path / "out")
    assert generate(model, processor, "say e", max_tokens=9, sampling=Sampling(temperature=0)).text == "eee"
    lines = (tmp_path / "out" / "loss.csv").read_text().splitlines()
    first, last = (float(lines[n].split(",")[2]) for n in (1, -1))
    assert lines[1].startswith("0,,")  # validated before the first step
    assert last < 0.1 * first
    assert run([*argv, "--rank", "4"]) == 2
    assert "holds a run with another" in capsys.readouterr().err


def test_what_is_written_for_peft_names_every_matrix_as_transformers_does(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    assert (
        run(options(tiny_folder, data, tmp_path / "out", "--iters", "2", "--rank", "4", "--scale", "5", "--peft")) == 0
    )
    config = json.loads((tmp_path / "out" / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"] / config["r"]) == ("LORA", 4, 5)
    own, theirs = weights(tmp_path / "out"), mx.load(str(tmp_path / "out" / "peft" / "adapter_model.safetensors"))
    assert len(own) == len(theirs) == 2 * len(config["target_modules"])
    for name, value in own.items():  # language_model.model.layers… here, model.language_model.layers… there
        module, _, part = name.replace("language_model.model.", "model.language_model.").rpartition(".")
        assert module in config["target_modules"]
        found = theirs[
            f"base_model.model.{module}.{part.replace('lora_a', 'lora_A').replace('lora_b', 'lora_B')}.weight"
        ]
        assert np.array_equal(np.array(found).T, value)
    ones = [open_checkpoint(tiny_folder, None, adapter=tmp_path / name).tensors for name in ("out", "out/peft")]
    for path in (path for path in ones[0] if ".lora_" in path):
        assert mx.allclose(ones[0][path].read(), ones[1][path].read(), 1e-6)


def test_training_that_does_not_fit_is_refused_before_weights_are_read(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = options(tiny_folder, data, tmp_path / "out", "--iters", "1")
    assert run(argv) == 0
    said = re.search(
        r"rows of (\d+) tokens, rank 8, layers computed twice: training takes ([\d.]+) MB", capsys.readouterr().err
    )
    assert said is not None
    checkpoint = open_checkpoint(tiny_folder, None)
    found = of_plan(checkpoint, TuningPlan(int(said[1]), 8, True)).peak
    assert f"{found / 1e6:.2f}" == said[2]
    monkeypatch.setattr(command, "memory_limit", lambda: found - 1)
    assert run([*argv, "--adapter-path", str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err
    assert "error: training with rows of" in error and "expected rank 4 (--rank 4)" in error
    assert not (tmp_path / "other").exists()
    assert run([*argv, "--adapter-path", str(tmp_path / "other"), "--rank", "4"]) == 0


def weights(folder: Path, file: str = "adapters.safetensors") -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(folder / file)).items()}


def equal(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    curves = [[line.split(",")[:5] for line in (own / "loss.csv").read_text().splitlines()] for own in (one, other)]
    return curves[0] == curves[1] and all(np.array_equal(mine[name], theirs[name]) for name in mine | theirs)


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    assert run(options(tiny_folder, data, tmp_path / "whole")) == 0
    out, rng = tmp_path / "killed", random.Random(1)
    argv = options(tiny_folder, data, out)
    for kind in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_gemma4.tune", *argv[1:]], cwd=ROOT, stderr=subprocess.PIPE
        )
        for _ in range(3000):  # until it has saved something, and a little more
            if process.poll() is not None or (out / "state.safetensors").exists():
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        process.send_signal(kind)
        process.communicate()
    assert run(argv) == 0
    assert equal(tmp_path / "whole", out)
    assert not [file for file in out.iterdir() if "part" in file.name and file.suffix == ""]
    assert run(argv) == 0  # nothing is left to do
    assert equal(tmp_path / "whole", out)


def test_a_run_that_ended_before_its_first_state_begins_anew(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(tiny_folder, data, tmp_path / "out", "--iters", "4")
    assert run(argv) == 0
    kept = weights(tmp_path / "out")
    (tmp_path / "out" / "state.safetensors").unlink()  # the weights were written before the first step, too
    assert run([*argv, "--rank", "4"]) == run([*argv, "--seed", "1"]) == 2
    assert "holds the adapter of another run" in capsys.readouterr().err
    assert run(argv) == 0
    found = weights(tmp_path / "out")
    assert all(np.array_equal(kept[name], found[name]) for name in kept | found)


def test_accumulated_batches_are_a_larger_one(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Though they have other numbers of learnt tokens."""
    one = options(tiny_folder, data, tmp_path / "one", "--iters", "4", "--batch-size", "6", "--warmup", "0")
    two = options(
        tiny_folder, data, tmp_path / "two", "--iters", "8", "--grad-accumulation-steps", "2", "--warmup", "0"
    )
    assert run(one) == run(two) == 0
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.allclose(mine[name], theirs[name], atol=1e-6) for name in mine | theirs)


def test_two_processes_are_one_with_twice_the_batch(planted_folder: Path, data: Path, tmp_path: Path) -> None:
    """The drafter's as well."""
    more = "--iters", "6", "--steps-per-eval", "2", "--val-batches", "1", "--train-drafter"
    assert run(options(planted_folder, data, tmp_path / "one", *more, "--batch-size", "4")) == 0
    with open(data / "train.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "a" * 600, "completion": "b"}) + "\n")
    argv = options(planted_folder, data, tmp_path / "two", *more, "--batch-size", "2")
    argv += ["--drop-long", "--max-seq-length", "512"]
    (status, first), (other_status, second) = launched([argv, argv], tmp_path)
    assert (status, other_status) == (0, 0)
    assert "1 of 24 examples" in first and "6 of 6: loss" in first and second == ""  # one tells of all
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.allclose(mine[name], theirs[name], atol=2e-6) for name in mine | theirs)
    mine, theirs = (weights(tmp_path / name / "drafter", "model.safetensors") for name in ("one", "two"))
    assert mine.keys() == theirs.keys() and all(np.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)
    ones, twos = validations(tmp_path / "one"), validations(tmp_path / "two")
    assert len(ones) == 4 and np.allclose(ones, twos, rtol=1e-4)


def launched(each: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit status and standard error of processes that work together."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in each]))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mlx_gemma4.tune", *argv[1:]], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
        )
        for rank, argv in enumerate(each)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, told, strict=True)]


def test_processes_at_other_places_are_refused(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Their sums would be of other things, and the loss whatever came of them."""
    assert run(options(tiny_folder, data, tmp_path / "one", "--iters", "2")) == 0
    trees, about = trees_of(tmp_path / "one" / "state.safetensors")
    settings = json.loads(about["settings"])
    about["settings"] = json.dumps(settings | {"processes": 2})  # as of two that were stopped
    save(tmp_path / "one" / "state.safetensors", trees, about)
    each = [options(tiny_folder, data, tmp_path / name, "--iters", "2") for name in ("one", "two")]
    for status, text in launched(each, tmp_path):
        assert status == 2 and "error: the processes are not at the same place of the same run" in text


def validations(folder: Path) -> list[float]:
    lines = [line.split(",") for line in (folder / "loss.csv").read_text().splitlines()[1:]]
    return [float(line[2]) for line in lines if line[2]]


def test_patience_ends_a_run_and_the_best_weights_are_kept(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    argv = options(tiny_folder, data, tmp_path / "out", "--learning-rate", "1", "--scale", "20", "--patience", "1")
    assert run([*argv, "--steps-per-eval", "1", "--iters", "99999999999", "--warmup", "0"]) == 0
    lines = [line.split(",") for line in (tmp_path / "out" / "loss.csv").read_text().splitlines()[1:]]
    assert len(lines) < 20
    losses = [float(line[2]) for line in lines]
    assert losses.index(min(losses)) == len(losses) - 2
    kept, last = weights(tmp_path / "out"), trees_of(tmp_path / "out" / "state.safetensors")[0]["model"]
    for path, value in flat(last):
        assert not np.array_equal(np.array(value), kept[conversion_name(path)])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rank", "0"], "rank is 0"),
        (["--num-layers", "99"], "num_layers is 99; expected 1 to 6"),
        (["--scale", "nan"], "scale is nan"),
        (["--learning-rate", "-1"], "learning_rate is -1"),
        (["--iters", "0"], "expected a whole number above 0"),
        (["--iters", str(2**63)], "iters is 9223372036854775808; expected less than 2**63"),
        (["--batch-size", "100000000"], "an update has 100000000 examples, batch_size times"),
        (["--batch-size", "4", "--grad-accumulation-steps", "9999"], "expected at most 4096"),
        (["--val-batches", "0"], "val_batches is 0"),
        (["--seed", str(2**64)], "seed is 18446744073709551616; expected less than 2**64"),
        (["--fine-tune-type", "full"], "expected lora or dora"),
        (["--dtype", "float16"], "small gradients are lost"),
        (["--max-seq-length", "5"], "train.jsonl, line 1: the example has"),
        (["--max-seq-length", "5", "--drop-long"], "all 23 examples are longer"),
        (["--adapter-path", __file__], "test_run.py is a file; expected a folder, for --adapter-path"),
        (["--adapter-path", f"{__file__}/out"], "test_run.py is a file; expected a folder, for --adapter-path"),
        (["--resume-adapter-file", "none.safetensors"], "none.safetensors is no file; expected an adapter's"),
        (["--resume-adapter-file", "."], ". is no file; expected an adapter's weights, for --resume-adapter-file"),
        (["--model", "nowhere"], "'nowhere' is no folder"),
        (["--data", "nowhere"], "'nowhere' is no folder"),
        (["--image-budget", "3"], "error: image_budget is 3"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_before_anything_is_written(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert run([*options(tiny_folder, data, tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_does_not_go_beside_a_models_weights_or_the_examples(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").symlink_to(tiny_folder)
    for folder, what in ((tiny_folder, "a model"), (tmp_path / "model", "a model"), (data, "the examples")):
        before = sorted(folder.iterdir())
        assert run(options(tiny_folder, data, folder, "--iters", "1")) == 2
        assert f"{folder} holds {what}; expected a new folder, for --adapter-path" in capsys.readouterr().err
        assert sorted(folder.iterdir()) == before


def test_an_adapter_that_cannot_be_written_is_one_line_and_leaves_nothing(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert run(options(tiny_folder, data, tmp_path / "out")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'out' / 'adapters.safetensors'} cannot be written")
    assert not list((tmp_path / "out").glob("*part*"))


def test_long_examples_are_left_out_when_asked_and_counted(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(data / "train.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "a" * 100, "completion": "b"}) + "\n")
    argv = options(tiny_folder, data, tmp_path / "out", "--max-seq-length", "60", "--iters", "1")
    assert run(argv) == 2
    assert "line 24: the example has" in capsys.readouterr().err
    assert run([*argv, "--drop-long"]) == 0
    assert "1 of 24 examples of train are longer than 60 tokens, left out" in capsys.readouterr().err
    with open(data / "train.jsonl", "a") as file:  # beyond the context, and beyond any
        for row in ({"prompt": "a" * 2**20, "completion": "b"}, {"text": "ab" * 5000}, {"text": "a" * 2**20}):
            file.write(json.dumps(row) + "\n")
    argv = options(tiny_folder, data, tmp_path / "other", "--max-seq-length", "60", "--iters", "1")
    assert run([*argv, "--drop-long"]) == 0
    assert "4 of 27 examples of train are longer than 60 tokens, left out" in capsys.readouterr().err
    (data / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert run(argv) == 2
    assert "train.jsonl, line 1: the prompt has at least 65536 tokens; the context" in capsys.readouterr().err


def test_a_loss_that_is_no_number_names_its_example(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own: list[str] = []

    def wrong(model: Model, one: Row, checkpoint: bool) -> mx.array:
        own.append(one.where[1])
        return mx.where(mx.array(one.owners == 1)[:, None], mx.nan, learnt_states(model, one, checkpoint))

    monkeypatch.setattr("mlx_gemma4.tune.run.learnt_states", wrong)
    (data / "valid.jsonl").unlink()
    assert run(options(tiny_folder, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"error: {own[0]}: the loss is nan" in error
    assert "train.jsonl, line " in own[0]
    assert not (tmp_path / "out" / "adapters.safetensors").exists()


def test_another_runs_weights_are_a_beginning(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(options(tiny_folder, data, tmp_path / "one", "--iters", "4", "--learning-rate", "0.01")) == 0
    file = str(tmp_path / "one" / "adapters.safetensors")
    argv = options(
        tiny_folder, data, tmp_path / "two", "--iters", "1", "--resume-adapter-file=~/one/adapters.safetensors"
    )
    assert run([*argv, "--learning-rate", "1e-9"]) == 0
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.allclose(mine[name], theirs[name], atol=1e-6) for name in mine | theirs)
    capsys.readouterr()
    assert run(options(tiny_folder, data, tmp_path / "three", "--resume-adapter-file", file, "--rank", "4")) == 2
    assert "has the shape" in capsys.readouterr().err
    assert run(options(tiny_folder, data, tmp_path / "three", "--resume-adapter-file", file, "--scale", "20")) == 2
    assert capsys.readouterr().err.endswith(f"scale is 20 and that of {file} 10.0; expected the same --scale\n")
    mx.save_safetensors(file, {name: mx.array(value * np.nan) for name, value in mine.items()})
    assert run(options(tiny_folder, data, tmp_path / "three", "--resume-adapter-file", file)) == 2
    assert "is not finite; expected an adapter of sound numbers" in capsys.readouterr().err
    Path(file).rename(tmp_path / "adapter_model.safetensors")
    peft = str(tmp_path / "adapter_model.safetensors")
    assert run(options(tiny_folder, data, tmp_path / "three", "--resume-adapter-file", peft)) == 2
    assert "is PEFT's; expected adapters.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_an_adapter_loads_in_mlx_lm(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    from mlx_lm.models import gemma4_text
    from mlx_lm.tuner.utils import load_adapters

    assert run(options(tiny_folder, data, tmp_path / "out", "--iters", "2")) == 0
    text = json.loads((tiny_folder / "config.json").read_text())["text_config"] | {"num_kv_shared_layers": 0}

    class Wrapped(nn.Module):  # as mlx-lm's gemma4.Model has it
        def __init__(self) -> None:
            super().__init__()
            self.language_model = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(text))
            self.layers = self.language_model.layers

    names = {name for name, _ in flat(load_adapters(Wrapped(), str(tmp_path / "out")).parameters())}
    assert {name for name in weights(tmp_path / "out")} <= names


def test_the_drafter_learns_what_the_tuned_model_says(
    planted_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(planted_folder, data, tmp_path / "out", "--train-drafter", "--iters", "16", "--batch-size", "6")
    assert run([*argv, "--learning-rate", "0.004"]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"drafter: ([\d.]+) % of first drafts accepted before, ([\d.]+) % after", printed)
    assert found is not None and float(found[2]) > float(found[1])
    model, processor = load(planted_folder, adapter=tmp_path / "out")  # finds the drafter there
    reply = generate(model, processor, "say e", max_tokens=9, sampling=Sampling(temperature=0), draft_length=3)
    assert reply.stats.drafted_tokens > 0


def test_a_drafter_is_there_whole_or_as_it_was(
    planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the writing came."""
    source = planted_folder / "drafter"

    def write() -> None:
        model, _ = load(planted_folder)
        assert model.drafter is not None
        write_drafter(tmp_path / "drafter", source, model.drafter, ())

    def stopped(*given: Any) -> None:
        raise KeyboardInterrupt

    def files() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / "drafter").iterdir()}

    for name in ("mlx_gemma4.tune.drafter.write_arrays", "mlx_gemma4.tune.drafter.write_text"):
        with monkeypatch.context() as own:
            own.setattr(name, stopped)
            with pytest.raises(KeyboardInterrupt):
                write()
        assert not (tmp_path / "drafter").exists()
    (tmp_path / "drafter").mkdir()  # as an older version may have left it
    write()
    before = files()
    (tmp_path / "drafter" / "config.json").write_text(before["config.json"].decode() + "\n")
    before = files()
    for name in ("mlx_gemma4.tune.drafter.write_arrays", "mlx_gemma4.tune.drafter.write_text"):
        with monkeypatch.context() as own:
            own.setattr(name, stopped)
            with pytest.raises(KeyboardInterrupt):
                write()
        assert files() == before
    write()
    assert files() != before and files().keys() == before.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["drafter"]


def test_matrices_of_a_drafter_that_was_quantized_learn_in_float32_and_are_written_at_8_bits(
    wide_folder: Path, tmp_path: Path
) -> None:
    def read(folder: Path) -> Drafter:
        checkpoint = open_checkpoint(wide_folder, find_drafter(wide_folder, wide_folder, folder), mx.bfloat16)
        for _ in read_values(checkpoint):
            pass
        assert checkpoint.model.drafter is not None
        return checkpoint.model.drafter

    drafter = read(wide_folder / "drafter")
    nn.quantize(drafter, 64, 4, class_predicate=lambda name, part: isinstance(part, nn.Linear))
    quantized = unfreeze_matrices(drafter)
    taught = dict(flat(drafter.trainable_parameters()))
    assert taught.keys() == {f"{name}.weight" for name in quantized} and "pre_projection" in quantized
    assert {array.dtype for array in taught.values()} == {mx.float32}
    write_drafter(tmp_path / "drafter", wide_folder / "drafter", drafter, quantized)
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())["quantization"]
    assert [config[name]["bits"] for name in quantized] == [8] * len(quantized)
    for name, part in read(tmp_path / "drafter").named_modules():
        if name in quantized:
            assert part.bits == 8 and part.scales.dtype == mx.bfloat16
            off = mx.abs(mx.concatenate([*blocks(part)]) - taught[f"{name}.weight"])
            assert off.max() < 0.02 * mx.abs(taught[f"{name}.weight"]).max()


def test_the_drafter_in_training_is_the_drafter_in_use(planted_folder: Path) -> None:
    model, _ = load(planted_folder)
    checkpoint = open_checkpoint(planted_folder, find_drafter(planted_folder, planted_folder, "auto"))
    for _ in read_values(checkpoint):
        pass
    raw = checkpoint.model
    one = text_row((60,))
    assert raw.drafter is not None and followers(one).tolist() == [True] * (len(one.places) - 1) + [False]
    hidden, keys = hidden_states(raw, one, checkpoint=False)
    at = 40
    masks = {kind: mx.array(own[at : at + 1])[None, None] for kind, own in (("full_attention", one.full),
             ("sliding_attention", one.sliding))}  # fmt: skip
    turns = turns_of(raw.drafter.layers, mx.array([[at]]))
    embedding = raw.language_model.embed(mx.array(one.ids[at + 1 : at + 2])[None])
    states, _ = propose(raw.drafter, embedding, hidden[:, at : at + 1], turns, masks, keys)
    logits = raw.drafter.embed_tokens.as_linear(states)[0, 0]
    logits[mx.array(raw.config.generation.suppress_tokens)] = -mx.inf
    assert logits.argmax().item() == model.draft(Prompt(one.ids[: at + 2].tolist()), 1)[0]
