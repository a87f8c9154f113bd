"""Files that are written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_gemma4.entry import if_stopped
from mlx_gemma4.errors import unbroken


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f"part-{path.name}")
    try:
        with if_stopped(lambda: part.unlink(missing_ok=True)):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, mx.array], about: Mapping[str, str]) -> None:
    part = path.with_name(f"part-{path.name}")
    try:
        with if_stopped(lambda: part.unlink(missing_ok=True)):
            mx.save_safetensors(str(part), dict(arrays), dict(about))
            part.replace(path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {unbroken(error)}") from None
    finally:
        part.unlink(missing_ok=True)
