"""Where commands begin: a signal ends them as it should at any moment, also while the rest is still imported.

Imports nothing heavy. A handler that raised would end where Python calls back from a library or tidies up, as an
ignored exception; so it does what is left to do and leaves.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

STOPPED = 128  # and the signal's number: the exit status
CLOSED_PIPE = 141
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]

# What remains to be done if a signal ends the process now: half-written files go, an open line ends.
left_to_do: list[Callable[[], object]] = []


def enter(module: str) -> int:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and jobs in the background have it
            signal.signal(number, leave)
    status: int = import_module(module).main()
    return status


generate = partial(enter, "mlx_gemma4.commands.generate")
convert = partial(enter, "mlx_gemma4.convert.command")
evaluate = partial(enter, "mlx_gemma4.evaluate.command")
fuse = partial(enter, "mlx_gemma4.commands.fuse")
fit = partial(enter, "mlx_gemma4.commands.fit")
serve = partial(enter, "mlx_gemma4.serve.command")
batch = partial(enter, "mlx_gemma4.commands.batch")
tune = partial(enter, "mlx_gemma4.tune.command")
chat = partial(enter, "mlx_gemma4.commands.chat")


def leave(number: int, frame: object) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    try:
        for action in reversed(left_to_do):
            action()
    finally:
        os._exit(STOPPED + number)


def closed_pipe() -> int:
    """The reader had enough, as of `| head -1`: no error, and nobody to tell."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)  # Python writes out what is left when it ends
    return CLOSED_PIPE


@contextmanager
def if_stopped(action: Callable[[], object]) -> Iterator[None]:
    """While the block runs, a signal does this before the process ends; it must not fail."""
    left_to_do.append(action)
    try:
        yield
    finally:
        left_to_do.remove(action)
