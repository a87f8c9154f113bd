"""The one file that knows where the package keeps what is fuzzed: names that move are changed here."""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx_gemma4
from mlx_gemma4 import Prompt, Sampling, generate, load, stream_generate
from mlx_gemma4.command import main as generate_main
from mlx_gemma4.config import ModelConfig, read_config
from mlx_gemma4.convert import main as convert_main
from mlx_gemma4.errors import CheckpointError, FetchError, MediaError
from mlx_gemma4.evaluate import main as evaluate_main
from mlx_gemma4.fit import main as fit_main
from mlx_gemma4.model import Model
from mlx_gemma4.processor import Processor, load_processor
from mlx_gemma4.reply import Controls, ReplyParser

__all__ = [
    "CheckpointError", "FetchError", "MediaError", "Model", "ModelConfig", "Processor", "Prompt", "ReplyParser",
    "Sampling", "demo", "demo_processor", "generate", "load", "load_processor", "parser", "read_config", "run_command",
    "stream_generate",
]  # fmt: skip

PACKAGE = Path(mlx_gemma4.__file__).parent
DEMO = PACKAGE / "demo"
SAMPLES = DEMO / "samples"
LOGGER = "mlx_gemma4"
COMMANDS: dict[str, Callable[[], int]] = {
    "generate": generate_main,
    "convert": convert_main,
    "fit": fit_main,
    "evaluate": evaluate_main,
}


@cache
def demo() -> tuple[Model, Processor]:
    return load(DEMO)


@cache
def demo_processor() -> Processor:
    """Without weights."""
    return load_processor(DEMO, read_config(DEMO))


def parser(prompt_ids: list[int]) -> ReplyParser:
    tokenizer = demo_processor().tokenizer
    return ReplyParser(tokenizer, Controls.from_tokenizer(tokenizer), prompt_ids)


@dataclass(frozen=True)
class Ran:
    """What became of a command."""

    status: int  # as a shell has it, negative for a signal
    out: bytes
    err: bytes
    peak: int  # kilobytes on Linux, of the process


def run_command(name: str, arguments: list[bytes], folder: str, stdin: bytes = b"") -> Ran:
    """A command in a child of this process, which has imported all and computed nothing, so that it starts at once."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        child = os.fork()
        if child == 0:
            status = 70  # what raises out of `main` also prints its traceback
            try:
                for number, file in enumerate((given, out, err)):
                    os.dup2(file.fileno(), number)
                for number, mode in enumerate(("r", "w", "w")):
                    stream = os.fdopen(number, mode, encoding="utf-8", errors="surrogateescape", closefd=False)
                    setattr(sys, ("stdin", "stdout", "stderr")[number], stream)
                sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
                os.chdir(folder)
                sys.argv = [f"mlx_gemma4.{name}", *map(os.fsdecode, arguments)]
                status = COMMANDS[name]()
                sys.stdout.flush()
            except SystemExit as left:
                status = left.code if isinstance(left.code, int) else 1 if left.code else 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status & 255)
        _, waited, usage = os.wait4(child, 0)
        for file in (out, err):
            file.seek(0)
        return Ran(os.waitstatus_to_exitcode(waited), out.read(), err.read(), usage.ru_maxrss)


def context(**more: Any) -> dict[str, Any]:
    """The names that a script has, for inputs that are expressions."""
    import mlx.core as mx
    import numpy as np
    from PIL import Image

    model, processor = demo()
    return {
        "np": np, "mx": mx, "Image": Image, "Path": Path, "load": load, "generate": generate, "Prompt": Prompt,
        "stream_generate": stream_generate, "Sampling": Sampling, "model": model, "processor": processor,
        "DEMO": DEMO, "SAMPLES": SAMPLES,
    } | more  # fmt: skip
