"""Sound → mono samples → frames."""

import contextlib
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma4.errors import MediaError
from mlx_gemma4.media.audio import audio_frames, length_note, read_audio

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


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_that_does_not_count_its_frames_is_read_to_its_end(rate: int, channels: int) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2 * rate, channels))
    loud_first = np.concatenate([noise, np.zeros((6 * rate, channels))])
    for samples in (loud_first, loud_first[::-1]):  # the guess of libsndfile's is too short, and too long
        file = BytesIO()
        soundfile.write(file, samples, rate, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
        data = file.getvalue()
        uncounted = data[data.index(data[:2], 40) :]  # without the first frame, which counts
        assert b"Xing" in data[:200] and b"Xing" not in uncounted
        for head in (b"", b"ID3\3\0\0\0\0\0\x0a" + bytes(10)):
            assert abs(len(read_audio(head + uncounted, rate)) - 8 * rate) < 0.3 * rate


def test_an_mp3_that_says_that_it_has_no_bytes_is_read_to_its_end() -> None:
    data = bytearray(saved(sine(16000), 16000, "MP3"))
    size = data.index(b"Info" if b"Info" in data[:200] else b"Xing") + 12
    for said in (0, 1, 63):
        data[size : size + 4] = said.to_bytes(4, "big")
        assert abs(len(read_audio(bytes(data), 16000)) - 8000) < 1600


@pytest.mark.parametrize(("format", "subtype"), [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_sounds_that_were_put_together_are_read_to_the_end_of_the_last(format: str, subtype: str | None) -> None:
    low, high = (saved(sine(48000, pitch), 48000, format, subtype) for pitch in (440, 880))
    samples = read_audio(low + low + high, SAMPLING_RATE)
    assert abs(len(samples) - 1.5 * SAMPLING_RATE) < 0.2 * SAMPLING_RATE
    assert abs(pitch(samples[:8000]) - 440) < 5 and abs(pitch(samples[-8000:]) - 880) < 5
    tagged = low + b"TAG" + bytes(125)  # ID3v1
    assert len(read_audio(tagged + high if format == "MP3" else low + high, SAMPLING_RATE)) > 0.9 * SAMPLING_RATE
    slow = saved(sine(16000), 16000, format, subtype)
    if subtype != "OPUS":  # which is always of 48000
        with pytest.raises(MediaError, match=r"changes its sampling rate, from 48000 to 16000 Hz$"):
            read_audio(low + slow, SAMPLING_RATE)


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
        ((np.zeros(5), np.float32(1)), r"^the sampling rate of audio is 1 Hz; expected from 1000 to 1000000$"),
        ((np.zeros(5), Fraction(1, 2)), r"^the sampling rate of audio is 0.5 Hz; expected from 1000 to 1000000$"),
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


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 9, 11, 16])
@pytest.mark.parametrize(("format", "codec"), [("matroska", "pcm_s16le"), ("mov", "pcm_s16le"), ("matroska", "flac")])
def test_any_number_of_channels_is_averaged(format: str, codec: str, count: int) -> None:
    av = pytest.importorskip("av")
    if codec == "flac" and count > 8:
        pytest.skip("FLAC has at most 8")
    layout = {1: "mono", 2: "stereo", 3: "2.1", 6: "5.1", 8: "7.1", 16: "hexadecagonal"}.get(count, f"{count} channels")
    channels = np.zeros((16000, count), np.int16)
    channels[:, -1] = sine(16000, seconds=1) * 2**15
    file = BytesIO()
    try:
        with av.open(file, "w", format=format) as container:
            stream = container.add_stream(codec, rate=16000, layout=layout)
            for start in range(0, 16000, 1000):
                block = np.ascontiguousarray(channels[start : start + 1000].reshape(1, -1))
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
                frame.sample_rate, frame.pts = 16000, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.FFmpegError, ValueError):
        pytest.skip(f"FFmpeg writes no {count} channels here")
    samples = read_audio(file.getvalue(), 16000)
    assert len(samples) == 16000 and np.allclose(samples, channels.mean(axis=1) / 2**15, atol=1e-4)


