"""Pages of what has been read, as files in a folder that processes may share.

A file is named after all the tokens before its page, so that prompts that begin alike share files, and holds the tokens
of the page itself: it says by itself what it is good for. Nothing else is kept of the folder: files may be deleted at
any time. What is damaged, foreign or of another version is as good as not there, and said in one logged line.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.entry import if_stopped
from mlx_gemma4.errors import one_line
from mlx_gemma4.model.cache import Arrays

logger = logging.getLogger("mlx_gemma4")

MAGIC = b"MLXGEMMA4 PAGE 1\n"
SUFFIX, PART = ".page", ".part"
FULL, SLIDING = "full", "sliding"  # kinds of pages
OLD_PART = 3600  # seconds after which somebody's unfinished file is nobody's
FREE = 0.1  # of the disk stays free
SHARE = 0.1  # of the disk, if no bound is given
DTYPES = {str(dtype): dtype for dtype in (mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8)}


@dataclass(frozen=True, eq=False)
class Page:
    """Arrays of consecutive positions in all layers of a kind."""

    first: int
    arrays: list[Arrays]  # each [1, heads, count, …]

    @property
    def last(self) -> int:
        return self.first + self.count

    @property
    def count(self) -> int:
        return self.arrays[0][0].shape[2] if self.arrays else 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for own in self.arrays for array in own)

    def upto(self, last: int) -> "Page":
        """A copy of its positions before `last`."""
        count = last - self.first
        arrays = [tuple(mx.contiguous(array[:, :, :count]) for array in own) for own in self.arrays]
        return Page(self.first, arrays)


class Disk:
    """A folder of pages; ValueError if it cannot be one."""

    def __init__(self, folder: Path, most: int | None):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.chmod(folder, 0o700)
        except OSError as error:
            raise ValueError(
                f"the store's folder {str(folder)!r}: {one_line(error)}; expected a folder to write to"
            ) from None
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise ValueError(f"the store's folder {str(folder)!r} is not writable; expected a folder to write to")
        self.most = most if most is not None else int(shutil.disk_usage(folder).total * SHARE)
        now = time.time()
        for file in self.files(PART):
            if now - modified(file) > OLD_PART:
                file.unlink(missing_ok=True)

    def files(self, suffix: str = SUFFIX) -> list[Path]:
        try:
            return [Path(entry) for entry in os.scandir(self.folder) if entry.name.endswith(suffix)]
        except OSError:  # deleted meanwhile
            return []

    # --- reading -------------------------------------------------------------------------------

    def line(self, space: bytes, units: np.ndarray, size: int, most: int) -> Iterator[tuple[Page, Page | None]]:
        """What is kept of the beginning of these units, page by page of `size` positions, up to `most`: full entries
        and, where they are there, sliding ones."""
        by_name: dict[str, list[Path]] = {}
        for file in self.files():
            by_name.setdefault(file.name.rpartition("-")[0], []).append(file)
        before = space
        for first in range(0, most, size):
            own = units[first : min(first + size, most)]
            full = self.best(by_name, FULL, before, own, first)
            if full is None:
                return
            sliding = self.best(by_name, SLIDING, before, own[: full.count], first)
            yield full, sliding
            if full.count < size:
                return
            before = chained(before, own)

    def best(
        self, by_name: dict[str, list[Path]], kind: str, before: bytes, own: np.ndarray, first: int
    ) -> Page | None:
        """Of the pages after these tokens the one that has most of `own`, cut to what it has of it."""
        files = by_name.get(f"{kind}-{before.hex()}", [])
        exact = [file for file in files if file.name.endswith(f"-{named(own)}{SUFFIX}")]
        found: Page | None = None
        for file in exact or files:  # one that is damaged is gone, and the others are not asked
            page = self.read(file, own, first)
            if page is not None and (found is None or page.count > found.count):
                found = page
        return found

    def read(self, file: Path, own: np.ndarray, first: int) -> Page | None:
        """The page in a file as far as it is of these units; None if nothing of it is."""
        try:
            data = file.read_bytes()
        except OSError:  # deleted meanwhile, or closed to us
            return None
        try:
            header, body = parsed(data)
            units = np.frombuffer(base64.b64decode(header["units"], validate=True), np.uint64).reshape(-1, 3)
            start = int(header["first"])
            arrays = list(unpacked(header["arrays"], body))
        except (ValueError, KeyError, TypeError, IndexError, binascii.Error) as error:
            logger.warning("%s is damaged or of another version and is left out: %s", file.name, one_line(error))
            file.unlink(missing_ok=True)
            return None
        page = Page(start, arrays)  # a sliding page may begin later than its place
        if start < first or page.last != first + len(units):
            logger.warning("%s is of another place and is left out", file.name)
            return None
        last = first + common(own, units)
        if last <= start:
            return None
        touch(file)
        return page if last == page.last else page.upto(last)

    # --- writing -------------------------------------------------------------------------------

    def write(self, kind: str, before: bytes, own: np.ndarray, page: Page) -> None:
        """Keep a page; own: the units of its whole place, of which the page has the entries of the last ones or all."""
        name = f"{kind}-{before.hex()}-{named(own)}{SUFFIX}"
        if (self.folder / name).exists():
            touch(self.folder / name)
            return
        described, parts = packed(page)
        header = {"units": base64.b64encode(own.tobytes()).decode(), "first": page.first, "arrays": described}
        data = assembled(header, parts)
        if not self.make_room(len(data)):
            return
        part = self.folder / f"{name}.{os.getpid()}{PART}"
        try:
            with if_stopped(lambda: part.unlink(missing_ok=True)):
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
                    opened.write(data)
                part.replace(self.folder / name)
        except OSError as error:
            logger.warning("the store's folder %s cannot be written to: %s", self.folder, one_line(error))
            part.unlink(missing_ok=True)

    def make_room(self, nbytes: int) -> bool:
        """Delete what was used least lately until so many bytes fit; False if they cannot."""
        try:
            usage = shutil.disk_usage(self.folder)
        except OSError:
            return False
        files = sorted(((modified(file), size_of(file), file) for file in self.files()), key=lambda entry: entry[0])
        held = sum(size for _, size, _ in files)
        excess = max(held + nbytes - self.most, int(usage.total * FREE) + nbytes - usage.free)
        if excess > held:
            return False
        for _, size, file in files:
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= size
        return True


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many units from the beginning are the same."""
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).any(axis=1)
    return int(differs.argmax()) if differs.any() else length


