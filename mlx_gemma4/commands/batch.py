"""The command `mlx_gemma4.batch`: a file of requests to a file of replies, in OpenAI's batch format.

What is in OUT says alone what has been answered, so that the command may be killed at any moment and called again.
"""

import fcntl
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import mlx.core as mx
import typer

from mlx_gemma4 import flags
from mlx_gemma4.commands.generate import load_shown
from mlx_gemma4.config import computing_type
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.completion import asked, completion, failure
from mlx_gemma4.engine.engine import AHEAD, Engine, check_max_batch
from mlx_gemma4.engine.request import adapter_named
from mlx_gemma4.errors import a, one_line, shown
from mlx_gemma4.flags import adapters_of
from mlx_gemma4.planner import check_memory
from mlx_gemma4.prompt.messages import with_media_from
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.reply.reply import collect
from mlx_gemma4.terminal import Bar, awake, run
from mlx_gemma4.weights.load import DEFAULT_MODEL, check_split, find_checkpoint
from mlx_gemma4.weights.peers import follows, hear, launched, lead, release, same

METHOD, URL = "POST", "/v1/chat/completions"
HEAD = b'{"id": "batch_req_'  # of each line of OUT
BOM = b"\xef\xbb\xbf"


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, in OpenAI's batch format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The answers, a line each, as they come.")],
    model: flags.ModelName = DEFAULT_MODEL,
    max_batch: flags.MaxBatch = 8,
    drafter: flags.DrafterName = "auto",
    store: flags.StoreFolder = None,
    adapter: flags.Adapters = [],  # noqa: B006
    dtype: flags.DType = None,
    kv_bits: flags.KvBits = None,
    split: flags.Split = None,
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Answer a file of chat completions, many at once. Called again, it goes on where it stopped."""
    check_max_batch(max_batch)
    check_split(split)
    lead()
    group = launched()
    load = partial(loaded, model, drafter, computing_type(dtype), kv_bits, group, split, max_batch, store, adapter)
    if follows(group):
        if hear():
            load().follow()
        return
    names = {line.name for line in lines_of(source)}
    with opened(target) as out:
        done = answered(out, source, target, names)
        failed = 0
        if len(done) == len(names):
            release(group)
        else:
            same(group, True)
            tasks = (task for task in tasks_of(source) if task.name not in done)
            with awake(), load() as engine, Bar("Answering") as bar:
                bar.show(len(done), len(names))
                for number, answer in enumerate(answers(engine, tasks, source.parent, model), len(done) + 1):
                    append(out, target, answer)
                    failed += answer["error"] is not None
                    bar.show(number, len(names))
    before = f"; {len(done)} were before" if done else ""
    print(f"{len(names) - len(done)} lines answered, {failed} of them with an error{before}", file=sys.stderr)


def loaded(
    model: str, drafter: str | None, dtype: mx.Dtype | None, kv_bits: int | None, group: mx.distributed.Group | None,
    split: str | None, max_batch: int, store: Path | None, adapter: list[str],
) -> Engine:  # fmt: skip
    checkpoint = find_checkpoint(model, drafter, dtype, kv_bits, adapters_of(adapter), group, split)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    check_memory(checkpoint.footprint)
    kept = PromptStore(folder=store)
    load_shown(checkpoint)
    return Engine(checkpoint.model, processor, max_batch, kept)


# --- IN ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    number: int  # from 1
    name: str  # a hash of its text, and which of the lines with this text it is
    text: bytes


def lines_of(source: Path) -> Iterator[Line]:
    """Those that are not blank. ValueError if the file cannot be read, and again from its beginning."""
    copies: Counter[str] = Counter()
    try:
        with source.open("rb") as file:
            if not file.seekable():  # a pipe's lines would be counted, and gone when they are to be answered
                raise ValueError(f"{str(source)!r} is a pipe; expected a file, which is read twice")
            file.seek(0)  # macOS gives /dev/stdin with the place where it was left
            for number, raw in enumerate(file, 1):
                text = raw.removeprefix(BOM).strip()
                name = hashlib.blake2b(text, digest_size=8).hexdigest()
                copies[name] += 1
                if text:
                    yield Line(number, name if copies[name] == 1 else f"{name}_{copies[name]}", text)
    except OSError as error:
        raise ValueError(f"{str(source)!r} cannot be read: {one_line(error)}") from None


@dataclass(frozen=True)
class Task:
    """What a line asks."""

    name: str
    custom_id: str | None
    body: Any
    error: ValueError | None  # why it cannot be answered


def tasks_of(source: Path) -> Iterator[Task]:
    known: set[str] = set()
    for line in lines_of(source):
        try:
            asks: Any = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            yield Task(line.name, None, None, ValueError(f"line {line.number} is not JSON: {one_line(error)}"))
            continue
        found = asks if isinstance(asks, dict) else {}
        custom_id, problem = found.get("custom_id"), problem_of(asks, known)
        if not isinstance(custom_id, str):
            custom_id = None
        else:
            known.add(custom_id)
        wrong = None if problem is None else ValueError(f"line {line.number}: {problem}")
        yield Task(line.name, custom_id, found.get("body"), wrong)


def problem_of(asks: Any, known: Collection[str]) -> str | None:
    """What is wrong with a line around its body. known: the ids of those before it."""
    if not isinstance(asks, dict):
        return f"it is {a(asks)}; expected an object with custom_id, method, url and body"
    custom_id = asks.get("custom_id")
    if not isinstance(custom_id, str):
        return f"custom_id is {shown(custom_id)}; expected a string"
    if custom_id in known:
        return f"custom_id is {shown(custom_id)}, as in a line before; expected one that no other line has"
    for key, value in (("method", METHOD), ("url", URL)):
        if asks.get(key) != value:
            return f"{key} is {shown(asks.get(key))}; expected {value}"
    return None


# --- answers -----------------------------------------------------------------------------------


def answers(engine: Engine, tasks: Iterator[Task], folder: Path, model: str) -> Iterator[dict[str, Any]]:
    """In the order in which they are finished. So many are prepared at once that a free place finds the next one."""
    most = AHEAD * engine.max_batch
    pending: set[Future[dict[str, Any]]] = set()
    with ThreadPoolExecutor(most) as pool:
        for task in tasks:
            pending.add(pool.submit(answer_to, task, engine, folder, model))
            if len(pending) == most:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)


def answer_to(task: Task, engine: Engine, folder: Path, model: str) -> dict[str, Any]:
    """A line of OUT."""
    words = None
    try:
        if task.error is not None:
            raise task.error
        request, options = asked(with_media_from(folder, task.body))
        adapter = adapter_named(task.body.get("model"), engine.model.config.adapters, model)
        reply = collect(engine.ask(request, replace(options, adapter=adapter)))
        status, body = 200, completion(reply, adapter or model, task.name)
    except Exception as error:  # whatever one line raises, the others are to be answered
        status, words = failure(error)
        body = {"error": words}
    response = {"status_code": status, "request_id": f"req_{task.name}", "body": body}
    return {"id": f"batch_req_{task.name}", "custom_id": task.custom_id, "response": response, "error": words}


# --- OUT ---------------------------------------------------------------------------------------


@contextmanager
def opened(target: Path) -> Iterator[BinaryIO]:
    """The file to read and to add to, for one process at a time; ValueError if it is no such file."""
    try:
        file = target.open("a+b")
    except OSError as error:
        raise ValueError(f"{str(target)!r} cannot be written to: {one_line(error)}") from None
    with file:
        if not target.is_file():  # a device may give bytes without end
            raise ValueError(f"{str(target)!r} is no file; expected one, or a new name")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{str(target)!r} is being written to by another process") from None
        yield file


def append(out: BinaryIO, target: Path, answer: dict[str, Any]) -> None:
    """A line more; OSError that names the file if it is not on the disk."""
    line = json.dumps(answer).encode() + b"\n"
    try:
        out.write(line)
        out.flush()
    except OSError as error:
        with suppress(OSError):
            out.close()  # which writes once more what is left: here, where another error takes no other's place
        raise OSError(f"{str(target)!r} cannot be written to: {one_line(error)}") from None


def answered(out: BinaryIO, source: Path, target: Path, names: Collection[str]) -> set[str]:
    """The names of the lines that have their answer; half a line at the end, which a kill leaves, is cut off."""
    found: set[str] = set()
    out.seek(0)
    whole = 0
    for number, raw in enumerate(out, 1):
        if not raw.endswith(b"\n") and HEAD.startswith(raw[: len(HEAD)]):
            out.truncate(whole)
            break
        whole += len(raw)
        name = raw[len(HEAD) :].split(b'"')[0].decode(errors="replace")
        if not raw.startswith(HEAD) or name not in names or name in found:
            raise ValueError(
                f"line {number} of {str(target)!r} answers no line of {str(source)!r}; expected its answers alone, or "
                "no such file"
            )
        found.add(name)
    return found


def main() -> int:
    return run(batch)
