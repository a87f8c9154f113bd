"""The server on the wire: who may ask, what it does with bodies of every kind, and with clients that leave."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters import random_adapter
from toy_checkpoint import TINY

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="comes with the extra clients")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from serving import Running, served  # noqa: E402

from mlx_gemma4 import Sampling, collect  # noqa: E402
from mlx_gemma4.flags import adapters_of  # noqa: E402
from mlx_gemma4.serve import answering  # noqa: E402
from mlx_gemma4.serve import connection as connection_module  # noqa: E402
from mlx_gemma4.serve.ask import Ask, Refused  # noqa: E402
from mlx_gemma4.serve.chat import Chat  # noqa: E402
from mlx_gemma4.serve.guard import Guard  # noqa: E402
from mlx_gemma4.serve.job import Job  # noqa: E402
from mlx_gemma4.serve.metrics import Metrics  # noqa: E402
from mlx_gemma4.serve.resident import Settings  # noqa: E402
from mlx_gemma4.weights.adapter import write_adapter  # noqa: E402

SUM = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(Settings(model="demo", max_batch=1, max_queue=1)) as running:
        assert httpx.post(running.url + CHAT, json=SUM, timeout=60).status_code == 200
        yield running


@pytest.fixture
def endless(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """Replies end at the context's end alone."""
    engine = server.resident.load()
    generation = replace(engine.model.config.generation, eos_token_ids=())
    monkeypatch.setattr(engine.model, "config", replace(engine.model.config, generation=generation))
    return server


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sent(server: Running, data: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def post(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(text)) + text


# --- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stop": 5}, "stop is 5; expected a list"),
        ({"stop": ["a", 1]}, "stop[1] is 1; expected a string"),
        ({"tool_choice": 5}, "tool_choice is 5; expected auto, none, required or a function's name"),
        ({"messages": []}, "messages is []; expected at least one"),
    ],
)
def test_what_may_be_of_several_types_is_named_as_the_client_wrote_it(body: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as found:
        Chat("gemma", lambda _: b"").parse(SUM | body, "")
    assert found.value.message == message and message.startswith(f"{found.value.field} is ")


@pytest.mark.parametrize("path", ["/v1/models", "/models", "//models/", "/v1//models", "/v1/v1/models/"])
def test_paths_are_known_however_they_are_joined(server: Running, path: str) -> None:
    assert httpx.get(server.url + path).json()["data"][0]["id"] == "demo"


def test_what_is_not_here_is_a_plain_404_and_what_is_no_question_a_405(server: Running) -> None:
    assert httpx.post(server.url + "/v1/embeddings", json={}).status_code == 404
    assert httpx.get(server.url + "/favicon.ico").status_code == 404
    assert httpx.get(server.url + CHAT).status_code == httpx.delete(server.url + CHAT).status_code == 405


def test_the_server_says_that_it_lives(server: Running) -> None:
    for path in ("/", "/api/hello"):
        assert httpx.head(server.url + path).status_code == 200
    assert httpx.get(server.url + "/health").status_code == httpx.get(server.url + "/ready").status_code == 200
    counted = httpx.get(server.url + "/metrics").text
    for name in ("queued 0.0", "rows 0.0", "reply_tokens_total", "accepted_tokens_total", "cached_tokens_total"):
        assert f"mlx_gemma4_{name}" in counted


def test_a_reply_of_one_token_has_no_rate(server: Running) -> None:
    def rates() -> str:
        counted = httpx.get(server.url + "/metrics").text
        return next(line for line in counted.splitlines() if line.startswith("mlx_gemma4_tokens_per_second_count"))

    before = rates()
    assert httpx.post(server.url + CHAT, json=SUM | {"max_tokens": 1}, timeout=60).status_code == 200
    assert rates() == before


def test_a_reply_that_its_client_leaves_counts_as_far_as_it_was_written(endless: Running) -> None:
    """Of two, the second has not begun."""
    metrics = Metrics(endless.resident)

    async def leave() -> int:
        job = Job(endless.resident, metrics, Ask(messages=SUM["messages"], n=2), "")
        job.start()
        while not any(isinstance(event, tuple) for event in await job.given(60)):
            pass
        job.leave()
        while None not in await job.given(60):
            pass
        return job.prompt_tokens

    length = asyncio.run(leave())
    counted = dict(line.split() for line in metrics.text().decode().splitlines() if "{" not in line and "#" not in line)
    assert counted["mlx_gemma4_prompt_tokens_total"] == f"{length}.0"
    assert float(counted["mlx_gemma4_reply_tokens_total"]) > 0
    assert counted["mlx_gemma4_first_token_seconds_count"] == "1.0"


# --- who may ask -----------------------------------------------------------------------------------


def test_a_key_is_needed_where_there_are_keys_and_each_has_a_store_of_its_own() -> None:
    with served(Settings(model="demo"), Guard(keys=("one", "two"))) as running:
        for path in ("/", "/health", "/ready", "/api/hello"):
            assert httpx.head(running.url + path).status_code in (200, 503)
        for headers in ({}, {"x-api-key": "three"}, {"Authorization": "Bearer öne".encode()}):
            refused = httpx.post(running.url + CHAT, json=SUM, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert httpx.get(running.url + "/metrics").status_code == 401
        assert httpx.post(running.url + "/v1/messages", json={}).json()["error"]["type"] == "authentication_error"

        def cached(headers: dict[str, str]) -> int:
            usage = httpx.post(running.url + CHAT, json=SUM, headers=headers, timeout=60).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        one, two = {"Authorization": "Bearer one"}, {"x-api-key": "two"}
        assert cached(one) == 0 and cached(one) > 10 and cached(two) == 0
        assert cached(one | {"x-api-key": "three"}) > 10  # a client that has a key of somebody else's sends both


def test_names_and_pages_that_are_not_ours_are_refused(server: Running) -> None:
    def status(**headers: str) -> int:
        return httpx.get(server.url + "/v1/models", headers=headers).status_code

    own = server.url.removeprefix("http://")
    assert status(Host="evil.example") == status(Host="evil.example:80") == status(Host="localhost.evil.example") == 403
    assert status(Host="LOCALHOST:99") == status(Host="[::1]:8080") == status(Host="localhost.") == 200
    assert status(Origin="http://evil.example") == status(Origin="null") == status(Origin="file://") == 403
    assert status(Origin=f"http://{own}") == 200
    with pytest.raises(ValueError, match=r"host is '0\.0\.0\.0', which others reach; expected --api-key"):
        Guard("0.0.0.0")


def test_allowed_pages_are_told_so() -> None:
    guard = Guard(origins=("https://app.example",), hosts=("box.local",))
    headers = {"origin": "https://app.example", "access-control-request-headers": "authorization"}
    guard.check_host("box.local:8080")
    guard.check_origin("https://app.example", "box.local")
    told = guard.preflight(headers)
    assert told["access-control-allow-origin"] == "https://app.example"
    assert told["access-control-allow-headers"] == "authorization"
    assert not guard.cors({"origin": "https://other.example"})


# --- bodies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"messages": ' + b"[" * 50_000, b"{}"],
    ids=["empty", "half", "list", "null", "bytes", "nan", "deep", "deeper", "fields"],
)  # fmt: skip
def test_a_body_that_is_none_is_the_clients_fault(server: Running, path: str, body: bytes) -> None:
    answer = httpx.post(server.url + path, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert "Traceback" not in answer.text and "\n" not in answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "logit_bias", "tools", "tool_choice",
    "response_format", "thinking", "stream_options", "chat_template_kwargs", "prompt", "input", "system",
    "instructions", "previous_response_id", "text", "metadata", "logprobs", "top_logprobs", "reasoning_effort",
    "stop_sequences",
]  # fmt: skip
ROLES = ["user", "assistant", "system", "tool", "developer"]
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": JSON}), max_size=3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, "/v1/completions", "/v1/responses", "/v1/messages"]),
    odd=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    messages=MESSAGES | st.just(SUM["messages"]),
)
def test_no_body_is_a_fault_of_the_server(server: Running, path: str, odd: Any, messages: Any) -> None:
    """Nothing that JSON can say makes it fail, and none is answered with 422."""
    body = {"messages": messages, "input": messages, "prompt": "a", "max_tokens": 2, "max_output_tokens": 2} | odd
    answer = httpx.post(server.url + path, content=json.dumps(body), timeout=60)
    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


