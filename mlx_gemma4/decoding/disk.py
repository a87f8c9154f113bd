"""Pages of what has been read, as files in a folder that processes may share.

A file is named after all the tokens before its page, so that prompts that begin alike share files, and holds the tokens
of the page itself: it says by itself what it is good for. Nothing else is kept of the folder: files may be deleted at
any time. What is damaged, foreign or of another version is as good as not there, and said in one logged line.
"""

import base64
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.entry import if_stopped
from mlx_gemma4.errors import one_line
from mlx_gemma4.model.cache import Arrays
from mlx_gemma4.weights.writing import write_private

logger = logging.getLogger("mlx_gemma4")

MAGIC = b"MLXGEMMA4 PAGE 1\n"
SUFFIX, PART = ".page", ".part"
FULL, SLIDING = "full", "sliding"  # kinds of pages
OLD_PART = 3600  # seconds after which somebody's unfinished file is nobody's
PAGE = 128  # positions of a page
PAGE_AGE = 1e-6  # seconds by which a page counts as older than the one before it
FREE = 0.1  # of the disk stays free
SHARE = 0.1  # of the disk, if no bound is given
HEADER = 2**20  # bytes of a header at most
# What reading other bytes raises.
DAMAGES = (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)
DTYPES = {str(dtype): dtype for dtype in (mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8)}


@dataclass(frozen=True, eq=False)
class Page:
    """Arrays of consecutive positions in all layers of a kind."""

    first: int
    last: int
    arrays: list[Arrays]  # each [1, heads, last - first, …]; none where another machine has all layers of the kind

    @cached_property
    def nbytes(self) -> int:
        return sum(array.nbytes for own in self.arrays for array in own)

    def upto(self, last: int) -> "Page":
        """Its positions before `last`: itself if it has no others, or a copy."""
        if self.last <= last:
            return self
        count = last - self.first
        arrays = [tuple(mx.contiguous(array[:, :, :count]) for array in own) for own in self.arrays]
        return Page(self.first, last, arrays)


@dataclass(frozen=True)
class Place:
    """Files for one page's positions: first … last, and those that the sliding layers' file has."""

    first: int
    last: int
    before: bytes  # the name of all tokens before it
    full: Path
    sliding: Path
    sliding_span: tuple[int, int]  # empty if there is no such file


