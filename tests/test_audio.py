"""Sound → mono samples → frames."""

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma4.audio import audio_frames, length_note, read_audio
from mlx_gemma4.errors import MediaError

SAMPLING_RATE = 16000  # Hz


def sine(rate: int, frequency: float = 440, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def pitch(samples: np.ndarray, rate: int = SAMPLING_RATE) -> float:
    """The strongest frequency in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 16))
    return float(spectrum.argmax() * rate / (1 << 16))


def loudness(samples: np.ndarray) -> float:
    """The root mean square without the ends, which codecs blur; of the sine it is 0.5 / sqrt(2)."""
    return float(np.sqrt(np.square(samples[1600:-1600]).mean()))


def saved(samples: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    file = BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def encoded(samples: np.ndarray, rate: int, format: str, codec: str) -> bytes:
    """A file by PyAV of what libsndfile does not write; samples [n]."""
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler("fltp", "mono", rate, frame_size=1024)
        for block in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(block))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_U8"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", "VORBIS"),
     ("MP3", None)],
)  # fmt: skip
def test_a_sine_keeps_its_pitch_length_and_loudness(format: str, subtype: str | None, rate: int) -> None:
    samples = read_audio(saved(sine(rate), rate, format, subtype), SAMPLING_RATE)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert len(samples) == SAMPLING_RATE // 2
    assert abs(pitch(samples) - 440) < 1
    assert abs(loudness(samples) - 0.354) < 0.01


def test_samples_at_the_right_rate_are_left_as_they_are() -> None:
    samples = 3 * np.random.default_rng(0).standard_normal(1000).astype(np.float32)  # beyond full scale, too
    assert np.array_equal(read_audio((samples, 16000), 16000), samples)
    assert np.array_equal(read_audio(saved(samples, 16000, "WAV", "FLOAT"), 16000), samples)
    assert np.array_equal(read_audio((samples, 24000), 24000), samples)


def test_all_ways_to_give_a_file_agree(tmp_path: Path) -> None:
    data = saved(sine(16000), 16000, "WAV")
    (tmp_path / "a.wav").write_bytes(data)
    for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), (tmp_path / "a.wav").as_uri()):
        assert np.array_equal(read_audio(source, 16000), read_audio(data, 16000))


def test_channels_are_averaged_in_either_order() -> None:
    left, right = sine(16000), sine(16000, 700)
    mono = (left + right) / 2
    both = np.stack([left, right], 1)  # [n, channels]
    for source in ((both, 16000), (both.T, 16000), saved(both, 16000, "WAV", "FLOAT")):
        assert np.allclose(read_audio(source, 16000), mono, atol=1e-7)
    assert len(read_audio((np.zeros((2, 2), np.float32), 16000), 16000)) == 2  # as soundfile gives it: [n, channels]
    assert len(read_audio((np.zeros((9, 20), np.float32), 16000), 16000)) == 9


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("uint8", [0, 128, 192]), ("int8", [-128, 0, 64]), ("int16", [-(2**15), 0, 2**14]),
     ("int32", [-(2**31), 0, 2**30]), ("float16", [-1, 0, 0.5]), ("float64", [-1, 0, 0.5])],
)  # fmt: skip
def test_number_types_are_taken_by_their_full_scale(dtype: str, values: list[float]) -> None:
    samples = read_audio((np.array(values, dtype), 16000), 16000)
    assert samples.tolist() == [-1, 0, 0.5] and samples.dtype == np.float32


@pytest.mark.parametrize(
    ("format", "codec", "rate"),
    [("ipod", "aac", 44100), ("adts", "aac", 48000), ("mov", "pcm_s16le", 8000), ("matroska", "pcm_s16le", 44100)],
)
def test_what_libsndfile_does_not_read_goes_through_pyav(format: str, codec: str, rate: int) -> None:
    if codec == "pcm_s16le":
        av = pytest.importorskip("av")
        file = BytesIO()
        with av.open(file, "w", format=format) as container:
            stream = container.add_stream(codec, rate=rate, layout="stereo")
            both = np.repeat((sine(rate) * 2**15).astype(np.int16), 2)[None]  # interleaved
            frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
            frame.sample_rate = rate
            container.mux([*stream.encode(frame), *stream.encode()])
        data = file.getvalue()
    else:
        data = encoded(sine(rate), rate, format, codec)
    samples = read_audio(data, SAMPLING_RATE)
    assert samples.dtype == np.float32 and abs(len(samples) - SAMPLING_RATE // 2) < 0.1 * SAMPLING_RATE
    assert abs(pitch(samples) - 440) < 2
    assert abs(loudness(samples) - 0.354) < 0.01


def test_a_length_that_the_header_does_not_know_does_no_harm() -> None:
    data = bytearray(saved(sine(16000), 16000, "FLAC"))
    data[21] &= 0xF0  # STREAMINFO's 36 bits of total samples, 0 for unknown: so writes who writes to a pipe
    data[22:26] = bytes(4)
    assert np.array_equal(read_audio(bytes(data), 16000), read_audio(saved(sine(16000), 16000, "FLAC"), 16000))


def test_without_pyav_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42" + bytes(76)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(MediaError) as caught:
        read_audio(data, 16000)
    assert str(caught.value) == (
        "audio of 100 bytes (Format not recognised; libsndfile reads WAV, FLAC, OGG and MP3) needs PyAV: "
        'pip install "mlx_gemma4[video]"; or convert it: afconvert -f WAVE -d LEI16@16000 clip.m4a clip.wav'
    )


def test_a_clip_beyond_30_seconds_is_kept_whole_with_a_note() -> None:
    source = np.zeros(42 * 8000, np.float32), 8000
    samples = read_audio(source, 16000)
    assert len(samples) == 42 * 16000
    trained = "the model was trained on clips of at most 30 s, nothing is cut"
    assert length_note(source, samples, 16000) == f"audio is 42.0 s long; {trained}"
    assert length_note("x.wav", samples, 16000) == f"audio 'x.wav' is 42.0 s long; {trained}"
    assert length_note(source, samples[: 30 * 16000], 16000) == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros(0), 16000), r"^audio of shape \(0,\) has no samples$"),
        ((np.zeros((5, 0)), 16000), r"^audio of shape \(5, 0\) has no samples$"),
        ((np.zeros(()), 16000), r"^audio has the shape \(\); expected \[n\], \[n, channels\] or \[channels, n\]$"),
        ((np.zeros((2, 3, 4)), 16000), r"^audio has the shape \(2, 3, 4\); expected"),
        ((np.zeros(5), 0), r"^the sampling rate of audio is 0 Hz; expected from 1000 to 1000000$"),
        ((np.zeros(5), 1e15), r"^the sampling rate of audio is 1e\+15 Hz; expected from 1000 to 1000000$"),
        ((np.zeros(5), float("nan")), r"^the sampling rate of audio is nan Hz; expected from 1000 to 1000000$"),
        ((np.zeros(5), True), r"^audio is a tuple of \(ndarray, bool\); expected \(numpy array, sampling rate\)$"),
        ((np.zeros(5), -8000), r"is -8000 Hz; expected"),
        ((np.zeros(5), "16000"), r"^audio is a tuple of \(ndarray, str\); expected \(numpy array, sampling rate\)$"),
        (([0.0], 16000), r"^audio is a tuple of \(list, int\); expected"),
        ((np.zeros(5),), r"^audio is a tuple of \(ndarray\); expected"),
        ((np.zeros(5, np.complex64), 16000), r"^audio has the dtype complex64; expected float, int8, int16, int32"),
        ((np.zeros(5, np.int64), 16000), r"^audio has the dtype int64; expected"),
        ((np.array([0, np.nan]), 16000), r"^audio has samples that are NaN or infinite$"),
        ((np.array([0, np.inf]), 8000), r"^audio has samples that are NaN or infinite$"),
        (b"", r"^audio of 0 bytes is empty \(0 bytes\)$"),
        (saved(np.zeros(0), 16000, "WAV"), r"^audio of 44 bytes has no samples$"),
        ("no.wav", r"^audio 'no\.wav' does not exist$"),
    ],
)  # fmt: skip
def test_what_is_no_sound_is_an_error(source: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        read_audio(source, 16000)  # type: ignore[arg-type]


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("av")
    for data in (b"not a sound at all", saved(sine(16000), 16000, "WAV")[:30], saved(sine(16000), 16000, "FLAC")[:40]):
        (tmp_path / "x.wav").write_bytes(data)
        with pytest.raises(MediaError, match=r"^audio '.*x\.wav' cannot be read: \S.*$"):
            read_audio(tmp_path / "x.wav", 16000)


def test_a_file_without_sound_is_an_error() -> None:
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame(64, 48, "yuv420p")), *stream.encode()])
    with pytest.raises(MediaError, match=r"has no sound track$"):
        read_audio(file.getvalue(), 16000)


@given(st.integers(0, 5000), st.sampled_from([1, 7, 640]))
def test_frames_are_all_samples_and_then_zeros(length: int, samples_per_token: int) -> None:
    samples = np.arange(1, length + 1, dtype=np.float32)
    frames = audio_frames(samples, samples_per_token)
    assert frames.shape == (-(-length // samples_per_token), samples_per_token) and frames.dtype == np.float32
    assert np.array_equal(frames.ravel()[:length], samples) and not frames.ravel()[length:].any()
