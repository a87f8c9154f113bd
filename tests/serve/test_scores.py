"""What programs that score texts ask: prompts as token ids, echoed with what each token's logprob is."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from threading import Event
from typing import Any

import numpy as np
import pytest

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")

from conversing import law_of  # noqa: E402
from serving import Running, served  # noqa: E402

from mlx_gemma4 import Prompt, load  # noqa: E402
from mlx_gemma4.engine import engine  # noqa: E402
from mlx_gemma4.model.model import Model  # noqa: E402
from mlx_gemma4.prompt.processor import Processor  # noqa: E402
from mlx_gemma4.serve.completions import Completions  # noqa: E402
from mlx_gemma4.serve.resident import Settings  # noqa: E402

TEXTS = ["The ball is red", "3 + 4 = 7", "Grüße, 27 € 🦊", "Once upon a time there was a fox."]
SCORED = {"model": "demo", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}  # lm-eval's


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Settings(model="demo")) as running:
        yield running


@pytest.fixture(scope="module")
def demo() -> tuple[Model, Processor]:
    return load("demo")


def completed(server: Running, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def ids_of(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("begins", [True, False])
def test_ids_have_as_many_scores_as_they_are(server: Running, demo: tuple[Model, Processor], begins: bool) -> None:
    """And one of the token that follows, which who scores leaves out: counted from either end they are the same."""
    model, processor = demo
    begin = processor.control.ids[processor.bos_token]
    prompts = [[begin] * begins + ids_of(processor, text) for text in TEXTS]
    choices = completed(server, prompt=prompts, **SCORED)["choices"]
    assert [choice["index"] for choice in choices] == [*range(len(TEXTS))]
    for ids, text, choice in zip(prompts, TEXTS, choices, strict=True):
        told = choice["logprobs"]
        assert {len(told[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {len(ids) + 1}
        read = ids if begins else [begin, *ids]
        law = law_of(model, Prompt(read))
        expected = [law[place, token] for place, token in enumerate(read[1:])]
        assert (told["token_logprobs"][0] is None) == begins
        own = [value for value in told["token_logprobs"] if value is not None]
        assert own[:-1] == pytest.approx(expected, abs=1e-4)
        firsts = [max(top.values()) for top in told["top_logprobs"][begins:-1]]
        assert firsts == pytest.approx(law.max(axis=-1)[:-1], abs=1e-4)
        assert [value == first for value, first in zip(own[:-1], firsts, strict=True)] == [
            token == best for token, best in zip(read[1:], law.argmax(axis=-1), strict=False)
        ]
        assert choice["text"].startswith(processor.bos_token * begins + text)


@pytest.mark.parametrize("prompt", ["The ball is red", "<bos>The ball is red", "<|turn>user\nThe ball<turn|>"])
def test_a_text_is_echoed_as_it_was_given(server: Running, prompt: str) -> None:
    (choice,) = completed(server, **SCORED | {"prompt": prompt, "max_tokens": 0})["choices"]
    told = choice["logprobs"]
    assert choice["text"] == prompt == "".join(told["tokens"])
    ends = [*told["text_offset"][1:], len(prompt)]
    assert [prompt[start:end] for start, end in zip(told["text_offset"], ends, strict=True)] == told["tokens"]


def test_the_likeliest_and_the_own_are_told(server: Running, demo: tuple[Model, Processor]) -> None:
    model, processor = demo
    ids = [processor.control.ids[processor.bos_token], *ids_of(processor, TEXTS[3])]
    law = law_of(model, Prompt(ids))
    for tops in (0, 5):
        (choice,) = completed(server, **SCORED | {"prompt": ids, "logprobs": tops})["choices"]
        for place, top in enumerate(choice["logprobs"]["top_logprobs"][1:-1]):
            best = [*np.argsort(-law[place])[:tops].tolist(), ids[place + 1]]
            expected = {processor.tokenizer.decode([own], skip_special_tokens=False): law[place, own] for own in best}
            assert top == pytest.approx(expected, abs=1e-4)


def test_of_tokens_that_are_one_text_the_likeliest_is_told(demo: tuple[Model, Processor]) -> None:
    """Bytes that make no character alone are all �."""
    tokenizer = demo[1].tokenizer
    first, second = (tokenizer.token_to_id(f"<0x{byte}>") for byte in ("F0", "9F"))
    completions = Completions("demo", lambda token: tokenizer.decode([token], skip_special_tokens=False).encode())
    _, writer = completions.parse({"prompt": "x", "logprobs": 2}, "")
    entry = {"token_id": first, "logprob": -1.0, "top": {first: -1.0, second: -2.0}}
    told = writer.logprobs(0, [entry, entry | {"token_id": second, "logprob": -2.0}])
    assert told["top_logprobs"] == [{"�": -1.0}] * 2 and told["token_logprobs"] == [-1.0, -2.0]


def test_scores_are_the_same_whatever_is_in_the_store_and_however_many_replies(
    server: Running, demo: tuple[Model, Processor]
) -> None:
    """Over several chunks; the replies go on as those of a prompt that is not scored."""
    ids = [2, *ids_of(demo[1], TEXTS[3] * 60)]
    law = law_of(demo[0], Prompt(ids))
    expected = [law[place, token] for place, token in enumerate(ids[1:])]
    asked = SCORED | {"prompt": ids, "max_tokens": 12}
    plain = completed(server, **asked | {"echo": False})["choices"][0]["text"]
    for count in (1, 3):
        choices = completed(server, **asked, n=count)["choices"]
        for choice in choices:
            found = choice["logprobs"]["token_logprobs"]
            assert found[0] is None and found[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
            assert choice["text"].endswith(plain) and len(choice["logprobs"]["tokens"]) == len(found)


def test_what_cannot_be_read_is_refused(server: Running) -> None:
    for prompt, message in (
        ([2, 2**30], "vocab"),
        ([2] + [5] * 9000, "prompt is too long"),
        ([[2, 5], [2, 2**30]], "vocab"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            completed(server, prompt=prompt, **SCORED)
        assert caught.value.code == 400 and message in caught.value.read().decode()


def test_of_a_client_that_leaves_nothing_is_scored_further(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, begun = list[int](), Event()

    def slow(*args: Any) -> np.ndarray:
        scored.append(len(args[2]))
        begun.set()
        time.sleep(0.1)
        return prompt_told(*args)

    prompt_told = engine.prompt_told
    monkeypatch.setattr(engine, "prompt_told", slow)
    body = json.dumps(SCORED | {"prompt": [2] + [5] * 8000}).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
        client.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        assert begun.wait(60)
    while server.app.resident.works():
        time.sleep(0.01)
    assert sum(scored) < 8000
