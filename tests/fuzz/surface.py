"""The one file that knows where the package keeps what is fuzzed: names that move are changed here."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx_gemma4
from mlx_gemma4 import Prompt, Sampling, generate, load, stream_generate
from mlx_gemma4.config import ModelConfig, read_config
from mlx_gemma4.errors import CheckpointError, FetchError, MediaError
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor, load_processor
from mlx_gemma4.reply.reply import Controls, ReplyParser

__all__ = [
    "CheckpointError", "FetchError", "MediaError", "Model", "ModelConfig", "Processor", "Prompt", "ReplyParser",
    "Sampling", "demo", "demo_processor", "generate", "load", "load_processor", "parser", "read_config", "run_command",
    "stream_generate",
]  # fmt: skip

PACKAGE = Path(mlx_gemma4.__file__).parent
DEMO = PACKAGE / "demo"
SAMPLES = DEMO / "samples"
LOGGER = "mlx_gemma4"


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
    """`python -m mlx_gemma4.NAME` in a folder."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        words: list[str | bytes] = [sys.executable, "-m", f"{mlx_gemma4.__name__}.{name}", *arguments]
        process = subprocess.Popen(words, stdin=given, stdout=out, stderr=err, cwd=folder)
        _, waited, usage = os.wait4(process.pid, 0)  # not process.wait(): it does not say how much memory it took
        process.returncode = os.waitstatus_to_exitcode(waited)
        for file in (out, err):
            file.seek(0)
        return Ran(process.returncode, out.read(), err.read(), usage.ru_maxrss)


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
