"""lm-evaluation-harness (EleutherAI's `lm_eval`) against the server: what it is told is what the model says.

By hand, as it brings some fifty packages along: pip install "lm_eval[api]" transformers
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")
for library in ("lm_eval", "transformers", "aiohttp", "tenacity"):
    pytest.importorskip(library, reason='needs pip install "lm_eval[api]" transformers')

from serving import served  # noqa: E402

from mlx_gemma4 import Prompt, Sampling, generate, load  # noqa: E402
from mlx_gemma4.serve.resident import Settings  # noqa: E402
from mlx_gemma4.weights.load import DEMO  # noqa: E402

CHOICES = [
    {"question": "The ball is", "choices": ["red", "seven and four", "a fox that ran"], "answer": 0},
    {"question": "3 + 4 =", "choices": ["8", "12", "7"], "answer": 2},
    {"question": "Spell the word cat: ", "choices": ["c-a-t", "Grüße, 27 € 🦊"], "answer": 0},
]
TEXTS = [{"text": "Once upon a time there was a fox. It had a red ball."}, {"text": "Ça va bien, 27 € for a ticket."}]
QUESTIONS = [
    {"question": "What is 3 + 4?", "answer": "3 + 4 = 7."},
    {"question": "Spell the word cat.", "answer": "c-a-t"},
]
REL = 1e-6  # of a sum: MLX's logsumexp in float32 is some 1e-5 off at each token here
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
{more}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXT = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
ASK = r"""
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 20}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, kind, more, lines in (
        ("toy_choice", "multiple_choice", CHOICE, CHOICES),
        ("toy_text", "loglikelihood_rolling", TEXT, TEXTS),
        ("toy_ask", "generate_until", ASK, QUESTIONS),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, more=more))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tokenizer as it stands: transformers makes a Gemma's own of it, which cuts words in another way."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(DEMO / "tokenizer.json", folder)
    own = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(Settings(model="demo")) as running:
        yield running.url


def harness(tasks: Path, names: str, model: str, out: Path, args: dict[str, Any], *more: str) -> dict[str, list[Any]]:
    """What the harness has noted of each document, by task."""
    model_args = ",".join(f"{key}={value}" for key, value in args.items())
    call = [
        sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", model_args, "--tasks", names,
        "--include_path", str(tasks), "--output_path", str(out), "--log_samples", *more,
    ]  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hub"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert "API request failed" not in done.stderr
    found = {}
    for name in names.split(","):
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return found


@pytest.mark.parametrize(
    ("args", "more"),
    [
        ({"tokenizer_backend": "huggingface"}, []),
        ({"tokenizer_backend": "auto", "add_bos_token": True, "num_concurrent": 4}, []),
        ({"tokenizer_backend": "huggingface", "tokenized_requests": False}, ["--batch_size", "4"]),
    ],
    ids=["ids", "ids, four at once", "texts in batches"],
)
def test_the_harness_gets_the_models_own_logprobs(
    tasks: Path, tokenizer: Path, url: str, tmp_path: Path, args: dict[str, Any], more: list[str]
) -> None:
    found = harness(
        tasks, "toy_choice,toy_text,toy_ask", "local-completions", tmp_path,
        {"model": "demo", "base_url": f"{url}/v1/completions", "tokenizer": tokenizer} | args, *more,
    )  # fmt: skip
    model, processor = load("demo")
    begin = processor.control.ids[processor.bos_token]

    def said(context: str, rest: str) -> tuple[float, bool]:
        """How likely the model finds the rest, by one pass over all; whether it would say it."""
        ids = processor.tokenizer.encode(context + rest, add_special_tokens=False).ids
        before = len(processor.tokenizer.encode(context, add_special_tokens=False).ids)
        logits = np.array(model.logits(Prompt([begin, *ids])))[0].astype(np.float64)
        law = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        own = range(before, len(ids))  # the logits of the token before are one place on, after <bos>
        greedy = all(law[place].argmax() == ids[place] for place in own)
        return sum(law[place, ids[place]] for place in own), greedy

    compared = 0
    for document in found["toy_choice"]:
        for number, (answer,) in enumerate(document["resps"]):
            given = document["arguments"][f"gen_args_{number}"]
            context = given["arg_0"].rstrip()  # the space belongs to what is said
            rest = given["arg_0"][len(context) :] + given["arg_1"]
            logprob, greedy = said(context, rest)
            assert float(answer[0]) == pytest.approx(logprob, abs=1e-4, rel=REL) and answer[1] == str(greedy)
            compared += 1
    assert compared == sum(len(line["choices"]) for line in CHOICES)
    assert found["toy_choice"][1]["resps"][2][0][1] == "True"
    for document, line in zip(found["toy_text"], TEXTS, strict=True):
        ((answer,),) = document["resps"]
        assert float(answer) == pytest.approx(said("", line["text"])[0], abs=1e-4, rel=REL)
    for document, line in zip(found["toy_ask"], QUESTIONS, strict=True):
        ((answer,),) = document["resps"]
        greedy = generate(model, processor, Prompt([begin, *processor.tokenizer.encode(line["question"]).ids]),
                          max_tokens=20, sampling=Sampling(temperature=0))  # fmt: skip
        assert answer == greedy.text.partition("\n")[0]


@pytest.mark.parametrize("tokenizer_backend", ["None", "huggingface"])
def test_the_harness_asks_in_chats(
    tasks: Path, tokenizer: Path, url: str, tmp_path: Path, tokenizer_backend: str
) -> None:
    args = {"model": "demo", "base_url": f"{url}/v1/chat/completions", "tokenizer_backend": tokenizer_backend}
    if tokenizer_backend != "None":
        args |= {"tokenizer": str(tokenizer), "tokenized_requests": "False"}
    found = harness(tasks, "toy_ask", "local-chat-completions", tmp_path, args, "--apply_chat_template")
    assert [document["exact_match"] for document in found["toy_ask"]] == [1, 1]
