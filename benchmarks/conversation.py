"""What a conversation costs turn by turn: seconds to the first token and tokens read, with and without a store.

    python benchmarks/conversation.py --model FOLDER --turns 30 --first-tokens 3000 --tokens 300 --output RESULTS

Three series say the same: without a store, with one, and with one on disk where each turn is a process of its own. The
texts are random, the replies greedy. With `--server NAME=URL`, once or more, servers that speak OpenAI's protocol are
asked the same, in turns. RESULTS/chart.png shows the series; the last line of standard output is JSON.
"""

import json
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import typer
from decode import load_endless, machine, machine_line, run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serve import chunks

from mlx_gemma4 import Sampling, Session, generate
from mlx_gemma4.engine.session import ABOUT
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Reply

Turn = dict[str, float]
GREEDY = Sampling(temperature=0)


def main(
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")],
    turns: Annotated[int, typer.Option(min=1, help="How often something is asked.")] = 10,
    first_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the first message, about.")] = 3000,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each later message, about.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each reply.")] = 50,
    server: Annotated[list[str] | None, typer.Option(help="NAME=http://HOST:PORT; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for chart.png; needs the extra benchmark.")] = None,
) -> None:
    """One conversation, three times, and once more with each server."""
    if output is not None and find_spec("matplotlib") is None:
        raise ImportError('matplotlib is not installed; expected pip install "mlx_gemma4[benchmark]"')
    hosts = dict(server_of(named) for named in server or [])
    loaded, processor = load_endless(model)
    texts = [text_of(processor, first_tokens if turn == 0 else tokens, turn) for turn in range(turns)]
    session = Session(loaded, processor)
    messages: list[dict[str, Any]] = []

    def without(text: str) -> Reply:
        messages.append({"role": "user", "content": text})
        reply = generate(loaded, processor, messages, max_tokens=max_tokens, sampling=GREEDY)
        messages.append(reply.message)
        return reply

    def with_store(text: str) -> Reply:
        return session.send(text, max_tokens=max_tokens, sampling=GREEDY)

    generate(loaded, processor, "warm up", max_tokens=max_tokens, sampling=GREEDY)
    series = {
        "no store": measure(without, texts, "no store"),
        "store": measure(with_store, texts, "store"),
        "disk, a process each turn": restarted(model, texts, max_tokens),
    }
    series |= served(hosts, model, texts, max_tokens)
    report(model, series, max_tokens)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        draw(series, output / "chart.png")


def text_of(processor: Processor, tokens: int, seed: int) -> str:
    """About so many tokens of words that the tokenizer has."""
    vocab = [word.replace("▁", " ") for word in processor.tokenizer.get_vocab() if word.replace("▁", "").isalpha()]
    chosen = np.random.default_rng(seed).choice(sorted(vocab), tokens)
    return processor.tokenizer.decode(processor.tokenizer.encode("".join(chosen)).ids[:tokens])


def figures(reply: Reply) -> Turn:
    stats = reply.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "read_tokens": stats.prompt_tokens - stats.cached_tokens,
        "time_to_first_token": stats.time_to_first_token,
        "peak_memory": stats.peak_memory,
    }


def measure(ask: Callable[[str], Reply], texts: list[str], name: str) -> list[Turn]:
    return [figures(ask(text)) for text in track(texts, name, console=Console(stderr=True), transient=True)]


def restarted(model: str, texts: list[str], max_tokens: int) -> list[Turn]:
    """Each turn in a process of its own, which knows the conversation from its folder."""
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(one_turn, (model, str(Path(folder) / "session"), text, max_tokens)) for text in texts]


def one_turn(model: str, folder: str, text: str, max_tokens: int) -> Turn:
    loaded: tuple[Model, Processor] = load_endless(model)
    session = Session.load(folder, *loaded) if (Path(folder) / ABOUT).exists() else Session(*loaded)
    reply = session.send(text, max_tokens=max_tokens, sampling=GREEDY)
    session.save(folder)
    return figures(reply)


def server_of(named: str) -> tuple[str, str]:
    """Name and host."""
    name, _, url = named.partition("=")
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.netloc or parts.path:
        raise ValueError(f"server is {named!r}; expected NAME=http://HOST:PORT")
    return name, parts.netloc


def served(hosts: dict[str, str], model: str, texts: list[str], max_tokens: int) -> dict[str, list[Turn]]:
    """The same of servers by name, which take turns."""
    messages: dict[str, list[dict[str, str]]] = {name: [] for name in hosts}
    series: dict[str, list[Turn]] = {name: [] for name in hosts}
    for text in texts:
        for name, host in hosts.items():
            messages[name].append({"role": "user", "content": text})
            turn, reply = ask_server(host, model, messages[name], max_tokens)
            messages[name].append({"role": "assistant", "content": reply})
            series[name].append(turn)
    return series


def ask_server(host: str, model: str, messages: list[dict[str, str]], max_tokens: int) -> tuple[Turn, str]:
    asked = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    started, first, text, usage = time.perf_counter(), 0.0, "", dict[str, Any]()
    for chunk in chunks(host, asked):
        usage = chunk.get("usage") or usage
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if text:
            first = first or time.perf_counter() - started
    read = usage["prompt_tokens"] - (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {"prompt_tokens": usage["prompt_tokens"], "read_tokens": read, "time_to_first_token": first}, text


def report(model: str, series: dict[str, list[Turn]], max_tokens: int) -> None:
    console = Console()
    console.print(machine_line(machine()))
    table = Table("turn", "prompt tokens", *(f"{name}: read, first token" for name in series))
    for turn, entries in enumerate(zip(*series.values(), strict=True)):
        cells = [f"{entry['read_tokens']:.0f}, {entry['time_to_first_token']:.2f} s" for entry in entries]
        table.add_row(str(turn + 1), f"{entries[0]['prompt_tokens']:.0f}", *cells)
    console.print(table)
    print(json.dumps({"model": model, "machine": machine(), "max_tokens": max_tokens, "series": series}))


def draw(series: dict[str, list[Turn]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, turns in series.items():
        axes.plot(range(1, len(turns) + 1), [turn["time_to_first_token"] for turn in turns], marker=".", label=name)
    axes.set(xlabel="turn", ylabel="seconds to the first token", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main)
