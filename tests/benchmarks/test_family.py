"""The family side by side, at toy size: the demo, and a look-alike of its sisters' by mlx-lm where it is installed."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benchmarks.test_many_scripts import benchmark

from mlx_gemma4 import Sampling, generate, load
from mlx_gemma4.weights.load import DEMO

SIZES = ["--model", "demo", "--prompt-tokens", 40, "--max-tokens", 12, "--repeats", 2]
QUESTIONS = ["What is 3 + 4?", "Spell the word cat."]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": question}) + "\n" for question in QUESTIONS))
    return file


def write_sister(folder: Path) -> Path:
    """One of the family as mlx-lm has it, with experts and inputs of each layer, of random weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import gemma4_text

    shape = {
        "model_type": "gemma4_text", "hidden_size": 32, "num_hidden_layers": 6, "intermediate_size": 64,
        "num_attention_heads": 2, "head_dim": 16, "global_head_dim": 32, "vocab_size": 1856,
        "vocab_size_per_layer_input": 1856, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "sliding_window": 16, "sliding_window_pattern": 3, "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    mx.random.seed(0)
    model = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(shape))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    config = shape | {"eos_token_id": [1, 106]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    # as it stands: of a GemmaTokenizer transformers makes one that cuts the demo's words in another way
    names = json.loads((DEMO / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def results(*args: object) -> tuple[str, Any]:
    done = benchmark("family.py", *SIZES, *args)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return "\n".join(lines), json.loads(last)


def test_what_is_not_installed_says_so_beside_the_demo(questions: Path) -> None:
    absent = [engine for engine in ("mlx-lm", "mlx-vlm") if find_spec(engine.replace("-", "_")) is None]
    beside = [option for engine in absent for option in ("--beside", f"{engine}=some/E4B")]
    text, found = results("--questions", questions, *beside)
    own, *others = found["results"]
    assert own["engine"] == "mlx_gemma4" and own["prompt_tokens"] > 40 and own["generation_tokens"] > 8
    assert all(own[key] > 0 for key in ("load_s", "prompt_tps", "first_token_s", "generation_tps", "peak_memory_bytes"))
    assert [(row["engine"], row["missing"]) for row in others] == [(engine, "not installed") for engine in absent]
    assert all(f"| {engine} |" in text and "not installed" in text for engine in absent)
    loaded, processor = load("demo")
    for entry, question in zip(found["answers"], QUESTIONS, strict=True):
        said = generate(loaded, processor, question, max_tokens=12, sampling=Sampling(temperature=0)).text
        assert entry == {"question": question, "answers": [said, *[None] * len(absent)]}
        assert f"| {question} | {said} |" in text


def test_a_sister_by_mlx_lm_stands_beside_the_demo(questions: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="needs the extra tune")
    sister, nothing = write_sister(tmp_path / "sister"), tmp_path / "nothing"
    nothing.mkdir()
    text, found = results("--questions", questions, "--beside", f"mlx-lm={sister}", "--beside", f"mlx-lm={nothing}")
    own, other, broken = found["results"]
    assert other.keys() == own.keys() and other["generation_tokens"] > 0
    assert other["peak_memory_bytes"] < own["peak_memory_bytes"]  # of a process of its own
    assert other["prompt_tokens"] == own["prompt_tokens"]
    assert "nothing" in broken["missing"] or "Error" in broken["missing"]
    assert [len(entry["answers"]) for entry in found["answers"]] == [3, 3] and "mlx-lm: sister" in text


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "What is 3 + 4?"}\n{"prompt": "x"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for args, message in (
        (["--beside", "vllm=x"], "beside is 'vllm=x'; expected mlx-lm=MODEL or mlx-vlm=MODEL or ollama=MODEL"),
        (["--questions", wrong], 'line 2: expected {"question": a text}'),
        (["--questions", empty], "has no questions; expected one in each line"),
    ):
        done = benchmark("family.py", *SIZES, *args)
        assert (done.returncode, done.stdout) == (1, "") and message in done.stderr and done.stderr.count("\n") == 1
