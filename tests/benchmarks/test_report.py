"""benchmarks/report.py on the demo: all filled and right, and each check fails when its fault is planted."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import checks
import compare_reports
import report

from mlx_gemma4 import load
from mlx_gemma4.config import FULL
from mlx_gemma4.convert.command import convert
from mlx_gemma4.decoding import round as rounds
from mlx_gemma4.decoding import store
from mlx_gemma4.decoding.warmup import Warmup
from mlx_gemma4.model import mask
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.load import DEMO


@pytest.fixture(autouse=True)
def plain_rounds(compiled_rounds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies are so short that compiling would take longer."""
    monkeypatch.setattr(Warmup, "is_done", lambda self, task: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in float32, for quantized products are slow on a CPU."""
    made = tmp_path_factory.mktemp("demo") / "demo"
    convert(hf_path=str(DEMO), mlx_path=str(made), dequantize=True)
    return made


@pytest.fixture(scope="module")
def subject(folder: Path) -> checks.Subject:
    return checks.Subject(*load(folder), prompt_tokens=40, reply_tokens=8)


def run(folder: Path, out: Path, **other: Any) -> None:
    tiny: dict[str, Any] = {
        "prompt_tokens": [16], "max_tokens": 6, "repeats": 1, "requests": [2], "turns": 2, "check_tokens": 40,
        "beside": ["ollama=gemma4:12b"],
    }  # fmt: skip
    report.main(str(folder), out, None, **tiny | other)


def test_a_report_is_whole_right_and_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "KINDS", {kind: report.KINDS[kind] for kind in ("code", "prose")})
    monkeypatch.setattr(report, "ROWS", (1, 4))
    monkeypatch.setattr(report, "ENGINE_TURNS", 1)
    monkeypatch.setattr(report, "SETTING_TURNS", 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # of Ollama's too, if this machine has it
    run(folder, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert {name: own["right"] for name, own in found["right"].items()} == dict.fromkeys(checks.CHECKS, True)
    assert [len(found["fast"][name]) for name in report.SECTIONS] == [1, 1, 2, 2, 1, 3, 2, 5, 2]
    for name, section in report.SECTIONS.items():
        for row in found["fast"][name]:
            assert "note" in row or all(row.get(column.key) is not None for column in section.columns), name
    assert [row.get("note") for row in found["fast"]["engines"]] == [None, "not installed"]
    settings = {row["setting"]: row for row in found["fast"]["settings"]}
    assert [settings[name]["computes_in"] for name in ("as it is", "bfloat16", "float16")] == [
        "float32", "bfloat16", "float16",
    ]  # fmt: skip
    assert ("note" in settings["and up to 400 MB"]) == (found["machine"]["device"] == "cpu")
    text = (tmp_path / "report.md").read_text()
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert text in capsys.readouterr().out and "**wrong**" not in text

    del found["right"]["JSON"], found["fast"]["rows"]
    (tmp_path / "report.json").write_text(json.dumps(found))
    with monkeypatch.context() as patched:
        patched.setattr(report.hashlib, "file_digest", lambda *given: pytest.fail("a known file was read again"))
        run(folder, tmp_path)
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["right"]["JSON"]["right"] and len(again["fast"]["rows"]) == 2
    assert again["fast"]["prompts"] == found["fast"]["prompts"]

    other = tmp_path / "other"
    other.mkdir()
    assert not list(tmp_path.glob("*.part"))
    changed = again | {"machine": again["machine"] | {"chip": "Another"}}
    (other / "report.json").write_text(json.dumps(changed))
    compare_reports.main([tmp_path / "report.json", other / "report.json"])
    out = capsys.readouterr().out
    assert "Another" in out and "| prompt 16: tokens/s |" in out and "| text code: accepted |" in out

    with pytest.raises(ValueError, match="measured with other options, or elsewhere"):
        run(folder, tmp_path, turns=3)
    (other / "report.json").write_text(json.dumps(changed | {"files": {}, "model": "gemma"}))
    kept = (other / "report.json").read_bytes()
    with pytest.raises(ValueError, match="is of another model, gemma; expected"):
        run(folder, other)
    with pytest.raises(ValueError, match=r"is of another model, gemma; expected .*demo, as"):
        compare_reports.main([tmp_path / "report.json", other / "report.json"])
    for none in (tmp_path / "nowhere.json", other):
        with pytest.raises(ValueError, match=f"^{none} is no report of .*; expected its report.json$"):
            compare_reports.main([tmp_path / "report.json", none])
    assert (other / "report.json").read_bytes() == kept and len(list(other.iterdir())) == 1
    (other / "report.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no report of"):
        run(folder, other)
    with pytest.raises(ValueError, match="is quantized already; expected the original"):
        report.main("demo", tmp_path / "recipes", "4bit")
    assert not (tmp_path / "recipes").exists()


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    folder, known = tmp_path / "model", tmp_path / "files.json"
    (folder / "drafter").mkdir(parents=True)
    for name in ("model.safetensors", "drafter/config.json"):
        (folder / name).write_bytes(name.encode())
    found = report.digests_of(folder, known)
    assert {name: own.sha256 for name, own in found.items()} == {
        name: sha256(name.encode()).hexdigest() for name in ("model.safetensors", "drafter/config.json")
    }
    report.quantizations.write_whole(known, {name: vars(own) for name, own in found.items()})
    (folder / "model.safetensors").write_bytes(b"Model.safetensors")
    again = report.digests_of(folder, known)
    assert again["model.safetensors"].sha256 == sha256(b"Model.safetensors").hexdigest()
    for damaged in ("[1]", "{", '{"model.safetensors": {"size": 1}}', '{"model.safetensors": 3}'):
        known.write_text(damaged)
        assert report.digests_of(folder, known) == again


def test_a_process_apart_sees_its_variables_from_its_start_and_nobody_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "7")
    monkeypatch.delenv("MLX_MAX_OPS_PER_BUFFER", raising=False)
    names = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
    with report.environment(report.SETTINGS["and up to 400 MB"].variables):
        assert [report.quantizations.apart(os.getenv, name) for name in names] == ["1000", "400"]
    assert [os.getenv(name) for name in names] == [None, "7"]


Plant = Callable[[pytest.MonkeyPatch], None]


def wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token sees the next."""
    own = mask.attention_mask
    monkeypatch.setattr(mask, "attention_mask", lambda queries, *others: own(queries + 1, *others))


def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is taken."""
    monkeypatch.setattr(
        rounds, "accept", lambda p, q, drafts, keys, limit: (mx.full(limit.shape, drafts.shape[1]), p[:, -1])
    )


def another_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store to which all prompts of a length are one."""
    monkeypatch.setattr(store, "units", lambda prompt: np.zeros((len(prompt), 3), np.uint64))


def two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checks, "with_kv_bits",
        lambda text, bits: replace(text, attention=text.attention | {FULL: replace(text.attention[FULL], kv_bits=2)}),
    )  # fmt: skip


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    own = checks.generate_batch
    monkeypatch.setattr(checks, "generate_batch", lambda *given, **options: own(*given, **options)[::-1])


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """And deaf."""
    own = Model.soft_tokens
    monkeypatch.setattr(Model, "soft_tokens", lambda *given: mx.zeros_like(own(*given)))


def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held to a form."""
    own = checks.generate

    def generate(*given: Any, **options: Any) -> Any:
        return own(*given, **options | {"response_format": None, "tool_choice": "none", "tools": None})

    monkeypatch.setattr(checks, "generate", generate)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("reading", wrong_mask), ("drafts", unverified), ("batch", other_order), ("store", another_prompt),
        ("quantized cache", two_bits), ("image", blind), ("audio", blind), ("video", blind), ("tool call", free),
        ("JSON", free),
    ],
)  # fmt: skip
def test_a_check_fails_when_its_fault_is_planted(
    name: str, plant: Plant, subject: checks.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = checks.checked(name, subject)
    assert found.right is False, found.told
    assert "Error" not in found.told
