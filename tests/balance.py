"""Many conversations over several servers behind a balancer, of which one is killed and one is told to stop.

    python -m tests.balance nginx       # or haproxy

Three servers of a toy model, the balancer's file of `deploy/` in front of them with other ports, and 32 clients that
talk at once, each a conversation of its own. Every request of which no answer has begun is to be answered, a stream
that breaks is to end in an error and not in silence, who stops finishes what it has taken, and nine in ten prompts find
what was read of them before. The exit status is 1 if anything of that is not so. Needs the balancer.
"""

import http.client
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_planted
from load import HUNG, WORDS, opened, server
from machines import free_port
from toy_checkpoint import Shape

DEPLOY = Path(__file__).parents[1] / "deploy"
PORTS = ("8080", "8081", "8082", "8083")  # there: the balancer's own and three servers'
MAX_TOKENS = 12
STORE_BYTES = "300000000"  # room for all conversations on one server, which is what is left in the end
OPENING = 8  # tokens at a prompt's end that open the reply, which the next prompt may have otherwise
MOST_TRIES = 3


@dataclass
class Course:
    """What became of all clients' turns."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    events: dict[int, Callable[[], None]] = field(default_factory=dict)  # by how many turns are answered before

    def answered(self, is_hit: bool | None) -> None:
        with self.lock:
            self.counts["answered"] += 1
            self.counts["found" if is_hit else "first" if is_hit is None else "read anew"] += 1
            due = [self.events.pop(number) for number in [*self.events] if number <= self.counts["answered"]]
        for event in due:
            event()


def talk(port: int, number: int, turns: int, course: Course) -> None:
    """One client's conversation."""
    rng, messages, before = random.Random(number), list[dict[str, str]](), 0
    for turn in range(turns):
        messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=20))})
        for _ in range(MOST_TRIES):
            text, usage, ending = reply(port, f"conversation-{number}", messages)
            if ending == "whole":
                break
            with course.lock:
                course.counts[ending] += 1
        else:
            course.wrong.append(f"client {number}, turn {turn}: {ending}, {MOST_TRIES} times")
            return
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        course.answered(cached >= before - OPENING if turn else None)
        before = usage["prompt_tokens"]
        messages.append({"role": "assistant", "content": text})


def reply(port: int, name: str, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any], str]:
    """The text, the usage, and how it ended: "whole", or "broken" once its stream had begun. Else an error."""
    connection = opened(port)
    asked = {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True,
             "stream_options": {"include_usage": True}}  # fmt: skip
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"X-Conversation-Id": name})
    answer = connection.getresponse()
    if answer.status != 200:
        raise ValueError(f"{name}: {answer.status} {answer.read()[:200]!r}")
    text, usage = "", dict[str, Any]()
    try:
        for line in answer:
            if line.strip() == b"data: [DONE]":
                return text, usage, "whole"
            if line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                usage = chunk.get("usage") or usage
    except (http.client.IncompleteRead, ConnectionResetError):
        pass
    except TimeoutError:
        raise ValueError(f"{name}: a stream was silent for {HUNG} s") from None
    finally:
        connection.close()
    return text, usage, "broken"


def nginx(folder: Path, text: str) -> tuple[str, list[str | Path]]:
    """Its file, but for what it writes, and how it is started."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    text = text.replace("http {", f"http {{ access_log off; {scratch}")
    text = f"daemon off; pid {folder}/pid; error_log {folder}/errors;\n{text}"
    return text, ["-c", folder / "config", "-p", folder, "-e", folder / "errors"]


def haproxy(folder: Path, text: str) -> tuple[str, list[str | Path]]:
    return text, ["-q", "-f", folder / "config"]


BALANCERS = {"nginx": ("nginx.conf", nginx), "haproxy": ("haproxy.cfg", haproxy)}


@contextmanager
def balancer(name: str, folder: Path, ports: list[int]) -> Iterator[None]:
    """A balancer as deploy/ has it, but for its ports and what it writes, once it answers."""
    file, prepared = BALANCERS[name]
    text = (DEPLOY / file).read_text(encoding="utf-8")
    for published, port in zip(PORTS, ports, strict=True):
        text = text.replace(f"127.0.0.1:{published}", f"127.0.0.1:{port}")
    text, arguments = prepared(folder, text)
    (folder / "config").write_text(text, encoding="utf-8")
    with subprocess.Popen([name, *arguments]) as process:
        try:
            while process.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", ports[0]), 1):
                    break
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


def main(
    name: Annotated[str, typer.Argument(help=f"The balancer: {' or '.join(BALANCERS)}.")],
    clients: Annotated[int, typer.Option(min=1, help="Conversations at once.")] = 32,
    turns: Annotated[int, typer.Option(min=2, help="Of each conversation.")] = 12,
) -> None:
    """Talk with all of them."""
    if name not in BALANCERS or shutil.which(name) is None:
        raise typer.BadParameter(f"{name} is no balancer that is installed; expected {' or '.join(BALANCERS)}")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model = write_planted(folder / "model", Shape(window=256, context=4096), 1, 2.2)
        servers = [
            stack.enter_context(server(model, folder / f"log-{place}", "--store-bytes", STORE_BYTES))
            for place in range(3)
        ]
        own = free_port()
        stack.enter_context(balancer(name, folder, [own, *(port for _, port in servers)]))
        course = Course()
        stopped, killed = servers[1][0], servers[0][0]
        course.events[clients * turns // 3] = killed.kill
        course.events[clients * turns * 2 // 3] = stopped.terminate
        with ThreadPoolExecutor(clients) as pool:
            for failed in [pool.submit(talk, own, number, turns, course) for number in range(clients)]:
                if (error := failed.exception()) is not None:
                    course.wrong.append(f"{type(error).__name__}: {error}")
        if course.events:
            course.wrong.append("the clients came to their end before all that was to happen did")
            stopped.terminate()
        status = stopped.wait(60)
        if status:
            course.wrong.append(f"the server that was told to stop ended with status {status}")
        text = (folder / "log-1").read_text(encoding="utf-8")
        course.wrong += re.findall("Traceback.*", text, re.DOTALL)
    later = course.counts["found"] + course.counts["read anew"]
    share = course.counts["found"] / max(1, later)
    print(f"{dict(course.counts)}; {100 * share:.1f} % of {later} later prompts were found; {len(course.wrong)} wrong")
    for line in course.wrong[:20]:
        print(line[:1000])
    sys.exit(int(bool(course.wrong) or share < 0.9))


if __name__ == "__main__":
    typer.run(main)
