"""Sound → frames: one soft token for each 40 ms of mono sound."""

import struct
from io import SEEK_END, SEEK_SET, BytesIO
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from mlx_gemma4.errors import MediaError, shown
from mlx_gemma4.media.source import describe, media_errors, needs_extra, open_source, unheard

AudioSource = str | Path | bytes | tuple[np.ndarray, int]

TRAINED_SECONDS = 30  # the longest clip that Gemma 4's model card speaks of
SLOWEST, FASTEST = 1000, 1_000_000  # Hz, of what is taken
LONGEST_SECONDS = 3 * 3600  # 270,000 soft tokens, where the longest context is 262,144
UNKNOWN = 0xFFFFFFFF  # the size that a WAV of unknown size is said to have
BLOCK = 1 << 18  # samples of all channels decoded at a time
ENDLESS = (1 << 27).to_bytes(4, "big")  # frames of an MP3: 40 days
MOST_CHANNELS_FIRST = 8  # up to so many short rows are taken for channels (7.1 sound has 8)


def read_audio(source: AudioSource, rate: int) -> np.ndarray:
    """Mono sound [samples] float32 at `rate` Hz, full scale -1 to 1, neither rescaled nor cut.

    `source`: a path, a URL, a file's bytes or (samples, sampling rate) with samples [n], [n, channels] or, for up to
    8 channels, [channels, n]; integers are taken by the full scale of their type. What libsndfile does not read
    (m4a, mp4, webm) goes through PyAV. Any number of channels is averaged. MediaError if it cannot be read, is empty,
    not finite or longer than 3 hours.
    """
    if not SLOWEST <= rate <= FASTEST:
        raise ValueError(f"the sampling rate asked for is {shown(rate)} Hz; expected from {SLOWEST} to {FASTEST}")
    if isinstance(source, tuple):
        name = "audio"
        channels, own_rate = check_samples(source)
        mono = Mono(name, own_rate, rate)
        mono.add(channels)
    else:
        name = describe(source, "audio")
        with open_source(source, "audio") as file:
            mono = decode(file, name, rate)
    return mono.samples()


class Mono:
    """Sound of any channels as it is decoded → mono at the wanted rate; all that is kept of hours."""

    def __init__(self, name: str, own_rate: float, rate: int) -> None:
        if not SLOWEST <= own_rate <= FASTEST:  # also NaN
            raise MediaError(f"the sampling rate of {name} is {own_rate:g} Hz; expected from {SLOWEST} to {FASTEST}")
        self.name, self.own_rate, self.rate = name, own_rate, rate
        self.stream = None if own_rate == rate else soxr.ResampleStream(own_rate, rate, 1, "float32", "HQ")
        self.blocks: list[np.ndarray] = []
        self.taken = 0  # samples at own_rate

    def add(self, channels: np.ndarray) -> None:
        """The next samples: [n, channels] float32."""
        self.taken += len(channels)
        if self.taken > LONGEST_SECONDS * self.own_rate:
            hours = LONGEST_SECONDS // 3600
            raise MediaError(f"{self.name} is longer than {hours} hours; no prompt holds that much")
        with np.errstate(over="ignore", invalid="ignore"):
            mono = channels.mean(axis=1, dtype=np.float32)  # [n, channels] -> [n]
        self.keep(mono if self.stream is None else self.stream.resample_chunk(mono))

    def keep(self, mono: np.ndarray) -> None:
        if not np.isfinite(mono).all():
            raise MediaError(f"{self.name} has samples that are NaN or infinite")
        self.blocks.append(mono)

    def samples(self) -> np.ndarray:
        if not self.taken:
            raise MediaError(f"{self.name} has no samples")
        if self.stream is not None:
            self.keep(self.stream.resample_chunk(np.zeros(0, np.float32), last=True))
        samples = np.concatenate(self.blocks)
        if not len(samples):
            raise MediaError(f"{self.name} has no samples at {self.rate} Hz")
        return samples


def length_note(source: AudioSource, samples: np.ndarray, rate: int) -> str:
    """What to say of a sound longer than the model was trained on; empty for others."""
    if (seconds := len(samples) / rate) <= TRAINED_SECONDS:
        return ""
    name = "audio" if isinstance(source, tuple) else describe(source, "audio")
    trained = f"the model was trained on clips of at most {TRAINED_SECONDS} s, nothing is cut"
    return f"{name} is {seconds:.1f} s long; {trained}"


def audio_frames(samples: np.ndarray, samples_per_token: int) -> np.ndarray:
    """Samples [m] → [n, samples_per_token] float32, zeros after the end; n = ceil(m / samples_per_token)."""
    padding = -len(samples) % samples_per_token
    return np.pad(samples.astype(np.float32), (0, padding)).reshape(-1, samples_per_token)


