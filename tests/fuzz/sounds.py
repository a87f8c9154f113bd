"""Sounds in every format and of any number of channels, damaged or odd: finite samples, or one line."""

import io
import struct
from functools import cache
from typing import Any

import av
import numpy as np
import soundfile
from hypothesis import strategies as st

from .judge import check as must
from .judge import check_refusal
from .mutate import damaged, weighted
from .surface import SAMPLES, MediaError, demo_processor

SHARE = 50
LAYOUTS = ("mono", "stereo", "2.1", "quad", "5.0", "5.1", "7.1")

prepare = demo_processor


@cache
def seeds() -> list[bytes]:
    wave = np.sin(np.arange(3200) / 8).astype(np.float32) / 2
    files = [(SAMPLES / "digit.mp3").read_bytes(), (SAMPLES / "beeps.wav").read_bytes()[:5000]]

    def add(form: str, subtype: str, channels: int = 1, rate: int = 8000) -> None:
        out = io.BytesIO()
        soundfile.write(out, np.repeat(wave[:, None], channels, 1), rate, subtype, format=form)
        files.append(out.getvalue())

    for subtype in (
        "PCM_U8",
        "PCM_16",
        "PCM_24",
        "PCM_32",
        "FLOAT",
        "DOUBLE",
        "ULAW",
        "ALAW",
        "IMA_ADPCM",
        "MS_ADPCM",
        "GSM610",
    ):
        add("WAV", subtype)
    for form, subtype in (
        ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"), ("AU", "PCM_16"),
        ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("WAVEX", "PCM_16"),
        ("NIST", "PCM_16"), ("VOC", "PCM_16"),
        ("SVX", "PCM_16"), ("MAT5", "PCM_16"), ("PAF", "PCM_16"), ("IRCAM", "PCM_16"), ("HTK", "PCM_16"),
        ("AVR", "PCM_16"),
    ):  # fmt: skip
        if soundfile.check_format(form, subtype):
            add(form, subtype)
    for channels in (2, 3, 6, 8):
        add("FLAC", "PCM_16", channels)
        add("WAV", "PCM_16", channels)
    add("WAV", "PCM_16", 16)
    add("OGG", "VORBIS", 8)
    add("WAV", "PCM_16", 1, 16000)
    add("FLAC", "PCM_16", 1, 96000)
    streamed = bytearray(files[3])  # as a pipe is written: sizes that nobody came back to fill in
    streamed[4:8] = streamed[40:44] = bytes(4)
    files.append(bytes(streamed))
    streamed[4:8] = streamed[40:44] = b"\xff" * 4
    files.append(bytes(streamed))
    for form, codec, rate in (
        ("mp4", "aac", 44100), ("adts", "aac", 44100), ("webm", "libopus", 48000), ("matroska", "flac", 44100),
        ("mp4", "alac", 44100),
        ("matroska", "pcm_s16le", 8000), ("matroska", "ac3", 48000), ("mp4", "mp3", 44100), ("mpegts", "mp2", 48000),
        ("avi", "pcm_u8", 8000),
    ):  # fmt: skip
        for layout in (*LAYOUTS, "hexadecagonal") if form != "avi" else ("mono",):
            if codec in ("mp3", "mp2") and layout not in ("mono", "stereo"):
                continue
            try:
                files.append(encoded(form, codec, rate, layout))
            except (av.FFmpegError, ValueError):  # this FFmpeg has not got it
                continue
    return files


def encoded(form: str, codec: str, rate: int, layout: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", form) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        wanted = stream.codec_context.format.name if stream.codec_context.format else stream.codec.audio_formats[0].name
        count = len(av.AudioLayout(layout).channels)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048 * count), np.int16), "s16", layout)
        frame.sample_rate = rate
        for part in av.AudioResampler(wanted, layout, rate, stream.codec_context.frame_size or None).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return out.getvalue()


def loud(values: list[float], rate: int, channels: int) -> bytes:
    """A WAV of floats as they are: huge, not finite, too small to be normal."""
    data = struct.pack(f"<{len(values)}f", *values) * channels * 20
    form = struct.pack("<HHIIHH", 3, channels, rate, rate * channels * 4 % 2**32, channels * 4, 32)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def strategy() -> st.SearchStrategy[Any]:
    numbers = st.one_of(st.floats(width=32), st.sampled_from([3e38, -3e38, 1e-45, 0.0, 1.0]))
    rates = st.sampled_from([1, 7, 999, 1000, 8000, 16000, 44100, 1_000_000, 2**31 - 1, 2**32 - 1])
    floats = st.builds(loud, st.lists(numbers, min_size=1, max_size=8), rates, st.sampled_from([1, 2, 8, 16, 255]))
    data = weighted((12, damaged(seeds())), (1, floats))
    return st.fixed_dictionaries({"data": data})


def check(value: Any) -> str | None:
    processor = demo_processor()
    message = {"role": "user", "content": [{"type": "audio", "audio": value["data"]}]}
    try:
        prompt = processor([message])
    except Exception as error:  # any: it is judged
        if "the context holds" in str(error):
            return "refused"
        check_refusal(error, (MediaError,))
        return "refused"
    (run,) = prompt.media
    must(len(run) >= 1 and run.values.shape == (len(run), 640), "frames of another form", run.values.shape)
    must(bool(np.isfinite(run.values).all()), "samples that are not finite")
    return None
