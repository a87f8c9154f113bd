"""The command `mlx_gemma4.generate`: the answer goes to standard output, everything else to standard error."""

import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from typer.exceptions import TyperException

from mlx_gemma4.controller import check_draft_length
from mlx_gemma4.generation import Reading, generation_events, make_prompt
from mlx_gemma4.messages import Message, media_parts, request_messages
from mlx_gemma4.prompt import load_processor
from mlx_gemma4.reply import Piece, Stats
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.source import FetchError, local_path
from mlx_gemma4.weights import Checkpoint, find_drafter, find_folder, load_values, logger, open_checkpoint

if TYPE_CHECKING:
    from rich.progress import Progress

DEFAULT_MODEL = "mlx-community/gemma-4-12B-it-4bit"
WRONG_REQUEST, FAILED, STOPPED = 2, 1, 130  # exit statuses

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


# Parsers of options: typer's own messages do not say which value was wrong.


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; expected a number") from None


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; expected a whole number") from None


def whole_above_0(text: str) -> int:
    if (value := whole_number(text)) < 1:
        raise typer.BadParameter(f"{text!r}; expected a whole number above 0")
    return value


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to ask; - reads standard input.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="A model folder or a hub id.")] = DEFAULT_MODEL,
    image: Annotated[list[str], typer.Option(metavar="FILE", help="An image file or URL; repeatable.")] = [],  # noqa: B006
    audio: Annotated[list[str], typer.Option(metavar="FILE", help="A sound file or URL; repeatable.")] = [],  # noqa: B006
    video: Annotated[
        list[str], typer.Option(metavar="FILE", help="A video file or URL; repeatable. Its sound is not heard.")
    ] = [],  # noqa: B006
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Instructions for the whole conversation.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think before it answers.")] = False,
    max_tokens: Annotated[
        int, typer.Option(parser=whole_above_0, metavar="N", help="The longest reply, in tokens.")
    ] = 1024,
    temp: Annotated[float | None, typer.Option(parser=number, metavar="X", help="Temperature; 0 is greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(parser=number, metavar="X", help="Sample from the most likely tokens of this mass.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(parser=whole_number, metavar="N", help="Sample from this many tokens; 0: all.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(parser=number, metavar="X", help="Leave out tokens below this part of the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(parser=number, metavar="X", help="Above 1, repeat less.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(parser=whole_number, metavar="N", help="For the same reply again.")
    ] = None,
    image_budget: Annotated[
        int | None, typer.Option(parser=whole_number, metavar="N", help="Tokens an image: 70, 140, 280, 560 or 1120.")
    ] = None,
    drafter: Annotated[
        str, typer.Option(metavar="MODEL", help="A drafter's folder or hub id, auto, or none.")
    ] = "auto",
    draft_length: Annotated[str, typer.Option(metavar="N", help="Tokens drafted a round, or auto; 0: none.")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Ask Gemma 4 about text, images, sounds and videos. What is not given comes from the checkpoint."""
    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    length = parse_draft_length(draft_length)
    messages = request_messages(read_prompt(prompt), image, audio, video, system)
    check_media(messages, image_budget)
    # All that can be wrong with the request is found before gigabytes are downloaded or loaded for it.
    with ctrl_c_at_once():
        folder = find_folder(model)
        choice = find_drafter(model, folder, None if drafter == "none" else drafter)
    checkpoint = open_checkpoint(folder, choice)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    started = time.perf_counter()
    request = make_prompt(processor, messages, (), (), (), None, None, thinking, image_budget)
    prepared = time.perf_counter() - started
    events = generation_events(checkpoint.model, processor, request, max_tokens, sampling, length, prepared)
    load_shown(checkpoint)
    print_reply(events)


def read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None


def parse_draft_length(text: str) -> int | str:
    length = int(text) if text.isdecimal() else text
    check_draft_length(length)
    return length


def check_media(messages: list[Message], image_budget: int | None) -> None:
    """What can be said about the media without the checkpoint: whether the files are there and the budget exists."""
    for part in media_parts(messages):
        local_path(part[part["type"]], part["type"])
    if image_budget is not None:
        from mlx_gemma4.image import check_budget  # here: it imports Pillow, which a text prompt does not need

        check_budget(image_budget)


@contextmanager
def ctrl_c_at_once() -> Iterator[None]:
    """Ctrl-C ends the process; the threads of a download would be waited for, until their files are complete."""

    def leave(*_: object) -> None:
        os.write(sys.stderr.fileno(), b"\n")  # below the bars
        os._exit(STOPPED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def load_shown(checkpoint: Checkpoint) -> None:
    """Load the weights with a bar."""
    done = 0
    with Bar("Loading") as bar:
        for nbytes in load_values(checkpoint):
            done += nbytes
            bar.show(done, checkpoint.nbytes)


def print_reply(events: Iterator[Reading | Piece]) -> None:
    """Show how far the prompt is read, then print the pieces as they come; warnings wait until the answer is out."""
    last: Piece | None = None
    answered = thinking = False  # whether that line is still open
    with warnings.catch_warnings(record=True) as caught, Bar("Reading") as bar:
        try:
            for event in events:
                if isinstance(event, Reading):
                    bar.show(event.done, event.total)
                    continue
                bar.close()
                last = event
                if event.thinking:
                    thinking = True
                    print(event.thinking, end="", file=sys.stderr, flush=True)
                if event.text:
                    if thinking:
                        thinking = False
                        print(file=sys.stderr)
                    answered = True
                    print(event.text, end="", flush=True)
        finally:
            bar.close()
            if thinking:
                print(file=sys.stderr)
            if answered:
                print(flush=True)
            for warning in caught:
                show_warning(warning.message)
    if last is not None and last.stats is not None:
        for call in last.tool_calls or ():
            print(f"tool call: {json.dumps(call, ensure_ascii=False)}", file=sys.stderr)
        print(stats_line(last.stats), file=sys.stderr)


def stats_line(stats: Stats) -> str:
    return (
        f"prompt {stats.prompt_tokens} tokens, {stats.prompt_tps:.1f} tokens/s; "
        f"reply {stats.generation_tokens} tokens, {stats.generation_tps:.1f} tokens/s; "
        f"first token after {stats.time_to_first_token:.2f} s; peak memory {stats.peak_memory / 1e9:.2f} GB"
        + drafting(stats)
    )


def drafting(stats: Stats) -> str:
    if not stats.drafted_tokens:
        return ""
    by_position = " ".join(f"{part:.2f}" for part in stats.acceptance_by_position)
    return (
        f"; {stats.rounds} rounds, {stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted "
        f"({by_position}), {stats.tokens_per_round:.2f} tokens a round"
    )


class Bar:
    """A progress bar on standard error, if that is a terminal; it appears with the first step of several."""

    def __init__(self, title: str):
        self.title = title
        self.shown: Progress | None = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def show(self, done: int, total: int) -> None:
        if self.shown is None and done < total and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.shown = Progress(console=Console(stderr=True), transient=True)
            self.shown.add_task(self.title, total=total)
            self.shown.start()
        if self.shown is not None:
            self.shown.update(self.shown.task_ids[0], completed=done)

    def close(self) -> None:
        if self.shown is not None:
            self.shown.stop()
            self.shown = None


def show_warning(message: Warning | str) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def on_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """For `warnings.showwarning`: what is wrong, not where in the code."""
    show_warning(message)


def main() -> int:
    """Run the command; errors become one line and an exit status."""
    warnings.showwarning = on_warning
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks is no reason to stop
    news = logging.StreamHandler(sys.stderr)
    logger.addHandler(news)
    logger.setLevel(logging.INFO)
    try:
        return app(standalone_mode=False) or 0  # typer gives 130 for Ctrl-C and 1 for a closed pipe
    except (TyperException, ValueError, OSError, MemoryError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        text = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        wrong = isinstance(error, (TyperException, ValueError)) and not isinstance(error, FetchError)
        return WRONG_REQUEST if wrong else FAILED
    finally:
        logger.removeHandler(news)