def check_samples(source: tuple[np.ndarray, int]) -> tuple[np.ndarray, float]:
    """A user's (samples, sampling rate) → ([n, channels] float32, Hz)."""
    is_pair = len(source) == 2 and isinstance(source[0], np.ndarray)
    if not is_pair or not isinstance(source[1], Real) or isinstance(source[1], bool):
        kinds = ", ".join(type(item).__name__ for item in source)
        raise MediaError(f"audio is a tuple of ({kinds}); expected (numpy array, sampling rate)")
    samples, rate = source
    if isinstance(rate, np.generic):  # or NumPy compares and shows it in its own type
        rate = rate.item()
    if not SLOWEST <= rate <= FASTEST:  # before it becomes a float, which an integer may be too large for; also NaN
        text = f"{float(rate):g}" if abs(rate) < 1e300 else shown(rate)
        raise MediaError(f"the sampling rate of audio is {text} Hz; expected from {SLOWEST} to {FASTEST}")
    if samples.ndim not in (1, 2):
        raise MediaError(f"audio has the shape {samples.shape}; expected [n], [n, channels] or [channels, n]")
    if not samples.size:
        raise MediaError(f"audio of shape {samples.shape} has no samples")
    if samples.ndim == 1:
        samples = samples[:, None]
    elif samples.shape[0] < samples.shape[1] and samples.shape[0] <= MOST_CHANNELS_FIRST:
        samples = samples.T  # as torchaudio and librosa give it
    return full_scale(samples), float(rate)


def full_scale(samples: np.ndarray) -> np.ndarray:
    """Samples of any shape and type → float32, full scale -1 to 1."""
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):  # infinite is said later
            return samples.astype(np.float32)
    if samples.dtype == np.uint8:  # as 8-bit WAV: silence is 128
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int8, np.int16, np.int32):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    raise MediaError(f"audio has the dtype {samples.dtype}; expected float, int8, int16, int32 or uint8")


def decode(file: BinaryIO, name: str, rate: int) -> Mono:
    with media_errors(name):
        try:
            # libsndfile prints to standard output and its mpg123 to standard error, with no way to ask them not to
            mono = None
            for part in parts(file):
                with unheard(1, 2), soundfile.SoundFile(Steady(part)) as sound:
                    mono = mono or Mono(name, sound.samplerate, rate)
                    if sound.samplerate != mono.own_rate:
                        raise MediaError(
                            f"{name} changes its sampling rate, from {mono.own_rate} to {sound.samplerate} Hz"
                        )
                    # by blocks, since a FLAC written to a pipe does not know its length
                    while len(block := sound.read(max(BLOCK // sound.channels, 1), dtype="float32", always_2d=True)):
                        mono.add(block)  # [m, channels]
            assert mono is not None
            return mono
        except soundfile.LibsndfileError as error:
            file.seek(0)
            return decode_with_pyav(file, name, rate, error)


class Steady:
    """A file for libsndfile: a place that a damaged header leads to and that does not exist is no exception."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return self.file.seek(0)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        return self.file.readinto(buffer)  # type: ignore[attr-defined]


def parts(file: BinaryIO) -> list[BinaryIO]:
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
        if tag[:4] not in (b"Xing", b"Info") or tag[7] & 3 != 3:
            break
        place = start + int.from_bytes(tag[12:16], "big")
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


def decode_with_pyav(file: BinaryIO, name: str, rate: int, refused: soundfile.LibsndfileError) -> Mono:
    """The first sound track of what libsndfile refused."""
    try:
        import av
    except ImportError:
        format = f"{name} ({refused.error_string.rstrip('.')}; libsndfile reads WAV, FLAC, OGG and MP3)"
        raise needs_extra(format, "PyAV", "afconvert -f WAVE -d LEI16@16000 clip.m4a clip.wav") from None
    options = {"protocol_whitelist": "none"}  # a playlist must not make FFmpeg open other files or URLs
    to_float = av.AudioResampler(format="flt")  # packed: of planes PyAV 18.1 reads one too many from 8 channels on
    mono = None
    with media_errors(name):
        try:
            with av.open(file, "r", options=options, metadata_errors="ignore") as container:
                if not container.streams.audio:
                    raise MediaError(f"{name} has no sound track")
                for frame in container.decode(audio=0):
                    mono = mono or Mono(name, frame.sample_rate, rate)
                    for block in to_float.resample(frame):
                        mono.add(block.to_ndarray().reshape(-1, block.layout.nb_channels))  # [1, m * channels]
        except av.FFmpegError as error:
            known = "WAV, FLAC, OGG, MP3, or what FFmpeg reads"
            raise MediaError(f"{name} cannot be read: {error.strerror}; expected {known}") from None
    if mono is None:
        raise MediaError(f"{name} has no samples")
    return mono