def test_planar_sound_of_eight_channels_is_read() -> None:
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=48000, layout="7.1")
        to_planes = av.AudioResampler("fltp", "7.1", 48000)
        for start in range(0, 48 * 1024, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8 * 1024), np.int16), format="s16", layout="7.1")
            frame.sample_rate, frame.pts = 48000, start
            for block in to_planes.resample(frame):
                container.mux(stream.encode(block))
        container.mux(stream.encode())
    assert abs(len(read_audio(file.getvalue(), 16000)) - 16 * 1024) < 1000


def test_a_damaged_flac_of_eight_channels_is_read_or_an_error() -> None:
    pytest.importorskip("av")
    data = saved(np.random.default_rng(0).standard_normal((20_000, 8)) / 9, 16000, "FLAC")
    for place in range(100, len(data), len(data) // 20):
        try:
            assert read_audio(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :], 16000).ndim == 1
        except MediaError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
@pytest.mark.parametrize("riff", [0, 0xFFFFFFFF, None])
@pytest.mark.parametrize("format", ["WAV", "RF64"])
def test_a_streamed_wav_is_read_to_its_end(format: str, riff: int | None, size: int) -> None:
    data = bytearray(saved(sine(16000), 16000, "WAV", "FLOAT"))
    if format == "RF64":
        data[:4] = b"RF64"
        data[12:12] = b"ds64" + (28).to_bytes(4, "little") + bytes(28)
    if riff is not None:
        data[4:8] = riff.to_bytes(4, "little")
    place = data.index(b"data") + 4
    data[place : place + 4] = size.to_bytes(4, "little")
    assert np.allclose(read_audio(bytes(data), 16000), sine(16000), atol=1e-6)


def test_a_wav_without_samples_before_other_chunks_is_empty() -> None:
    data = bytearray(saved(np.zeros(0), 16000, "WAV"))
    data += b"LIST" + (4).to_bytes(4, "little") + b"INFO"
    with pytest.raises(MediaError, match=r"has no samples$"):
        read_audio(bytes(data), 16000)


def test_samples_are_finite_after_resampling_too() -> None:
    loud = np.where(np.arange(4000) % 7 < 3, 3e38, -3e38).astype(np.float32)
    for source in ((loud, 44100), saved(loud, 44100, "WAV", "FLOAT"), (np.full(9, 1e300), 16000)):
        try:
            assert np.isfinite(read_audio(source, 16000)).all()
        except MediaError as error:
            assert str(error).endswith("has samples that are NaN or infinite")


@pytest.mark.parametrize("rate", [10**400, 2**31 - 1, 2**31, 2**63, -(10**400)])
def test_sampling_rates_beyond_all_bounds_are_an_error_of_one_line(rate: int) -> None:
    with pytest.raises(MediaError, match=r"^the sampling rate of audio is .* Hz; expected from 1000 to 1000000$"):
        read_audio((np.zeros(5), rate), 16000)
    with pytest.raises(ValueError, match=r"^the sampling rate asked for is .* Hz; expected from 1000 to 1000000$"):
        read_audio((np.zeros(5), 16000), rate)


def test_sound_of_hours_ends_in_an_error() -> None:
    with pytest.raises(MediaError, match=r"^audio is longer than 3 hours; no prompt holds that much$"):
        read_audio((np.broadcast_to(np.int8(0), 1000 * 3 * 3600 + 1), 1000), 1000)


def test_libraries_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    for format in ("AIFF", "MP3"):
        data = saved(sine(16000), 16000, format)
        for place in [*range(4, 60), *range(60, len(data), len(data) // 20)]:
            for value in (0x7F, 0xFF):
                with contextlib.suppress(MediaError):
                    read_audio(data[:place] + bytes([value]) * 4 + data[place + 4 :], 16000)
    assert capfd.readouterr() == ("", "")