def test_a_body_beyond_bounds_is_refused_before_it_is_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "MOST_BODY", 2**20)
    assert httpx.post(server.url + CHAT, content=b" " * 2**21).status_code == 413
    endless = (b" " * 2**16 for _ in range(100))
    with suppress(httpx.TransportError):  # it may still be sending
        assert httpx.post(server.url + CHAT, content=endless).status_code == 413
    with sent(server, b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n{") as own:
        assert b" 413 " in own.recv(1000)


def test_a_body_that_stands_still_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "SILENCE", 0.2)
    with sent(server, post(SUM)[:-5]) as connection:
        assert b" 408 " in connection.recv(1000)


@pytest.mark.parametrize("begun", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_request_that_does_not_begin_is_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(connection_module, "PATIENCE", 0.3)
    with sent(server, begun) as slow:
        assert slow.recv(1000) == b""


def test_a_connection_lives_from_request_to_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "PATIENCE", 0.3)
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with sent(server, health) as own:
        for again in (health, health[:9]):
            answered = b""
            while not answered.endswith(b"}"):
                answered += own.recv(1000)
            assert b" 200 " in answered
            time.sleep(0.6)  # idle behind a reply is uvicorn's to bound
            own.sendall(again)
        assert own.recv(1000) == b""


def test_all_bodies_together_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "MOST_BODIES", 3 * 2**20)
    held = post(SUM | {"user": "u" * 2**21})
    with sent(server, held[:-9]) as slow:
        until(lambda: server.app.bodies.held > 2**21)
        refused = httpx.post(server.url + CHAT, json=SUM | {"user": "u" * 2**20})
        assert refused.status_code == 429 and "MB" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        slow.sendall(held[-9:])
        assert b" 200 " in slow.recv(1000)
    until(lambda: server.app.bodies.held == 0)


