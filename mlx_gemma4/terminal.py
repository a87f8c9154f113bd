"""What the commands share: errors in one line with an exit status, warnings, progress bars."""

import logging
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO, TextIOWrapper
from typing import TYPE_CHECKING, TextIO

import typer
from typer.exceptions import TyperException

from mlx_gemma4.entry import closed_pipe, if_stopped
from mlx_gemma4.errors import LONGEST, Kind, clipped, kind, unbroken, with_name
from mlx_gemma4.weights.load import logger
from mlx_gemma4.weights.peers import leave_word

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

WRONG_REQUEST, FAILED = 2, 1  # exit statuses
REMEMBERED = 1000  # lines that are said once
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run(command: Callable[..., int | None]) -> int:
    """Run a command with its options; what fails becomes one line on standard error and an exit status."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    warnings.showwarning = on_warning
    # closed by whoever started this:
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stderr, TextIOWrapper) and sys.stderr is sys.__stderr__:
        unbuffered = FileIO(sys.stderr.fileno(), "w", closefd=False)  # what is lost is not kept to be tried again
        sys.stderr = Lossy(unbuffered, sys.stderr.encoding, "backslashreplace", line_buffering=True)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks is no reason to stop
    news = News()
    news.setFormatter(Line())
    logger.addHandler(news)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        status: int = app(standalone_mode=False) or 0
        sys.stdout.flush()  # here, where a closed pipe is seen, and not when Python ends
        return status
    except BrokenPipeError:
        return closed_pipe()
    except SystemExit as end:  # typer's way to say that a pipe is closed
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return closed_pipe()
    except (TyperException, ValueError, OSError, MemoryError, RuntimeError) as error:
        leave_word(error)
        if "--debug" in sys.argv:
            traceback.print_exc()
        text = with_name(error)
        if isinstance(error, TyperException):
            text = clipped(error.format_message(), 2 * LONGEST)  # which quotes what it got, however long
        if isinstance(error, RuntimeError) and text.startswith("filesystem error"):  # MLX's, of where it compiles
            text += f"; MLX keeps kernels in a folder for temporary files, TMPDIR is {os.environ.get('TMPDIR')!r}"
        print(f"error: {text}", file=sys.stderr)
        wrong = isinstance(error, TyperException) or kind(error) is Kind.WRONG_REQUEST
        return WRONG_REQUEST if wrong else FAILED
    finally:
        logger.setLevel(level)
        logger.removeHandler(news)


class Lossy(TextIOWrapper):
    """A stream on which what a full disk or a reader that is gone does not take is lost: the answer goes elsewhere."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class News(logging.Handler):
    """Writes to standard error as it is then: while a bar is shown, that is a stream which writes above it.

    What concerns each turn of a conversation is said once; what a server says of a request, each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, None] = {}  # the newest last

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.name == "mlx_gemma4":
            if line in self.told:
                return
            self.told[line] = None
            if len(self.told) > REMEMBERED:
                del self.told[next(iter(self.told))]
        print(line, file=sys.stderr)


class Line(logging.Formatter):
    """What the package logs, in one line: a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        return warning + unbroken(record.getMessage())


def show_warning(message: Warning | str) -> None:
    print(f"warning: {unbroken(message)}", file=sys.stderr)


def on_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """For `warnings.showwarning`: what is wrong, not where in the code."""
    show_warning(message)


def is_screen(stream: TextIO) -> bool:
    """Whether text can be dim there, and lines drawn anew."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def without_controls(text: str) -> str:
    """A text without what could steer a terminal."""
    return CONTROLS.sub("", text)


# --- bars ---------------------------------------------------------------------------------------


class Bar:
    """A progress bar on standard error, if that is a terminal; it appears with the first step of several."""

    def __init__(self, title: str):
        self.title = title
        self.shown: Progress | None = None
        self.stopped = ExitStack()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def show(self, done: int, total: int) -> None:
        if self.shown is None and done < total and is_screen(sys.stderr):
            from rich.console import Console
            from rich.progress import Progress

            self.shown = Progress(*self.columns(), console=Console(stderr=True), transient=True)
            self.shown.add_task(self.title, total=total)
            self.stopped.enter_context(if_stopped(wipe))
            self.shown.start()
        if self.shown is not None:
            self.shown.update(self.shown.task_ids[0], completed=done)

    def count(self, steps: Iterable[int], total: int) -> None:
        """Take all steps, of such sizes."""
        done = 0
        for nbytes in steps:
            self.show(done := done + nbytes, total)

    def columns(self) -> "list[str | ProgressColumn]":
        from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

        return ["{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]

    def close(self) -> None:
        if self.shown is not None:
            self.shown.stop()
            self.stopped.close()
            self.shown = None


def wipe() -> None:
    """Take a bar's line away and show the cursor again, by no library that may be in the middle of the same."""
    os.write(2, b"\r\x1b[2K\x1b[?25h")


class SizeBar(Bar):
    """A bar that counts bytes."""

    def columns(self) -> "list[str | ProgressColumn]":
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn

        return ["{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()]


def size_text(nbytes: int) -> str:
    """A number of bytes, decimal as on the hub: 6.74 GB, 11.48 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


@contextmanager
def awake() -> Iterator[None]:
    """While the block runs a Mac does not fall asleep, and its screen may; when the process ends, so does this."""
    if sys.platform != "darwin":
        yield
        return
    with subprocess.Popen(["caffeinate", "-is", "-w", str(os.getpid())]) as caffeinate:
        try:
            yield
        finally:
            caffeinate.terminate()
