"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_gemma4.entry import if_stopped
from mlx_gemma4.errors import unbroken


def part_of(path: Path) -> Path:
    """The name of a file until it is whole, with its ending: mlx writes to no other."""
    return path.with_name(f".part-{path.name}")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write what is to take the place of `path` when the block has ended well."""
    part = part_of(path)
    try:
        with if_stopped(lambda: part.unlink(missing_ok=True)):
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with beside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_private(path: Path, data: bytes) -> None:
    """That only its owner may read."""
    path.unlink(missing_ok=True)  # of a process that was killed
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(data)


def write_arrays(path: Path, arrays: Mapping[str, mx.array], about: Mapping[str, str]) -> None:
    with beside(path) as part:
        try:
            mx.save_safetensors(str(part), dict(arrays), dict(about))
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written: {unbroken(error)}") from None