class Disk:
    """A folder of pages; ValueError if it cannot be one."""

    def __init__(self, folder: Path, most: int | None):
        self.folder = folder
        try:
            self.make()
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
            if now - age_and_size(file)[0] > OLD_PART:
                discard(file)

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def files(self, suffix: str = SUFFIX) -> list[Path]:
        try:
            return [Path(entry) for entry in os.scandir(self.folder) if entry.name.endswith(suffix)]
        except OSError:  # deleted meanwhile
            return []

    # --- reading -------------------------------------------------------------------------------

    def chain(self, space: bytes, units: np.ndarray, unfit: Collection[Path] = ()) -> list[Place]:
        """The files of the beginning of these units, page by page, by what their names and headers say; without those
        that were found unfit."""
        by_name: dict[str, list[Path]] = {}
        for file in self.files():
            if file not in unfit:
                by_name.setdefault(file.name.rpartition("-")[0], []).append(file)
        found: list[Place] = []
        before = space
        for first in range(0, len(units), PAGE):
            own = units[first : first + PAGE]
            full = self.longest(by_name.get(f"{FULL}-{before.hex()}", []), own, first)
            if full is None or full[1] != first:
                break
            file, _, last = full
            sliding = self.longest(by_name.get(f"{SLIDING}-{before.hex()}", []), own[: last - first], first)
            file_, *span = sliding or (self.folder, first, first)
            found.append(Place(first, last, before, file, file_, (span[0], span[1])))
            if last < first + PAGE:
                break
            before = chained(before, own)
        return found

    def longest(self, files: list[Path], own: np.ndarray, first: int) -> tuple[Path, int, int] | None:
        """Of the files after the same tokens the one that has most of `own`, and from where to where."""
        exact = [file for file in files if file.name.endswith(f"-{named(own)}{SUFFIX}")]
        best: tuple[Path, int, int] | None = None
        for file in exact or files:
            try:
                start, units = described_units(head(file))
            except OSError:  # deleted meanwhile, or closed to us
                continue
            except DAMAGES as error:
                leave_out(file, error)
                continue
            last = first + common(own, units)
            if first <= start < last and (best is None or last - start > best[2] - best[1]):
                best = file, start, last
        return best

    def read(self, file: Path, kind: str, place: Place, units: np.ndarray, now: float) -> Page | None:
        """The page in a file as far as `place` has it; None if it is not what its name says, or gone.
        now: when the line is used."""
        try:
            data = file.read_bytes()
        except OSError:
            return None
        try:
            header, body = parsed(data)
            start, own = described_units(header)
            arrays = list(unpacked(header["arrays"], body))
            if (header["kind"], header["before"]) != (kind, place.before.hex()):
                raise ValueError("it is of another place")
            page = Page(start, place.first + len(own), arrays)
            if any(array.shape[2] != page.last - start for entries in arrays for array in entries):
                raise ValueError("it has not the positions that it names")
        except DAMAGES as error:
            leave_out(file, error)
            return None
        last = min(place.last, place.first + common(own, units[place.first :]))
        if not place.first <= start < last or (kind == FULL and (start, last) != (place.first, place.last)):
            return None
        touch(file, used_at(place.first, now))
        return page.upto(last)

    # --- writing -------------------------------------------------------------------------------

    def write(self, kind: str, before: bytes, own: np.ndarray, page: Page, now: float) -> bool:
        """Keep a page; own: the units of its whole place, of which the page has the entries of the last ones or all.
        now: when its line was used. False if there is no room, or no writing."""
        file = self.folder / f"{kind}-{before.hex()}-{named(own)}{SUFFIX}"
        used = used_at(page.first, now)
        if os.path.exists(file):
            touch(file, used)
            return True
        units = base64.b64encode(own.tobytes()).decode()
        data = assembled({"kind": kind, "before": before.hex(), "units": units, "first": page.first}, page)
        part = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PART}")  # a process's own
        try:
            self.make()  # deleted meanwhile
            if not self.make_room(len(data)):
                logger.warning(
                    "the store's folder %s has no room for more: %d bytes may lie there, and a tenth of the disk stays "
                    "free", self.folder, self.most,
                )  # fmt: skip
                return False
            with if_stopped(lambda: discard(part)):
                write_private(part, data)
                part.replace(file)
        except OSError as error:
            logger.warning("the store's folder %s cannot be written to: %s", self.folder, one_line(error))
            discard(part)
            return False
        touch(file, used)
        return True

    def make_room(self, nbytes: int) -> bool:
        """Delete what was used least lately until so many bytes fit; False if they cannot. OSError without a folder."""
        usage = shutil.disk_usage(self.folder)
        # deleted meanwhile: as good as of no size
        sizes = [(*age_and_size(file), file) for suffix in (SUFFIX, PART) for file in self.files(suffix)]
        held = sum(size for _, size, _ in sizes)
        excess = max(held + nbytes - self.most, int(usage.total * FREE) + nbytes - usage.free)
        files = sorted((entry for entry in sizes if entry[2].suffix == SUFFIX), key=lambda entry: entry[0])
        if excess > sum(size for _, size, _ in files):
            return False
        for _, size, file in files:
            if excess <= 0:
                break
            discard(file)
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


def age_and_size(file: Path) -> tuple[float, int]:
    try:
        found = file.stat()
    except OSError:
        return 0.0, 0
    return found.st_mtime, found.st_size


def used_at(first: int, now: float) -> float:
    """When a page counts as used, of a line that is: of one line the first page is deleted after those behind it."""
    return now - first // PAGE * PAGE_AGE


def touch(file: Path, used: float) -> None:
    """What was used last is the last to be deleted."""
    with suppress(OSError):  # deleted meanwhile, or read-only
        os.utime(file, (used, used))


def discard(file: Path) -> None:
    with suppress(OSError):  # deleted meanwhile, or read-only
        file.unlink(missing_ok=True)


def leave_out(file: Path, error: Exception) -> None:
    logger.warning("%s is damaged or of another version and is left out: %s", file.name, one_line(error))
    discard(file)


# --- the bytes of a file -----------------------------------------------------------------------


def assembled(header: dict[str, Any], page: Page) -> bytes:
    described = [[[list(array.shape), str(array.dtype)] for array in own] for own in page.arrays]
    parts = [np.asarray(mx.contiguous(array).view(mx.uint8)).tobytes() for own in page.arrays for array in own]
    text = json.dumps(header | {"arrays": described}).encode()
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
    return header_of(bytes(rest[4 : 4 + size])), rest[4 + size :]


def head(file: Path) -> dict[str, Any]:
    """A file's header, unchecked."""
    with open(file, "rb") as opened:
        start = opened.read(len(MAGIC) + 8)
        size = int.from_bytes(start[-4:], "little")
        if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 8 or size > HEADER:
            raise ValueError("no page of this version")
        return header_of(opened.read(size))


def header_of(text: bytes) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def described_units(header: dict[str, Any]) -> tuple[int, np.ndarray]:
    """The first position that a file has entries of, and the units of its whole place."""
    units = np.frombuffer(base64.b64decode(header["units"], validate=True), np.uint64).reshape(-1, 3)
    if type(header["first"]) is not int or header["first"] < 0:
        raise ValueError("its first position is none")
    return header["first"], units


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