# --- clients that leave ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_frees_its_row(endless: Running, stream: bool, half: bool) -> None:
    connection = sent(endless, post(SUM | {"stream": stream}))
    until(lambda: endless.resident.states()[2] == 1)
    waiting = sent(endless, post(SUM | {"stream": stream}))
    until(lambda: endless.resident.states()[0] == 1)
    for left, own in ((1, waiting), (0, connection)):
        if half:
            own.shutdown(socket.SHUT_WR)
        else:
            own.close()
        until(lambda left=left: sum(endless.resident.states()) == left)  # type: ignore[misc]
    until(lambda: endless.resident.asked == 0)
    waiting.close()
    connection.close()


def test_a_full_queue_says_when_to_come_again(endless: Running) -> None:
    with sent(endless, post(SUM)), sent(endless, post(SUM)):
        until(lambda: endless.resident.asked == 2)
        refused = httpx.post(endless.url + CHAT, json=SUM)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
    until(lambda: endless.resident.asked == 0)


def test_more_replies_than_ever_fit_are_no_matter_of_waiting(server: Running) -> None:
    refused = httpx.post(server.url + CHAT, json=SUM | {"n": 3})
    assert refused.status_code == 400 and "retry-after" not in refused.headers
    assert refused.json()["error"]["message"] == "the request asks for 3 replies; expected at most 2"


