"""Sound → frames: one soft token for each 40 ms of mono sound."""

from io import SEEK_SET
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from mlx_gemma4.errors import MediaError, shown
from mlx_gemma4.media.sound_file import readable_parts
from mlx_gemma4.media.source import describe, media_errors, needs_extra, open_source, unheard

AudioSource = str | Path | bytes | tuple[np.ndarray, int]

TRAINED_SECONDS = 30  # the longest clip that Gemma 4's model card speaks of
SLOWEST, FASTEST = 1000, 1_000_000  # Hz, of what is taken
LONGEST_SECONDS = 3 * 3600  # 270,000 soft tokens, where the longest context is 262,144
BLOCK = 1 << 18  # samples of all channels decoded at a time
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
            return decode_with_libsndfile(file, name, rate)
        except soundfile.LibsndfileError as error:
            file.seek(0)
            return decode_with_pyav(file, name, rate, error)


def decode_with_libsndfile(file: BinaryIO, name: str, rate: int) -> Mono:
    mono: Mono | None = None
    for part in readable_parts(file):
        # libsndfile prints to standard output and its mpg123 to standard error, with no way to ask them not to
        with unheard(1, 2), soundfile.SoundFile(Steady(part)) as sound:
            mono = mono or Mono(name, sound.samplerate, rate)
            if sound.samplerate != mono.own_rate:
                raise MediaError(f"{name} changes its sampling rate, from {mono.own_rate} to {sound.samplerate} Hz")
            # by blocks, since a FLAC written to a pipe does not know its length
            while len(block := sound.read(max(BLOCK // sound.channels, 1), dtype="float32", always_2d=True)):
                mono.add(block)  # [m, channels]
    assert mono is not None  # there is one part or more
    return mono


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
