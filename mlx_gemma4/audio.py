"""Sound → frames: one soft token for each 40 ms of mono sound."""

from io import BytesIO
from numbers import Real
from pathlib import Path

import numpy as np
import soundfile
import soxr

from mlx_gemma4.errors import MediaError, shown
from mlx_gemma4.source import describe, needs_extra, read_source, unreadable

AudioSource = str | Path | bytes | tuple[np.ndarray, int]

TRAINED_SECONDS = 30  # the longest clip that Gemma 4's model card speaks of
SLOWEST, FASTEST = 1000, 1_000_000  # Hz, of what is taken
BLOCK = 1 << 18  # samples decoded at a time
MOST_CHANNELS_FIRST = 8  # up to so many short rows are taken for channels (7.1 sound has 8)


def read_audio(source: AudioSource, rate: int) -> np.ndarray:
    """Mono sound [samples] float32 at `rate` Hz, full scale -1 to 1, neither rescaled nor cut.

    `source`: a path, a URL, a file's bytes or (samples, sampling rate) with samples [n], [n, channels] or, for up to
    8 channels, [channels, n]; integers are taken by the full scale of their type. What libsndfile does not read
    (m4a, mp4, webm) goes through PyAV. Channels are averaged. MediaError if it cannot be read, is empty or not
    finite.
    """
    if isinstance(source, tuple):
        name = "audio"
        channels, own_rate = check_samples(source)
    else:
        name, data = describe(source, "audio"), read_source(source, "audio")
        channels, own_rate = decode(data, name)
    if not SLOWEST <= own_rate <= FASTEST:  # also NaN
        raise MediaError(f"the sampling rate of {name} is {own_rate:g} Hz; expected from {SLOWEST} to {FASTEST}")
    mono = channels.mean(axis=1, dtype=np.float32)  # [n, channels] -> [n]
    if not np.isfinite(mono).all():
        raise MediaError(f"{name} has samples that are NaN or infinite")
    if own_rate != rate:
        mono = soxr.resample(mono, own_rate, rate, quality="HQ")
    if not len(mono):
        raise MediaError(f"{name} has no samples at {rate} Hz")
    return mono


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
    if not SLOWEST <= rate <= FASTEST:  # before it becomes a float, which an integer may be too large for; also NaN
        text = f"{rate:g}" if abs(rate) < 1e300 else shown(rate)
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
        return samples.astype(np.float32)
    if samples.dtype == np.uint8:  # as 8-bit WAV: silence is 128
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int8, np.int16, np.int32):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    raise MediaError(f"audio has the dtype {samples.dtype}; expected float, int8, int16, int32 or uint8")


def decode(data: bytes, name: str) -> tuple[np.ndarray, float]:
    """A file's bytes → ([n, channels] float32, Hz)."""
    blocks = []
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            # by blocks, since a FLAC written to a pipe does not know its length
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block)  # [m, channels]
            rate = file.samplerate
    except soundfile.LibsndfileError as error:
        return decode_with_pyav(data, name, error)
    if not blocks:
        raise MediaError(f"{name} has no samples")
    return np.concatenate(blocks), rate


def decode_with_pyav(data: bytes, name: str, refused: soundfile.LibsndfileError) -> tuple[np.ndarray, float]:
    """The first sound track of what libsndfile refused; as `decode`."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        format = f"{name} ({refused.error_string.rstrip('.')}; libsndfile reads WAV, FLAC, OGG and MP3)"
        raise needs_extra(format, "PyAV", "afconvert -f WAVE -d LEI16@16000 clip.m4a clip.wav") from None
    options = {"protocol_whitelist": "none"}  # a playlist must not make FFmpeg open other files or URLs
    to_float = av.AudioResampler(format="fltp")
    blocks, rate = [], 0
    try:
        with av.open(BytesIO(data), "r", options=options, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise MediaError(f"{name} has no sound track")
            for frame in container.decode(audio=0):
                rate = frame.sample_rate
                blocks += [block.to_ndarray() for block in to_float.resample(frame)]  # [channels, m]
    except MediaError:
        raise
    except FFmpegError as error:
        known = "WAV, FLAC, OGG, MP3, or what FFmpeg reads"
        raise MediaError(f"{name} cannot be read: {error.strerror}; expected {known}") from None
    except ValueError as error:  # the track changes its format midway
        raise unreadable(name, error) from None
    if not blocks:
        raise MediaError(f"{name} has no samples")
    return np.concatenate(blocks, axis=1).T, rate
