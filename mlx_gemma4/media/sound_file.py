"""Sound files that say of themselves what is not so, made such that libsndfile reads all of them."""

import struct
from io import SEEK_END, BytesIO
from itertools import pairwise
from typing import BinaryIO

UNKNOWN = 0xFFFFFFFF  # the size that a WAV of unknown size is said to have
ENDLESS = (1 << 27).to_bytes(4, "big")  # frames of an MP3: 40 days


def readable_parts(file: BinaryIO) -> list[BinaryIO]:
    """A file so that libsndfile reads all of it: streams of Ogg and MP3s that stand one behind the other apart."""
    starts = streams_of_ogg(file) or mp3s(file)
    if len(starts) < 2:
        return [with_count(with_length(file))]
    file.seek(0)
    data = file.read()
    return [with_count(BytesIO(data[start:end])) for start, end in pairwise([*starts, len(data)])]


def streams_of_ogg(file: BinaryIO) -> list[int]:
    """Where chained streams begin, as in recordings of radio (RFC 3533, 4 and 6)."""
    starts: list[int] = []
    place, opening = 0, False
    while True:
        file.seek(place)
        head = file.read(27 + 255)
        if len(head) < 27 or not head.startswith(b"OggS"):
            return starts
        if head[5] & 2 and not opening:
            starts.append(place)
        opening = bool(head[5] & 2)
        place += 27 + head[26] + sum(head[27 : 27 + head[26]])


def mp3s(file: BinaryIO) -> list[int]:
    """Where MP3s begin, each but the last of which says how many bytes it has."""
    starts: list[int] = []
    place = 0
    while found := first_frame(file, place):
        starts.append(place)
        start, frame = found
        tag = frame[4 + aside(frame) :]
        size = int.from_bytes(tag[12:16], "big")
        if tag[:4] not in (b"Xing", b"Info") or tag[7] & 3 != 3 or size < len(frame):
            break
        place = start + size
        file.seek(place)
        place += 128 if file.read(3) == b"TAG" else 0
    return starts


def first_frame(file: BinaryIO, place: int) -> tuple[int, bytes] | None:
    """Where the frame of an MP3 that begins at `place` stands, behind its ID3, and its first 64 bytes; or None."""
    file.seek(place)
    head = file.read(10)
    if head[:3] == b"ID3" and len(head) == 10:
        place += 10 + sum((byte & 127) << 7 * i for i, byte in enumerate(reversed(head[6:])))
    file.seek(place)
    frame = file.read(64)
    is_layer_3 = len(frame) == 64 and frame[0] == 0xFF and frame[1] & 0xE6 == 0xE2
    if not is_layer_3 or frame[1] & 0x18 == 8 or frame[2] & 12 == 12 or frame[2] >> 4 in (0, 15):
        return None
    return place, frame


def aside(frame: bytes) -> int:
    """Bytes between an MP3 frame's header and where its count of frames would be: checksum and side information."""
    mono, mpeg1, checked = frame[3] >> 6 == 3, frame[1] & 8 == 8, frame[1] & 1 == 0
    return {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[mpeg1, mono] + 2 * checked


def with_count(file: BinaryIO) -> BinaryIO:
    """An MP3 that does not count its frames with a count that no sound reaches: libsndfile guesses one by the size of
    the first frame, and of a bit rate that varies it may read a fifth."""
    found = first_frame(file, 0)
    if found is None or found[1][4 + aside(found[1]) :][:4] in (b"Xing", b"Info"):
        file.seek(0)
        return file
    start, frame = found
    version = frame[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate = (44100, 48000, 32000)[frame[2] >> 2 & 3] // (1 if version == 3 else 2 if version == 2 else 4)
    size = 144 * 128_000 // rate if version == 3 else 72 * 80_000 // rate  # bytes, by the ninth bit rate
    head = bytes([0xFF, frame[1] | 1, 0x90 | frame[2] & 12, frame[3]])  # no checksum, no padding
    silent = (head + bytes(aside(head)) + b"Xing\0\0\0\1" + ENDLESS).ljust(size, b"\0")
    file.seek(0)
    return BytesIO(file.read(start) + silent + file.read())


def with_length(file: BinaryIO) -> BinaryIO:
    """A WAV that was written to a pipe, its data said to be 0 bytes or more than there are, with their true size."""
    end = file.seek(0, SEEK_END)
    file.seek(0)
    head = file.read(12)
    order = {b"RIFF": "<", b"RF64": "<", b"RIFX": ">"}.get(head[:4])
    place, long_size = 12, 0
    while order and head[8:] == b"WAVE" and place + 8 <= end:
        file.seek(place)
        kind, size = struct.unpack(f"{order}4sI", file.read(8))
        place += 8
        if kind == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if kind == b"data":
            rest = end - place
            size = long_size if head[:4] == b"RF64" and size == UNKNOWN else size
            if (size > rest and head[:4] == b"RF64") or (size == 0 and not is_chunks(file, place, end, order)):
                file.seek(0)
                whole = BytesIO(file.read())
                for at, length in ((4, end - 8), (place - 4, rest)):
                    whole.seek(at)
                    whole.write(struct.pack(f"{order}I", min(length, UNKNOWN - 1)))
                if head[:4] == b"RF64":
                    whole.seek(0)
                    whole.write(b"RIFF")  # its 64-bit sizes are as empty
                file = whole
            break
        place += size + size % 2
    file.seek(0)
    return file


def is_chunks(file: BinaryIO, place: int, end: int, order: str) -> bool:
    """Whether what follows is a row of chunks up to the end, or nothing."""
    while place < end:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or not head[:4].isascii() or not head[:4].strip().isalnum():
            return False
        place += 8 + struct.unpack(f"{order}I", head[4:])[0]
        place += place % 2 if place < end else 0
    return True
