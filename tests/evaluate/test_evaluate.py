"""Distributions are compared as they are, whatever the way the models are read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from adapters import random_adapter
from conftest import Run
from mlx import nn
from PIL import Image
from toy_checkpoint import TINY, Shape, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, Sampling, load
from mlx_gemma4.config import read_config
from mlx_gemma4.convert.card import CARD, NOT_MEASURED, Figures
from mlx_gemma4.convert.card import write_card as write_new_card
from mlx_gemma4.decoding.sampling import Sampler
from mlx_gemma4.evaluate import command as evaluate_module
from mlx_gemma4.evaluate import quality as quality_module
from mlx_gemma4.evaluate.command import BUILT_IN, main, open_subject, read_lines
from mlx_gemma4.evaluate.quality import (
    Exchange,
    Read,
    acceptance,
    encode,
    load_drafter,
    log_probabilities,
    read_exchanges,
)
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.adapter import write_adapter
from mlx_gemma4.weights.load import DrafterChoice, look_through

Loaded = tuple[Model, Processor]
LINES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "a quick fox"}]},
    {"messages": [{"role": "user", "content": "and"}, {"role": "assistant", "content": "the model called"}]},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "lines.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    return file


@pytest.fixture(scope="module")
def relative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("relative"), TINY, seed=5)


@pytest.fixture
def run(in_process: Callable[..., Run]) -> Run:
    return in_process("mlx_gemma4.evaluate", main)


def results(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])["results"]
    return found


def log_probs_of(model: Model, exchange: Exchange) -> np.ndarray:
    """[T, vocab] from the public logits."""
    logits = np.asarray(model.logits(exchange.prompt))[0, exchange.rows].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --- figures -----------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_public_logits(tiny_folder: Path, relative: Path, data: Path, run: Run) -> None:
    status, out, err = run(tiny_folder, relative, "--data", data)
    assert (status, err) == (0, "")
    reference, processor = load(tiny_folder)
    candidate = load(relative)[0]
    divergences, same = [], []
    for line in LINES:
        exchange = encode(processor, line, None)
        p, q = log_probs_of(reference, exchange), log_probs_of(candidate, exchange)
        divergences += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
        same += (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
    (found,) = results(out)
    assert found["positions"] == len(divergences)
    assert found["kl_mean"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found["kl_p99"] == pytest.approx(np.percentile(divergences, 99), rel=1e-4)
    assert found["top1"] == pytest.approx(np.mean(same))
    assert found["rest"] == 0  # the vocabulary is smaller than what is kept
    assert found["acceptance"] is None
    assert f"| {relative} | {found['kl_mean']:.4f} |" in out


def test_a_model_is_its_own_equal(tiny_folder: Path, data: Path, run: Run) -> None:
    (found,) = results(run(tiny_folder, tiny_folder, "--data", data)[1])
    assert found["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert found["top1"] == 1


def test_what_settings_suppress_is_compared_too(tiny_folder: Path, data: Path, tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"suppress_tokens": list(range(110, 300))}))
    (found,) = results(run(tiny_folder, folder, "--data", data)[1])
    assert found["kl_mean"] == pytest.approx(0, abs=1e-6) and found["top1"] == 1


def test_weights_that_are_no_numbers_are_one_line(tiny_folder: Path, data: Path, tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    arrays = cast(dict[str, mx.array], mx.load(str(folder / "model.safetensors")))
    wrong = next(name for name in arrays if name.endswith("layers.1.mlp.up_proj.weight"))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays | {wrong: arrays[wrong] * mx.nan})
    status, out, err = run(tiny_folder, folder, "--data", data)
    assert (status, out) == (1, "")
    assert err == f"error: what {folder} computes is not finite; expected sound weights, or a wider computing type\n"


def test_what_is_not_kept_counts_as_one_token(
    tiny_folder: Path, relative: Path, data: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = results(run(tiny_folder, relative, "--data", data)[1])
    before = 0.0
    for kept in (16, 128, 400):
        monkeypatch.setattr(quality_module, "KEPT", kept)
        (found,) = results(run(tiny_folder, relative, "--data", data)[1])
        assert before < found["kl_mean"] <= whole["kl_mean"] + 1e-6
        assert 0 < found["rest"] < 1 - kept / 512
        assert found["top1"] == whole["top1"]
        before = found["kl_mean"]


def test_adapters_by_name_are_measured_as_each_is_alone(
    tiny_folder: Path, relative: Path, data: Path, tmp_path: Path, run: Run
) -> None:
    for seed, name in enumerate(("law", "garden")):
        write_adapter(tmp_path / name, random_adapter(TINY, seed=seed), "lora", 3, 0.4, -1)
    named = [word for name in ("law", "garden") for word in ("--adapter", f"{name}={tmp_path / name}")]
    status, out, err = run(tiny_folder, tiny_folder, relative, "--data", data, *named)
    assert (status, err) == (0, "")
    alone = {
        f"{model} with {name}": results(run(tiny_folder, model, "--data", data, "--adapter", tmp_path / name)[1])[0]
        for model in (tiny_folder, relative)
        for name in ("law", "garden")
    }
    assert results(out) == [own | {"model": name} for name, own in alone.items()]
    assert len({own["kl_mean"] for own in alone.values()}) == 4
    status, out, err = run(tiny_folder, tiny_folder, "--adapter", tmp_path / "law", "--adapter", tmp_path / "garden")
    assert (status, out) == (2, "") and "expected NAME=FOLDER" in err
    status, out, err = run(tiny_folder, tiny_folder, "--adapter", tmp_path / "law", "--write-card")
    assert (status, out) == (2, "") and "write_card excludes adapter" in err


def test_saved_logits_give_the_same_figures(
    tiny_folder: Path, relative: Path, data: Path, tmp_path: Path, run: Run
) -> None:
    saved = tmp_path / "reference.safetensors"
    status, out, _ = run(tiny_folder, "--data", data, "--save-logits", saved)
    assert (status, results(out)) == (0, [])
    assert results(run(saved, relative, "--data", data)[1]) == results(run(tiny_folder, relative, "--data", data)[1])


def test_the_shell_leaves_a_tilde_behind_an_equals_sign(
    tiny_folder: Path, relative: Path, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(data, tmp_path / "lines.jsonl")
    saved = "--save-logits=~/reference.safetensors"
    status, _, err = run(tiny_folder, relative, "--data=~/lines.jsonl", saved, "--max-tokens=2")
    assert (status, err) == (0, "") and (tmp_path / "reference.safetensors").is_file()


def test_only_the_first_tokens_count(tiny_folder: Path, relative: Path, data: Path, run: Run) -> None:
    (found,) = results(run(tiny_folder, relative, "--data", data, "--max-tokens", 3)[1])
    assert found["positions"] == 6


# --- reading -----------------------------------------------------------------------------------


def test_layer_by_layer_gives_the_hidden_states_of_the_whole_model(planted_folder: Path, planted: Loaded) -> None:
    subject = open_subject(str(planted_folder), "auto", LINES, None)
    checkpoint, exchanges = subject.checkpoint, subject.exchanges
    reads = read_exchanges(checkpoint, exchanges, lambda done, total: None)
    for exchange, read in zip(exchanges, reads, strict=True):
        rows = read.hidden[0, exchange.rows]
        expected = log_probs_of(planted[0], exchange)
        assert np.allclose(np.asarray(log_probabilities(checkpoint.model, rows)), expected, atol=1e-4)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, replace(TINY, hidden=256, mlp=1024, vocab=1024, periods=2))
    subject = open_subject(str(folder), None, LINES, None)
    checkpoint, exchanges = subject.checkpoint, subject.exchanges
    parts = {path.split(".layers.")[-1].split(".")[0] for path in checkpoint.tensors if ".layers." in path}
    layers = sum(tensor.nbytes for path, tensor in checkpoint.tensors.items() if ".layers." in path)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read_exchanges(checkpoint, exchanges, lambda done, total: None)
    others = checkpoint.nbytes - layers
    assert mx.get_peak_memory() - before < others + 3 * layers / len(parts)
    assert mx.get_cache_memory() < 2 * layers / len(parts)


def test_acceptance_is_that_of_single_drafts(planted_folder: Path, planted: Loaded) -> None:
    model, _ = planted
    checkpoint = open_subject(str(planted_folder), "auto", [], None).checkpoint
    ids = np.random.default_rng(0).integers(110, 500, (2, 50)).tolist()
    exchanges = [Exchange(Prompt(own), start) for own, start in zip(ids, (5, 20), strict=True)]
    reads = read_exchanges(checkpoint, exchanges, lambda done, total: None)
    load_drafter(checkpoint, reads[0])
    greedy = replace(checkpoint.config.generation, temperature=0.0)
    checkpoint.model.config = replace(checkpoint.config, generation=greedy)
    hits = []
    sampler = Sampler(Sampling(temperature=0), model.config.generation, TINY.vocab)
    for exchange in exchanges:
        ids = exchange.prompt.token_ids
        best = sampler.probabilities(model.logits(exchange.prompt)[0]).argmax(axis=-1).tolist()
        for place in range(exchange.start, len(ids) - 1):
            hits.append(model.draft(Prompt(ids[: place + 1]), 1) == [best[place]])
    assert acceptance(checkpoint.model, exchanges, reads) == pytest.approx(np.mean(hits))
    assert 0 < np.mean(hits) < 1


def test_acceptance_is_what_the_two_distributions_share(tiny_folder: Path, tmp_path: Path) -> None:
    """Of a drafter that looks at the hidden state and at keys: token by token, as a round does it."""
    own = write_drafter(tmp_path / "drafter", TINY, seed=3)
    model, _ = load(tiny_folder, own)
    assert model.drafter is not None
    subject = open_subject(str(tiny_folder), str(own), LINES, None)
    reads = read_exchanges(subject.checkpoint, subject.exchanges, lambda done, total: None)
    load_drafter(subject.checkpoint, reads[-1])
    sampler = Sampler(Sampling(), model.config.generation, TINY.vocab)
    shared = []
    for exchange in subject.exchanges:
        ids = exchange.prompt.token_ids
        for place in range(exchange.start, len(ids) - 1):
            caches = model.caches(place)
            *_, hidden = model.read(Prompt(ids[:place]), caches)
            last = mx.array([place - 1])
            newest = model.language_model.embed(mx.array([[ids[place]]]))
            masks = model.masks(caches, last, 1)
            logits, _ = model.drafter(newest, hidden[:, -1:], last, masks, caches.last)
            p = sampler.probabilities(model.logits(Prompt(ids[: place + 1]))[0, -1:])
            shared.append(mx.minimum(p, sampler.probabilities(logits[0])).sum().item())
    assert acceptance(subject.checkpoint.model, subject.exchanges, reads) == pytest.approx(np.mean(shared), rel=1e-4)
    assert 0.01 < np.mean(shared) < 0.99


def test_a_partner_is_quantized_as_it_is_for_decoding(tmp_path: Path) -> None:
    even = Shape(hidden=128, mlp=128, heads=4, kv_heads=2, head_dim=32, global_head_dim=64)
    folder, own = write_checkpoint(tmp_path / "even", even), write_drafter(tmp_path / "drafter", even)
    checkpoint = look_through(folder, DrafterChoice(own, "partner", quantize=True))
    load_drafter(checkpoint, Read(mx.zeros((1, 1, 128)), {}, mx.ones((64,))))
    assert checkpoint.model.drafter is not None
    assert isinstance(checkpoint.model.drafter.embed_tokens, nn.QuantizedEmbedding)


def test_a_drafter_is_measured_with_the_checkpoints_sampling(planted_folder: Path, data: Path, run: Run) -> None:
    (found,) = results(run(planted_folder, planted_folder, "--data", data)[1])
    assert 0 < found["acceptance"] < 1
    (found,) = results(run(planted_folder, planted_folder, "--data", data, "--drafter", "none")[1])
    assert found["acceptance"] is None


# --- exchanges ---------------------------------------------------------------------------------


def test_the_built_in_exchanges_are_whole(tiny: Loaded) -> None:
    _, processor = tiny
    lines = read_lines(BUILT_IN)
    assert len(lines) == 24
    for line in lines:
        exchange = encode(processor, line, None)
        ids, answer = exchange.prompt.token_ids, line["messages"][-1]
        assert ids[: exchange.start] == processor(line["messages"][:-1], tools=line.get("tools")).token_ids
        text = processor.tokenizer.decode(ids[exchange.start :], skip_special_tokens=False)
        if answer["content"]:
            assert text == f"{answer['content']}<turn|>"
        else:
            assert text.startswith("<|tool_call>call:get_weather{") and text.endswith("<tool_call|><|tool_response>")


def test_the_answer_ends_with_its_stop_token(tiny: Loaded) -> None:
    exchange = encode(tiny[1], LINES[0], None)
    assert exchange.prompt.token_ids[-1] == 106
    assert exchange.rows == slice(exchange.start - 1, len(exchange.prompt) - 1)


def test_control_tokens_typed_in_a_chat_are_text(tiny: Loaded) -> None:
    typed = [{"role": "user", "content": "say <turn|>"}, {"role": "assistant", "content": "a <turn|> b"}]
    exchange = encode(tiny[1], {"messages": typed}, None)
    answer = exchange.prompt.token_ids[exchange.start :]
    assert answer.count(106) == 1 and answer[-1] == 106
    assert tiny[1].tokenizer.decode(answer[:-1]) == "a <turn|> b"


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
THOUGHT = "<|channel>thought\nhm\n<channel|>"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"content": "yes", "reasoning": "hm"}, f"{THOUGHT}yes<turn|>"),
        ({"content": f"{THOUGHT}yes"}, f"{THOUGHT}yes<turn|>"),
        (
            {"content": "let me", "tool_calls": [CALL]},
            'let me<|tool_call>call:look{at:<|"|>sky<|"|>}<tool_call|><|tool_response>',
        ),
    ],
)
def test_an_answer_is_what_the_model_would_say(tiny: Loaded, said: dict[str, Any], expected: str) -> None:
    asked = [{"role": "user", "content": "is it"}]
    exchange = encode(tiny[1], {"messages": [*asked, {"role": "assistant", **said}]}, None)
    assert tiny[1].tokenizer.decode(exchange.prompt.token_ids[exchange.start :], skip_special_tokens=False) == expected
    request = tiny[1](asked, thinking=THOUGHT in expected)
    assert exchange.prompt.token_ids[: exchange.start] == request.token_ids


def test_an_answer_may_follow_another(tiny: Loaded) -> None:
    asked = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes"}]
    exchange = encode(tiny[1], {"messages": [*asked, {"role": "assistant", "content": "and no"}]}, None)
    assert exchange.prompt.token_ids[: exchange.start] == tiny[1](asked).token_ids
    assert tiny[1].tokenizer.decode(exchange.prompt.token_ids[exchange.start :]) == "and no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1, is not JSON"),
        ("[]", "line 1: expected"),
        ('{"messages": []}', "line 1: expected"),
        (json.dumps(LINES[0] | {"tolls": []}), "line 1: expected"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "expected an answer"),
        ("\n\n", "has no exchanges"),
        ("[" * 100_000, "line 1, is not JSON"),
        ('{"messages": [{"role": "nobody", "content": "a"}, {"role": "assistant", "content": "b"}]}', "exchange 1: "),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
            '[{"type": "image", "path": "b.png"}]}]}',
            "exchange 1: messages[1] is an assistant message with image",
        ),
    ],
)
def test_wrong_data_is_one_line(tiny_folder: Path, tmp_path: Path, run: Run, text: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    status, out, err = run(tiny_folder, tiny_folder, "--data", file)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_lines_end_where_a_line_ends(tmp_path: Path) -> None:
    odd = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "d"}]
    (tmp_path / "data.jsonl").write_bytes((json.dumps({"messages": odd}, ensure_ascii=False) + "\r\n").encode())
    assert read_lines(tmp_path / "data.jsonl") == [{"messages": odd}]


def test_media_lie_beside_the_data(tmp_path: Path) -> None:
    """Also where the command is started elsewhere, as for `tune` and `batch`."""
    asked = [{"type": "image", "image": "leaf.png"}, {"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]
    line = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a leaf"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    (read,) = read_lines(tmp_path / "data.jsonl")
    assert [part["image"] for part in read["messages"][0]["content"]] == [
        str(tmp_path / "leaf.png"),
        "https://a.b/c.png",
    ]
    asked[0]["image"] = ""
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: messages\[0\]\.content\[0\]"):
        read_lines(tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", ["", "nothing.jsonl"])
def test_data_that_are_not_there_are_one_line(tiny_folder: Path, tmp_path: Path, run: Run, name: str) -> None:
    status, out, err = run(tiny_folder, tiny_folder, "--data", tmp_path / name)
    assert (status, out, err) == (
        2,
        "",
        f"error: {str(tmp_path / name)!r} is no file; expected one of JSON lines, for data\n",
    )


def test_images_are_seen(tiny_folder: Path, tiny: Loaded, tmp_path: Path) -> None:
    Image.effect_noise((96, 96), 80).convert("RGB").save(tmp_path / "noise.png")
    parts = [{"type": "image", "image": str(tmp_path / "noise.png")}, {"type": "text", "text": "what"}]
    lines = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "the model"}]}]
    subject = open_subject(str(tiny_folder), None, lines, None)
    checkpoint, exchanges = subject.checkpoint, subject.exchanges
    (read,) = read_exchanges(checkpoint, exchanges, lambda done, total: None)
    assert len(exchanges[0].prompt.media) == 1
    got = np.asarray(log_probabilities(checkpoint.model, read.hidden[0, exchanges[0].rows]))
    assert np.allclose(got, log_probs_of(tiny[0], exchanges[0]), atol=1e-4)


# --- the command -------------------------------------------------------------------------------


def test_without_a_candidate_there_is_nothing_to_do(tiny_folder: Path, run: Run) -> None:
    assert "there is no candidate" in run(tiny_folder)[2]
    assert "expected a file in a folder, with a name in .safetensors" in run(tiny_folder, "--save-logits", "x.npz")[2]


def test_another_tokenizer_is_refused_before_anything_is_read(
    tiny_folder: Path, other_folder: Path, data: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "read_exchanges", lambda *_: pytest.fail("it reads"))
    status, _, err = run(tiny_folder, other_folder, "--data", data)
    assert status == 2
    assert "makes other tokens of the exchanges" in err


def test_other_exchanges_than_the_saved_ones_are_refused(
    tiny_folder: Path, data: Path, tmp_path: Path, run: Run
) -> None:
    saved = tmp_path / "reference.safetensors"
    run(tiny_folder, "--data", data, "--save-logits", saved, "--max-tokens", 2)
    assert "makes other tokens of the exchanges" in run(saved, tiny_folder, "--data", data)[2]
    mx.save_safetensors(str(saved), {"ids": mx.array([1])})
    assert "is no file of --save-logits" in run(saved, tiny_folder, "--data", data)[2]


def test_saved_logits_of_another_length_are_refused(tiny_folder: Path, data: Path, tmp_path: Path, run: Run) -> None:
    saved = tmp_path / "reference.safetensors"
    run(tiny_folder, "--data", data, "--save-logits", saved, "--max-tokens", 2)
    arrays, about = cast(Any, mx.load(str(saved), return_metadata=True))
    mx.save_safetensors(str(saved), arrays | {"ids": arrays["ids"][:3]}, about)
    status, _, err = run(saved, tiny_folder, "--data", data, "--max-tokens", 2)
    assert status == 2 and "ids [3, 512]" in err and err.endswith("expected one length\n")
    mx.save_safetensors(str(saved), {name: own[:3] for name, own in arrays.items()}, about)
    status, _, err = run(saved, tiny_folder, "--data", data, "--max-tokens", 2)
    assert status == 2 and "has 3 positions; expected 4" in err


def test_the_card_gets_the_figures(
    tiny_folder: Path, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    with pytest.MonkeyPatch.context() as patch:  # it is said before anything is read
        patch.setattr(evaluate_module, "read_exchanges", lambda *_: pytest.fail("it reads"))
        status, _, err = run(tiny_folder, folder, "--data", data, "--write-card")
    assert status == 2 and "has no line for the quality" in err
    write_new_card(folder, "model", "gemma", "google/gemma", "4bit", Figures(10, 20), None, read_config(folder))
    before = (folder / CARD).read_text()
    for _ in range(2):  # measured again, the line is replaced again
        assert run(tiny_folder, folder, "--data", data, "--write-card")[0] == 0
    after = (folder / CARD).read_text()
    (line,) = [line for line in after.splitlines() if "Quality" in line]
    assert line.startswith("- Quality: KL divergence") and line.endswith(f"against {tiny_folder.name}).")
    assert after.replace(line, f"- {NOT_MEASURED}") == before
    monkeypatch.chdir(tiny_folder)
    assert run(".", folder, "--data", data, "--write-card")[0] == 0
    assert (folder / CARD).read_text() == after


def test_drafters_in_full_precision_load_too(tiny_folder: Path, data: Path, tmp_path: Path, run: Run) -> None:
    own = write_drafter(tmp_path / "drafter", TINY)
    (found,) = results(run(tiny_folder, tiny_folder, "--data", data, "--drafter", own)[1])
    assert 0 <= found["acceptance"] <= 1
