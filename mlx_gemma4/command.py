"""The command `mlx_gemma4.generate`: the answer goes to standard output, everything else to standard error."""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from mlx_gemma4.generation import Reading, generation_events, make_prompt
from mlx_gemma4.model import Model
from mlx_gemma4.prompt import Processor, load_processor
from mlx_gemma4.reply import Piece, Stats
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.weights import check_drafter, find_folder, load_values, open_checkpoint

if TYPE_CHECKING:
    from rich.progress import Progress

DEFAULT_MODEL = "mlx-community/gemma-4-12B-it-4bit"
WRONG_REQUEST, FAILED = 2, 1  # exit statuses; typer's own is 130 for Ctrl-C

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to ask; - reads standard input.")],
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")] = DEFAULT_MODEL,
    image: Annotated[list[str], typer.Option(help="An image file or URL; repeatable.")] = [],  # noqa: B006
    audio: Annotated[list[str], typer.Option(help="A sound file or URL; repeatable.")] = [],  # noqa: B006
    video: Annotated[list[str], typer.Option(help="A video file; repeatable. Its sound is not heard.")] = [],  # noqa: B006
    system: Annotated[str | None, typer.Option(help="Instructions for the whole conversation.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think before it answers.")] = False,
    max_tokens: Annotated[int, typer.Option(help="The longest reply, in tokens.")] = 1024,
    temp: Annotated[float | None, typer.Option(help="Temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens; 0: all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this part of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the same reply again.")] = None,
    image_budget: Annotated[int | None, typer.Option(help="Tokens an image: 70, 140, 280, 560 or 1120.")] = None,
    drafter: Annotated[str, typer.Option(help="A drafter's folder or hub id, auto, or none.")] = "auto",
    draft_length: Annotated[str, typer.Option(help="Tokens drafted a round, or auto; 0: none.")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Ask Gemma 4 about text, images, sounds and videos. What is not given comes from the checkpoint."""
    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    check_drafter(None if drafter == "none" else drafter)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded, processor = load_shown(model)
    started = time.perf_counter()
    request = make_prompt(processor, text, image, audio, video, system, None, thinking, image_budget)
    length = int(draft_length) if draft_length.isdecimal() else draft_length
    events = generation_events(loaded, processor, request, max_tokens, sampling, length, started)
    print_reply(events)


def load_shown(path_or_hub_id: str) -> tuple[Model, Processor]:
    """`load`, with a bar."""
    checkpoint = open_checkpoint(find_folder(path_or_hub_id))
    processor = load_processor(checkpoint.folder, checkpoint.config)
    done = 0
    with Bar("Loading") as bar:
        for nbytes in load_values(checkpoint.model, checkpoint.tensors):
            done += nbytes
            bar.show(done, checkpoint.nbytes)
    return checkpoint.model, processor


def print_reply(events: Iterator[Reading | Piece]) -> None:
    """Show how far the prompt is read, then print the pieces as they come."""
    thinking = False
    with Bar("Reading") as bar:
        try:
            for event in events:
                if isinstance(event, Reading):
                    bar.show(event.done, event.total)
                    continue
                bar.close()
                if event.thinking:
                    print(event.thinking, end="", file=sys.stderr, flush=True)
                elif thinking:
                    print(file=sys.stderr)
                thinking = bool(event.thinking) or (thinking and not event.text)
                print(event.text, end="", flush=True)
                if event.stats is not None:
                    print()
                    for call in event.tool_calls or ():
                        print(f"tool call: {json.dumps(call, ensure_ascii=False)}", file=sys.stderr)
                    print(stats_line(event.stats), file=sys.stderr)
        except KeyboardInterrupt:
            print()
            raise


def stats_line(stats: Stats) -> str:
    return (
        f"prompt {stats.prompt_tokens} tokens, {stats.prompt_tps:.1f} tokens/s; "
        f"reply {stats.generation_tokens} tokens, {stats.generation_tps:.1f} tokens/s; "
        f"first token after {stats.time_to_first_token:.2f} s; peak memory {stats.peak_memory / 1e9:.2f} GB"
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


def show_warning(message: Warning | str, *where: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> int:
    """Run the command; errors become one line and an exit status."""
    warnings.showwarning = show_warning
    try:
        return app(standalone_mode=False) or 0  # typer gives 130 for Ctrl-C
    except (TyperException, ValueError, OSError, MemoryError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        text = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        return WRONG_REQUEST if isinstance(error, (TyperException, ValueError)) else FAILED
