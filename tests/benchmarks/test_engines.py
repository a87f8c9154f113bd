"""benchmarks/engines.py: engines are asked alike. Another one is here a server that answers as Ollama's does."""

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import engines
from engines import Answer, Member, Told, Turn

ASKED: list[dict[str, Any]] = []
LINES = [
    {"message": {"role": "assistant", "content": "Two"}, "done": False},
    {"message": {"role": "assistant", "content": " words"}, "done": False},
    {"message": {"role": "assistant", "content": ""}, "done": True, "prompt_eval_count": 9, "eval_count": 3},
]


class Ollama(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        ASKED.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        lines = [{"error": "model not found"}] if ASKED[-1]["model"] == "none" else LINES
        self.send_response(200)
        self.end_headers()
        self.wfile.writelines(json.dumps(line).encode() + b"\n" for line in lines)

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Ollama) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(engines, "OLLAMA_URL", f"http://127.0.0.1:{server.server_port}/api/chat")
        yield
        server.shutdown()


def test_ollama_is_asked_over_http(ollama: None) -> None:
    found = engines.turn(Member("ollama", "gemma4:12b"), "a long text", ["What?", "Why?"], 7)
    assert [answer.text for answer in found.answers] == ["Two words"] * 2
    assert [(answer.prompt_tokens, answer.tokens, answer.first_tokens) for answer in found.answers] == [(9, 3, 1)] * 2
    assert found.peak_memory is None
    assert [asked["messages"][0]["content"] for asked in ASKED] == ["What?", "a long text", "What?", "Why?"]
    assert ASKED[-1]["options"] == {"temperature": 0, "num_predict": 7} and ASKED[-1]["think"] is False
    with pytest.raises(RuntimeError, match="model not found"):
        engines.turn(Member("ollama", "none"), "a long text", ["What?"], 7)


def test_what_a_turn_comes_to() -> None:
    answers = [Answer("", 10, 9, 1, 0.5, 2.0), Answer("", 12, 5, 1, 0.25, 1.0)]
    found = engines.summary([Turn(1.0, Answer("", 100, 2, 1, 4.0, 0.1), answers, None)])
    assert (found["generation_tps"], found["prompt_tps"], found["peak_memory_bytes"]) == (4.0, 25.0, None)
    assert found["question_first_token_s"] == 0.375
    assert engines.timed(iter([Told("", 0, 4), Told("ab", 2, 4), Told("c", 3, 4)])).first_tokens == 2


def test_an_engine_that_is_none_is_refused() -> None:
    for named in ("mlx_gemma4=demo", "vllm=demo", "mlx-lm", "mlx-lm="):
        with pytest.raises(ValueError, match=r"^beside is .*; expected mlx-lm=MODEL or mlx-vlm=MODEL or ollama=MODEL$"):
            engines.member_of(named)