def chained(before: bytes, own: np.ndarray) -> bytes:
    """The name of all tokens up to the end of a page, from that of those before it."""
    return hashlib.blake2b(before + own.tobytes(), digest_size=16).digest()


def named(own: np.ndarray) -> str:
    return hashlib.blake2b(own.tobytes(), digest_size=8).hexdigest()


def modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def touch(file: Path) -> None:
    """What was used is the last to be deleted."""
    with suppress(OSError):  # deleted meanwhile, or read-only
        os.utime(file)


# --- the bytes of a file -----------------------------------------------------------------------


def assembled(header: dict[str, Any], parts: list[bytes]) -> bytes:
    text = json.dumps(header).encode()
    rest = len(text).to_bytes(4, "little") + text + b"".join(parts)
    return MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest


def parsed(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and body; ValueError if a bit is not as it was written."""
    if not data.startswith(MAGIC):
        raise ValueError("no page of this version")
    start = len(MAGIC)
    rest = memoryview(data)[start + 4 :]
    if zlib.crc32(rest) != int.from_bytes(data[start : start + 4], "little"):
        raise ValueError("its checksum is wrong")
    size = int.from_bytes(rest[:4], "little")
    header = json.loads(bytes(rest[4 : 4 + size]))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, rest[4 + size :]


def packed(page: Page) -> tuple[list[list[list[Any]]], list[bytes]]:
    described: list[list[list[Any]]] = []
    parts: list[bytes] = []
    for own in page.arrays:
        described.append([[list(array.shape), str(array.dtype)] for array in own])
        parts += [np.asarray(mx.contiguous(array).view(mx.uint8)).tobytes() for array in own]
    return described, parts


def unpacked(described: list[list[list[Any]]], body: memoryview) -> Iterator[Arrays]:
    place = 0
    for own in described:
        arrays = []
        for shape, name in own:
            dtype = DTYPES[name]
            size = int(np.prod(shape)) * dtype.size
            flat = mx.array(np.frombuffer(body[place : place + size], np.uint8))
            arrays.append(flat.view(dtype).reshape(shape))
            place += size
        yield tuple(arrays)
    if place != len(body):
        raise ValueError(f"it has {len(body)} bytes of entries; expected {place}")