def test_a_recording_is_admitted_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pieces are no requests of their own, which a queue that fills meanwhile would end."""
    samples = np.random.default_rng(0).normal(0, 0.1, 3 * 8000).astype(np.float32)
    cuts = [(0, 8000), (8000, 16000), (16000, 24000)]
    monkeypatch.setattr(answering, "read_recording", lambda recording: (samples, cuts))
    form = {"response_format": "verbose_json"}
    url = server.url + "/v1/audio/transcriptions"
    with monkeypatch.context() as patch:
        patch.setattr("mlx_gemma4.serve.transcription.TOKENS", 4)
        answer = httpx.post(url, files={"file": ("a.wav", b"-")}, data=form, timeout=60)
    assert answer.status_code == 200 and len(answer.json()["segments"]) == 3
    until(lambda: server.resident.asked == 0)


def test_whoever_waits_is_pinged(endless: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "PING", 0.1)
    with sent(endless, post(SUM)):
        until(lambda: endless.resident.states()[2] == 1)
        with httpx.stream("POST", endless.url + CHAT, json=SUM | {"stream": True}) as waiting:
            assert waiting.headers["x-accel-buffering"] == "no"
            lines = waiting.iter_lines()
            assert [line for line in (next(lines) for _ in range(8)) if line.startswith(": ping")]
    until(lambda: endless.resident.asked == 0)


def test_a_fault_after_the_reply_began_is_told_in_the_stream(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(batch: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("mlx_gemma4.decoding.batch.Batch.step", fail)
    answer = httpx.post(server.url + CHAT, json=SUM | {"stream": True}, timeout=60)
    *_, error, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]" and json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "RuntimeError: the device is gone" in caplog.text and "device" not in answer.text
    monkeypatch.undo()
    assert httpx.post(server.url + CHAT, json=SUM, timeout=60).status_code == 200


def test_no_prompt_is_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mlx_gemma4")
    httpx.post(server.url + CHAT, json=SUM, timeout=60)
    httpx.post(server.url + CHAT, json=SUM | {"temperature": "What is 3 + 4?"})
    until(lambda: "200" in caplog.text and "400" in caplog.text)
    assert "3 + 4" not in caplog.text


def test_memory_is_given_back_and_taken_again() -> None:
    with served(Settings(model="demo", unload_after=0.2)) as running:
        first = httpx.post(running.url + CHAT, json=SUM, timeout=60).json()["choices"]
        until(lambda: running.resident.engine is None)
        assert httpx.get(running.url + "/ready").status_code == 200
        assert httpx.post(running.url + CHAT, json=SUM, timeout=60).json()["choices"] == first


def test_memory_is_given_back_if_nobody_has_asked_at_all() -> None:
    with served(Settings(model="demo", unload_after=0.2)) as running:
        Thread(target=running.resident.load_ahead).start()
        until(lambda: running.resident.is_ready)
        until(lambda: running.resident.engine is None)


def test_a_server_that_ends_waits_for_what_is_being_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clear, begun, done = mx.clear_streams, Event(), Event()

    def slow() -> None:
        if current_thread() is running.resident.timer:
            begun.set()
            time.sleep(0.3)
            done.set()
        clear()

    with served(Settings(model="demo", unload_after=0.1)) as running:
        running.resident.load()
        monkeypatch.setattr(mx, "clear_streams", slow)
        running.resident.release(0)
        assert begun.wait(60)
        running.resident.close()
        assert done.is_set()


# --- adapters ----------------------------------------------------------------------------------


def test_the_model_of_a_request_is_the_base_or_an_adapter_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_adapter(tmp_path / f"no{seed}", random_adapter(TINY, seed=seed), "lora", 3, 2.0, -1)
    adapters = {f"no{seed}": tmp_path / f"no{seed}" for seed in (1, 2)}
    with served(Settings(model=str(tiny_folder), adapter=adapters)) as running:
        base = running.resident.name
        assert [own["id"] for own in httpx.get(running.url + "/v1/models").json()["data"]] == [base, "no1", "no2"]
        assert httpx.get(running.url + "/v1/models/no2").json()["id"] == "no2"
        engine = running.resident.load()
        body = {"messages": [{"role": "user", "content": "the quick"}], "temperature": 0, "max_tokens": 8}
        for name, adapter in (("no1", "no1"), ("no2", "no2"), ("base", None), (base, None), (None, None)):
            answer = httpx.post(running.url + CHAT, json=body | {"model": name}, timeout=60).json()
            alone = collect(engine.submit("the quick", adapter=adapter, max_tokens=8, sampling=Sampling(temperature=0)))
            assert (answer["choices"][0]["message"]["content"], answer["model"]) == (alone.text, adapter or base)
        wrong = httpx.post(running.url + CHAT, json=body | {"model": "no3"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
        wrong = httpx.post(running.url + "/v1/messages", json=body | {"model": "no3"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize("given", [["a=x", "b"], ["a=x", "a=y"], ["=x"], ["a=", "b=x"]])
def test_several_adapters_need_names_of_their_own(given: list[str]) -> None:
    assert adapters_of([]) is None and adapters_of(["x"]) == "x" and adapters_of(["a=x", "b=y"]) == {"a": "x", "b": "y"}
    with pytest.raises(ValueError, match="expected NAME=FOLDER"):
        adapters_of(given)
