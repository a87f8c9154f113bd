"""Calls run, their results go back, and whatever servers do is an answer: with real servers and the demo model."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("mcp", reason="comes with the extra agent")

from PIL import Image
from rounds import GREEDY

from mlx_gemma4 import Agent, load
from mlx_gemma4.agent.agent import MOST_TOKENS, Call, Result
from mlx_gemma4.agent.servers import Servers, read_configs
from mlx_gemma4.agent.tools import Tool, ToolError
from mlx_gemma4.engine.request import Options
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Piece
from mlx_gemma4.weights.load import DEMO

Loaded = tuple[Model, Processor]

SCRIPT = Path(__file__).parents[1] / "mcp_server.py"
PICTURE = DEMO / "samples" / "shapes.png"
QUESTION, ANSWER = "What is the weather in Paris?", "It is sunny and 21 degrees in Paris."


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load("demo")


def get_weather(city: str) -> dict[str, Any]:
    """Get the current weather in a city."""
    return {"temperature": 21, "sky": "sunny"}


def entry(folder: Path) -> dict[str, Any]:
    environment = {"PICTURE": str(PICTURE), "GREETING": "${GREETING:-hello}"}
    return {"command": sys.executable, "args": [str(SCRIPT), "stdio", str(folder)], "env": environment}


def started(*folders: Path, start: float = 60, call: float = 60) -> Servers:
    names = (f"server {n}" for n in range(len(folders)))
    return Servers(read_configs({"mcpServers": dict(zip(names, map(entry, folders), strict=True))}), start, call)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[Servers]:
    """One that does what it should."""
    running = started(folder)
    yield running
    running.close()


def named(servers: Servers, name: str) -> Tool:
    return next(tool for tool in servers.tools(set()) if tool.name == name)


def texts(agent: Agent) -> list[Any]:
    return [message["content"] for message in agent.messages if message["role"] == "tool"]


# --- functions ---------------------------------------------------------------------------------


def test_a_function_is_called_and_its_result_is_told(demo: Loaded) -> None:
    agent = Agent(*demo, [get_weather])
    reply = agent.send(QUESTION, sampling=GREEDY)
    assert reply.text == ANSWER and reply.finish_reason == "stop"
    assert reply.stats.cached_tokens > reply.stats.prompt_tokens // 2  # what led to the call is not read again
    assert [message["role"] for message in agent.messages] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(texts(agent)[0]) == get_weather("Paris")


def test_without_tools_it_is_a_conversation(demo: Loaded) -> None:
    with Agent(*demo) as agent:
        assert agent.send("What is 3 + 4?", sampling=GREEDY).text == "3 + 4 = 7."
    assert agent.session.settings.tools is None


def test_every_event_comes_in_its_order(demo: Loaded) -> None:
    kinds = [type(event) for event in Agent(*demo, [get_weather]).stream(QUESTION, sampling=GREEDY)]
    short = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind is not before]
    assert short == [Piece, Call, Result, Piece]


def test_what_a_tool_raises_is_told_and_the_conversation_goes_on(demo: Loaded) -> None:
    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        raise ConnectionError(f"no station in {city}")

    agent = Agent(*demo, [get_weather])
    assert agent.send(QUESTION, sampling=GREEDY).finish_reason == "stop"
    assert texts(agent) == ["Error: ConnectionError: no station in Paris"]


def test_a_tool_that_changes_its_arguments_changes_nothing_that_was_said(demo: Loaded) -> None:
    def take(order: Any) -> str:
        order["items"].clear()
        return "taken"

    agent = Agent(*demo, [take])
    made = {"id": "c", "type": "function", "function": {"name": "take", "arguments": {"order": {"items": ["lamp"]}}}}
    agent.messages.append({"role": "assistant", "content": "", "tool_calls": [made]})
    assert [type(event) for event in agent.run([made])] == [Call, Result]
    assert texts(agent) == ["taken"] and made["function"]["arguments"] == {"order": {"items": ["lamp"]}}


def test_the_last_step_is_written_without_tools(demo: Loaded) -> None:
    agent = Agent(*demo, [get_weather], max_steps=1)
    assert agent.send(QUESTION, sampling=GREEDY).tool_calls == [] and len(agent.messages) == 2


@pytest.mark.parametrize("kept", [0, 9])
def test_what_was_said_stays_when_it_is_stopped(demo: Loaded, kept: int) -> None:
    agent = Agent(*demo)
    plain = Options(sampling=GREEDY, draft_length=0)  # a piece is a token
    events = agent.events([{"role": "user", "content": "Tell me a story."}], plain)
    said = ""
    for event in events:
        if isinstance(event, Piece):
            said += event.text
        if len(said) >= kept:
            break
    events.close()
    replied = [{"role": "assistant", "content": said}] if said else []
    assert agent.messages == [{"role": "user", "content": "Tell me a story."}, *replied]
    assert bool(kept) == bool(said)
    assert agent.send("What is 3 + 4?", sampling=GREEDY, max_tokens=12).text.startswith("3 + 4 = 7.")


@pytest.mark.parametrize("last", [Piece, Call, Result])
def test_wherever_it_is_left_every_call_has_an_answer(demo: Loaded, last: type) -> None:
    agent = Agent(*demo, [get_weather])
    stream = agent.events([{"role": "user", "content": QUESTION}], Options(sampling=GREEDY))
    for event in stream:
        if isinstance(event, last) and not (isinstance(event, Piece) and event.finish_reason is None):
            break
    stream.close()
    assert [message["role"] for message in agent.messages] == ["user", "assistant", "tool"]
    assert texts(agent) == ["Error: the user stopped this."] or last is Result


def test_a_call_that_is_stopped_has_an_answer(demo: Loaded) -> None:
    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        raise KeyboardInterrupt

    agent = Agent(*demo, [get_weather])
    with pytest.raises(KeyboardInterrupt):
        agent.send(QUESTION, sampling=GREEDY)
    assert texts(agent) == ["Error: the user stopped this."]
    agent.session.prompt([])  # can be read


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tools": [get_weather, get_weather]}, "two tools are named 'get_weather'"),
        ({"tools": [print]}, "expected functions"),
        ({"tools": [get_weather], "allow": ["get_wether"]}, "allow has 'get_wether'; expected one of get_weather"),
        ({"allow": ["x"]}, "expected one of no tools"),
        ({"tools": get_weather}, "tools is a function; expected a list of functions"),
        ({"tools": [get_weather], "allow": "get_weather"}, "allow is a str; expected a list of names of tools"),
    ],
)
def test_what_is_wrong_is_one_line(demo: Loaded, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Agent(*demo, **given)


# --- what the model gets to read ---------------------------------------------------------------


def look(*results: Any) -> Any:
    def look() -> Any:
        """Look at the table."""
        return list(results) if len(results) != 1 else results[0]

    return look


def test_images_in_results_reach_the_model(demo: Loaded) -> None:
    agent = Agent(*demo, [look("a photo", Image.open(PICTURE))])
    (text, image) = agent.answer(Call("look", {}, True))
    assert text["text"] == "a photo" and image["type"] == "image"
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": {}}}
    asked = {"role": "user", "content": "Look. How many shapes are there?"}
    answer = {"role": "tool", "tool_call_id": "c", "content": [text, image]}
    agent.session.messages += [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, answer]
    assert len(agent.session.prompt([])[0].media) == 1


def test_a_huge_result_is_cut_and_says_so(demo: Loaded) -> None:
    agent = Agent(*demo, [look("word " * 1_000_000)])
    (text, cut) = agent.answer(Call("look", {}, True))
    most = min(MOST_TOKENS, demo[0].config.text.max_position_embeddings // 4)
    count = len(demo[1].tokenizer.encode(text["text"], add_special_tokens=False))
    assert most - 2 <= count <= most and set(text["text"].split()) <= {"word", "wor", "wo", "w"}
    assert cut["text"] == f"[cut: the result has more than {most} tokens]"


def test_many_images_are_cut_too(demo: Loaded) -> None:
    agent = Agent(*demo, [look(*[Image.open(PICTURE)] * 60)])
    *images, cut = agent.answer(Call("look", {}, True))
    assert 5 < len(images) < 60 and cut["text"].startswith("[cut")


def test_a_tool_that_is_not_there_is_told(demo: Loaded) -> None:
    (part,) = Agent(*demo, [get_weather]).answer(Call("get_time", {}, True))
    assert part["text"] == "Error: there is no tool get_time; expected get_weather"


# --- servers -----------------------------------------------------------------------------------


def test_a_servers_tool_runs_if_it_is_allowed(demo: Loaded, folder: Path) -> None:
    config = folder / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"test": entry(folder), "off": {"disabled": True}}}))
    with Agent(*demo, mcp=config, allow=["get_*"]) as agent:
        assert agent.send(QUESTION, sampling=GREEDY).text == ANSWER
        agent.allow.clear()
        agent.session.messages.clear()
        agent.send(QUESTION, sampling=GREEDY, max_tokens=30)
        assert texts(agent) == ["Error: the user does not allow this call."]
        agent.session.messages.clear()
        for event in agent.stream(QUESTION, sampling=GREEDY):
            if isinstance(event, Call):
                assert (event.name, event.arguments, event.allowed) == ("get_weather", {"city": "Paris"}, False)
                event.allowed = True
        assert agent.messages[-1]["content"] == ANSWER


def test_results_of_servers_are_read(servers: Servers) -> None:
    assert named(servers, "odd_name__").run({}) == [{"type": "text", "text": "hello"}]
    kinds = [part["type"] for part in named(servers, "look").run({})]
    assert kinds == ["text", "image", "image"]
    with pytest.raises(ToolError, match=r"it went wrong|Error executing tool fail"):
        named(servers, "fail").run({})
    with pytest.raises(ToolError, match="city"):
        named(servers, "get_weather").run({"town": "Paris"})


def test_what_is_no_image_is_left_out(demo: Loaded, servers: Servers) -> None:
    agent = Agent(*demo)
    agent.tools = {tool.name: tool for tool in servers.tools(set())}
    *_, image, left_out = agent.answer(Call("look", {}, True))
    assert image["type"] == "image" and left_out["text"].startswith("[left out: image of 8 bytes")


def test_a_call_that_takes_too_long_is_told(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.servers[0], "call_timeout", 0.5)
    with pytest.raises(ToolError, match=r"no answer within 0\.5 s"):
        named(servers, "wait").run({"seconds": 2})


def test_a_call_can_be_interrupted(servers: Servers) -> None:
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        named(servers, "wait").run({"seconds": 2})


def test_servers_that_nobody_closes_end_with_the_process(tmp_path: Path) -> None:
    code = "import sys, json; from mlx_gemma4.agent.servers import *; "
    code += "kept = Servers(read_configs(json.loads(sys.argv[1])), 60, 60); print(len(kept.tools(set())))"
    config = json.dumps({"mcpServers": {"test": entry(tmp_path)}})
    done = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "9\n", "")


def test_names_that_clash_begin_with_their_servers(tmp_path: Path) -> None:
    servers = started(tmp_path, tmp_path)
    try:
        names = [tool.name for tool in servers.tools({"server_0_tell"})]
    finally:
        servers.close()
    assert {"server_0_get_weather", "server_1_get_weather"} <= set(names) and len(set(names)) == len(names)


def test_a_name_of_the_callers_stays(servers: Servers) -> None:
    names = {tool.name for tool in servers.tools({"get_weather"})}
    assert "server_0_get_weather" in names and "tell" in names and "get_weather" not in names


def test_a_server_that_dies_is_started_again_once(tmp_path: Path) -> None:
    (tmp_path / "fragile").touch()
    servers = started(tmp_path)
    try:
        (part,) = named(servers, "get_weather").run({"city": "Paris"})
        assert json.loads(part["text"])["temperature"] == 21
        with pytest.raises(ToolError, match="'server 0' ended during the call, twice"):
            named(servers, "die").run({})
        assert named(servers, "odd_name__").run({}) == [{"type": "text", "text": "hello"}]
    finally:
        servers.close()


def test_a_call_that_changes_things_is_not_made_twice(tmp_path: Path) -> None:
    servers = started(tmp_path)
    try:
        with pytest.raises(ToolError, match="ended and runs again; what the call has done is not known"):
            named(servers, "send_message").run({"name": "Ann", "text": "hi"})
        assert (tmp_path / "calls").read_text() == "x"
        assert named(servers, "send_message").run({"name": "Ann", "text": "hi"}) == [{"type": "text", "text": "sent"}]
    finally:
        servers.close()


def test_an_error_of_a_server_is_told_whatever_its_number(tmp_path: Path) -> None:
    servers = started(tmp_path)
    try:
        with pytest.raises(ToolError, match="no seats left"):
            named(servers, "refuse").run({})
    finally:
        servers.close()
    assert (tmp_path / "calls").read_text() == "x"


class Forgetful(BaseHTTPRequestHandler):
    """A server with sessions, as the protocol had them until 2025."""

    sessions: ClassVar[set[str]] = set()
    schema: ClassVar[dict[str, Any]] = {"type": "object"}
    has_tools = True

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, found, error = 200, dict[str, Any](), None
        if asked["method"] == "initialize":
            self.sessions.add("1")
            info = {"name": "forgetful", "version": "1"}
            found = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
        elif self.headers["Mcp-Session-Id"] not in self.sessions:
            status, error = 404, {"code": -32001, "message": "Session not found"}
        elif asked["method"] == "tools/list" and self.has_tools:
            found = {"tools": [{"name": "get_weather", "inputSchema": self.schema}]}
        elif asked["method"] == "tools/list":
            error = {"code": -32601, "message": "Method not found"}
        else:
            found = {"content": [{"type": "text", "text": "sunny"}]}
        said = {"result": found} if error is None else {"error": error}
        body = json.dumps({"jsonrpc": "2.0", "id": asked.get("id")} | said).encode()
        self.send_response(status if "id" in asked else 202)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Mcp-Session-Id": "1"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def forgetful() -> Iterator[dict[str, Any]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Forgetful) as http:
        threading.Thread(target=http.serve_forever).start()
        yield {"mcpServers": {"web": {"url": f"http://127.0.0.1:{http.server_address[1]}/mcp"}}}
        http.shutdown()


def test_a_server_that_has_forgotten_its_sessions_is_asked_in_a_new_one(forgetful: dict[str, Any]) -> None:
    servers = Servers(read_configs(forgetful), 30, 30)
    try:
        for _ in range(2):
            assert named(servers, "get_weather").run({}) == [{"type": "text", "text": "sunny"}]
            Forgetful.sessions.clear()
    finally:
        servers.close()


def test_a_server_need_not_have_tools(demo: Loaded, forgetful: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forgetful, "has_tools", False)
    with Agent(*demo, mcp=forgetful) as agent:
        assert agent.session.settings.tools is None


@pytest.mark.parametrize(
    ("given", "said"), [({}, "the tool 'get_weather'.parameters has the $ref '#/no'"), ({"adapter": "x"}, "adapter is")]
)
def test_servers_end_where_an_agent_does_not_begin(
    demo: Loaded, forgetful: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    closed: list[Servers] = []
    end = Servers.close
    monkeypatch.setattr(Servers, "close", lambda self: (closed.append(self), end(self)))
    if not given:
        monkeypatch.setattr(Forgetful, "schema", {"type": "object", "properties": {"city": {"$ref": "#/no"}}})
    with pytest.raises(ValueError, match=re.escape(said)):
        Agent(*demo, mcp=forgetful, **given)
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("how", "said"), [("refuse", "no licence for this machine"), ("sleep", "no answer within 4 s")]
)
def test_a_server_that_does_not_start_is_named(tmp_path: Path, how: str, said: str) -> None:
    (tmp_path / how).touch()
    with pytest.raises(OSError, match=f"'server 0' cannot be started: .*{said}") as caught:
        started(tmp_path, start=4 if how == "sleep" else 60)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"command": "/no/such/program"}, "started: '/no/such/program': No such file or directory"),
        ({"command": sys.executable, "cwd": "/no/folder"}, "started: '/no/folder': No such file or directory"),
        ({"url": "http://127.0.0.1:9/mcp"}, "reached: ."),
    ],
)
def test_a_server_that_is_not_there_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OSError, match=f"the server 'x' cannot be {said}") as caught:
        Servers(read_configs({"mcpServers": {"x": given}}), 20, 20)
    assert "\n" not in str(caught.value)


def test_a_server_at_an_address_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GREETING": "hi", "PICTURE": str(PICTURE)}
    words = [sys.executable, str(SCRIPT), str(port), str(tmp_path)]
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as running:
        try:
            until = time.monotonic() + 30
            while time.monotonic() < until:
                with socket.socket() as knock:
                    if knock.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            url = {"type": "http", "url": f"http://127.0.0.1:{port}/mcp", "headers": {"X-Key": "1"}}
            servers = Servers(read_configs({"mcpServers": {"web": url}}), 30, 30)
            assert named(servers, "odd_name__").run({}) == [{"type": "text", "text": "hi"}]
            assert [part["type"] for part in named(servers, "look").run({})] == ["text", "image", "image"]
        finally:
            running.terminate()
    with pytest.raises(ToolError):  # gone for good
        try:
            named(servers, "odd_name__").run({})
        except OSError as error:
            raise ToolError(str(error)) from None
    servers.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", 'has no object "mcpServers"'),
        ('{"servers": {}}', 'has no object "mcpServers"'),
        ('{"mcpServers": {"x": "npx"}}', "x is a str"),
        ('{"mcpServers": {"x": {}}}', "x has nothing"),
        ('{"mcpServers": {"x": {"command": "a", "url": "b"}}}', "x has command, url"),
        ('{"mcpServers": {"x": {"command": ["npx", "y"]}}}', "x.command is a list; expected a str"),
        ('{"mcpServers": {"x": {"command": "npx", "args": "-y"}}}', "x.args is a str; expected a list"),
        ('{"mcpServers": {"x": {"command": "npx", "env": []}}}', "x.env is a list; expected a dict"),
        ('{"mcpServers": {"x": {"type": "sse", "url": "http://x/sse"}}}', "x has the type sse"),
        ('{"mcpServers": {"x": {"url": "http://x", "headers": {"A": "${NOT_SET}"}}}}', "the variable NOT_SET"),
    ],
)
def test_a_file_of_servers_that_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mcp.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_configs(tmp_path / "mcp.json")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_variables_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    given = {"command": "npx", "args": ["-y", "$x", "${KEY}-${NOT_SET:-else}"], "env": {"A": "${KEY}"}}
    (config,) = read_configs({"mcpServers": {"x": given}})
    assert config.command == ["npx", "-y", "$x", "secret-else"] and config.env == {"A": "secret"}
