"""What `fit` says of a model and a machine."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from mlx_gemma4.commands.fit import headers_anywhere, main, of_context, parse_memory
from mlx_gemma4.convert.command import convert
from mlx_gemma4.convert.recipes import nbytes_at
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.planner import Footprint, memory_limit, predict
from mlx_gemma4.terminal import size_text
from mlx_gemma4.tune.plan import TuningPlan, of_plan
from mlx_gemma4.weights import hub
from mlx_gemma4.weights.load import Checkpoint, fitted, shared_checkpoints
from mlx_gemma4.weights.tensors import DTYPE_NAMES, list_tensors


def opened(path_or_hub_id: str, drafter: str | None) -> Checkpoint:
    return fitted(headers_anywhere(path_or_hub_id, drafter))


@pytest.fixture(scope="module")
def model(wide_folder: Path) -> Footprint:
    return opened(str(wide_folder), "auto").footprint


@pytest.fixture
def run(in_process: Callable[..., Run]) -> Run:
    return in_process("mlx_gemma4.fit", main)


# --- the command -------------------------------------------------------------------------------


def memory_for(nbytes: int) -> str:
    """A Mac of which a model may hold `nbytes`."""
    return f"{nbytes * 3 // 2 + 3}B"


def test_what_fits_and_how_long(wide_folder: Path, model: Footprint, run: Run) -> None:
    room = of_context(model, 2000).peak
    status, out, err = run(wide_folder, "--context", 1000, "--memory", memory_for(room))
    assert (status, err) == (0, "")
    assert "It fits" in out and "drafter" in out
    longest = int(out.rsplit(" ", 1)[1].rstrip(".\n"))
    assert 2000 <= longest < 4096
    assert of_context(model, longest).peak <= room < of_context(model, longest + 1).peak


def test_a_context_ends_with_a_reply(model: Footprint) -> None:
    assert of_context(model, 4096) == predict(model, 3072, 1024)
    assert of_context(model, 100) == predict(model, 50, 50)
    assert of_context(model, 1) == predict(model, 1, 1)


def test_the_parts_add_up(wide_folder: Path, model: Footprint, run: Run) -> None:
    out = run(wide_folder, "--context", 4096)[1]
    found = of_context(model, 4096)
    rows = re.findall(r"^  (.{16}) *([\d.]+) ([MG])B$", out, re.MULTILINE)
    parts = {name.strip(): float(number) * {"M": 1e6, "G": 1e9}[unit] for name, number, unit in rows}
    near = {"rel": 0.01, "abs": 6e3}  # two decimals are shown
    assert parts["weights"] == pytest.approx(model.weights, **near)
    assert parts["full caches"] == pytest.approx(found.full, **near)
    assert parts["together"] == pytest.approx(found.peak, **near)
    assert parts["together"] == pytest.approx(sum(parts.values()) / 2, **near)


def test_what_would_make_it_fit(wide_folder: Path, model: Footprint, run: Run) -> None:
    room = of_context(model, 4000).peak
    status, out, _ = run(wide_folder, "--context", 4096, "--memory", memory_for(room))
    assert status == 1
    assert re.search(r"It does not fit: \d+\.\d\d MB are missing", out)
    assert "a context of 40" in out and "no drafter (--drafter none)" in out
    assert f"8 bits a weight ({size_text(nbytes_at(opened(str(wide_folder), None).config, 8))}" in out
    alone = of_context(replace(model, drafter=0), 64).peak
    assert alone < of_context(model, 1).peak
    _, out, _ = run(wide_folder, "--context", 64, "--memory", memory_for(alone))
    assert "fit: no drafter" in out


def test_fewer_bits_are_named_as_the_converter_would_make_them(
    wide_folder: Path, model: Footprint, tmp_path: Path
) -> None:
    checkpoint = opened(str(wide_folder), None)
    convert(hf_path=str(wide_folder), mlx_path=str(tmp_path / "made"), q_bits=4, dtype="bfloat16", no_drafter=True)
    made = sum(tensor.nbytes for tensor in list_tensors(tmp_path / "made").values())
    assert nbytes_at(checkpoint.config, 4) == made < model.weights


def test_nothing_makes_a_model_fit_into_nearly_nothing(wide_folder: Path, run: Run) -> None:
    status, out, _ = run(wide_folder, "--memory", "16MB")
    assert status == 1
    assert "no single change" in out


def test_without_memory_it_is_this_machine(wide_folder: Path, run: Run) -> None:
    status, out, _ = run(wide_folder)
    assert status == 0
    assert f"this machine lets a model hold {size_text(memory_limit())}" in out


@pytest.mark.parametrize(
    ("memory", "room"),
    [("16GB", "(two thirds) 11.45 GB"), ("36GB", "(two thirds) 25.77 GB"), ("64GB", "(three quarters) 51.54 GB")],
)
def test_how_much_of_a_mac_a_model_may_hold(wide_folder: Path, run: Run, memory: str, room: str) -> None:
    said = run(wide_folder, "--memory", memory)[1]
    assert f"a Mac with {memory[:2]} GB lets a model hold {room}" in said


def test_the_drafter_is_counted_only_where_it_is_used(wide_folder: Path, model: Footprint) -> None:
    assert opened(str(wide_folder), None).footprint.drafter == 0
    assert model.drafter == opened(str(wide_folder), str(wide_folder / "drafter")).footprint.drafter > 0


@pytest.mark.parametrize(("text", "nbytes"), [("16GB", 2**34), ("16b", 16), ("1.5 gb", 3 * 2**29), ("512MB", 2**29)])
def test_sizes_are_powers_of_two(text: str, nbytes: int) -> None:
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", 5000), "context is 5000; "),
        (("--context", 0), "'0'; expected a whole number above 0"),
        (("--memory", "much"), "memory is 'much'; expected a size such as 16GB"),
        (("--memory", "16"), "'16'; expected a size such as 16GB"),
        (("--memory", "0GB"), "'0GB'; expected a size such as 16GB"),
        (("--drafter", "/nowhere"), "/nowhere"),
        (("--memory", "16GB,"), "''; expected a size such as 16GB"),
        (("--memory", "16GB", "--hosts", "hosts.json"), "expected one of them"),
        (("--hosts", "/nowhere"), "/nowhere cannot be read"),
        (("--memory", "16GB,16GB", "--tune"), "2 machines and tune; expected one"),
        (("--context", "500", "--tune"), "context is 500 and tune; expected --max-seq-length"),
        (("--kv-bits", "8", "--tune"), "kv-bits is 8 and tune; expected one of them"),
        (("--drafter", "some/drafter", "--tune"), "drafter is 'some/drafter' and tune; expected one of them"),
        (("--max-seq-length", "500"), "max-seq-length is 500 without tune; expected --tune too"),
        (("--batch-size", "2"), "batch-size is 2 without tune; expected --tune too"),
        (("--rank", "4"), "rank is 4 without tune; expected --tune too"),
        (("--no-grad-checkpoint",), "grad-checkpoint is False without tune; expected --tune too"),
    ],
)
def test_wrong_requests_are_one_line(wide_folder: Path, run: Run, options: tuple[object, ...], message: str) -> None:
    status, out, err = run(wide_folder, *options)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_damaged_folders_are_one_line(wide_folder: Path, tmp_path: Path, run: Run) -> None:
    shutil.copy(wide_folder / "config.json", tmp_path)
    status, _, err = run(tmp_path)
    assert status == 2
    assert "has no model*.safetensors" in err


# --- several machines --------------------------------------------------------------------------


def test_what_fits_on_several_machines_and_how_it_is_split(wide_folder: Path, run: Run) -> None:
    status, out, err = run(wide_folder, "--context", 1000, "--memory", "800MB,400MB")
    assert (status, err) == (0, "")
    for split in ("tensors", "layers"):
        held = ", ".join(map(size_text, peaks(wide_folder, (2, 1), split)))
        assert f"By {split}: {held}: fits; the longest context that fits is 4096.\n" in out
    assert re.search(r"By tensors is faster where an exchange takes less than [\d.]+ µs at 120 GB/s", out)
    status, out, _ = run(wide_folder, "--context", 1000, "--memory", "2MB,1MB")
    assert status == 1 and out.count("does not fit, ") == 2 and "faster" not in out
    status, out, _ = run(wide_folder, "--memory", ",".join(["16GB"] * 30))
    assert status == 1 and out.count(": 30 machines share a model of ") == 2


def peaks(folder: Path, memories: tuple[int, ...], split: str) -> list[int]:
    headers = headers_anywhere(str(folder), "auto")
    found = [shared_checkpoints(headers, memories, rank, split)[split] for rank in range(len(memories))]
    return [of_context(own.footprint, 1000).peak for own in found]


SSH = """#!/bin/sh
case "$*" in *studio*) shift 6; exec sh -c "$*";; esac
echo "ssh: no route to host" >&2; exit 255
"""


def test_machines_are_asked_for_their_memory(
    wide_folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def asked(*names: str) -> tuple[int, str, str]:
        hosts = [{"ssh": name, "ips": []} for name in names]
        (tmp_path / "hosts.json").write_text(json.dumps({"backend": "ring", "hosts": hosts}))
        return run(wide_folder, "--hosts", tmp_path / "hosts.json")

    status, out, err = asked("studio", "localhost")
    assert (status, err) == (0, "") and out.count(f"{size_text(memory_limit())} of room") == 2
    assert asked("localhost", "mini")[::2] == (
        2, "error: mini cannot be asked: ssh: no route to host; expected ssh to reach it, and this package there\n",
    )  # fmt: skip
    assert "has 'studio' twice; expected each machine once" in asked("studio", "studio")[2]
    (tmp_path / "hosts.json").write_text("[1]")
    assert "is no hostfile of mlx.launch" in run(wide_folder, "--hosts", tmp_path / "hosts.json")[2]


# --- repositories (tests/test_hub.py has more, with a hub that speaks HTTP) ---------------------


def test_a_partner_on_the_hub_is_counted_as_it_will_be_quantized(
    wide_folder: Path, model: Footprint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"me/gemma-it-4bit": wide_folder, "me/gemma-it-assistant": wide_folder / "drafter"}

    def download(hub_id: str, patterns: list[str]) -> Path:
        """The configurations alone."""
        assert not any(fnmatch("model.safetensors", pattern) for pattern in patterns)
        if hub_id not in whole:
            raise CheckpointError(f"{hub_id} is no repository")
        own = tmp_path / hub_id.replace("/", "-")
        own.mkdir(exist_ok=True)
        for file in whole[hub_id].glob("*config.json"):
            shutil.copy(file, own)
        return own

    def read_header(hub_id: str, name: str) -> dict[str, dict[str, Any]]:
        assert name == "model.safetensors"
        return {
            own.name: {"dtype": DTYPE_NAMES[own.dtype], "shape": list(own.shape), "data_offsets": [0, own.nbytes]}
            for own in list_tensors(whole[hub_id]).values()
        }

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "read_header", read_header)
    found = opened("me/gemma-it-4bit", "auto").footprint
    assert replace(found, drafter=model.drafter) == model
    assert 0.1 * model.drafter < found.drafter < 0.2 * model.drafter
    assert opened("me/gemma-it-4bit", "me/gemma-it-assistant").footprint == model


# --- training ----------------------------------------------------------------------------------


def test_whether_a_training_step_fits_and_what_would_make_it(wide_folder: Path, run: Run) -> None:
    checkpoint = opened(str(wide_folder), None)
    plan = TuningPlan(512, 16, True)
    enough = of_plan(checkpoint, plan).peak
    options = ["--tune", "--max-seq-length", 512, "--rank", 16]
    status, out, err = run(wide_folder, *options, "--memory", memory_for(enough))
    assert (status, err) == (0, "") and "It fits" in out and "drafter" not in out
    status, out, _ = run(wide_folder, *options, "--no-grad-checkpoint", "--memory", memory_for(enough))
    assert status == 1 and "layers computed twice (--grad-checkpoint)" in out
    status, out, _ = run(wide_folder, *options, "--memory", memory_for(enough - 2**17))
    assert status == 1
    said = int(re.search(r"rows of (\d+) tokens \(--max", out)[1])
    assert said < 512 and of_plan(checkpoint, replace(plan, tokens=said)).peak <= enough - 2**17
    rank = int(re.search(r"\(--rank (\d+)\)", out)[1])
    assert rank < 16 and of_plan(checkpoint, replace(plan, rank=rank)).peak <= enough - 2**17


@pytest.mark.parametrize("option", ["--rank", "--max-seq-length", "--batch-size"])
def test_of_training_nothing_is_0(wide_folder: Path, run: Run, option: str) -> None:
    status, out, err = run(wide_folder, "--tune", option, 0)
    assert (status, out) == (2, "") and "expected a whole number above 0" in err
