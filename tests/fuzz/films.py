"""Films in every container, of steady and unsteady rates, damaged: frames whose times never go back, or one line."""

import io
import re
from fractions import Fraction
from functools import cache
from typing import Any

import av
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from .judge import check as must
from .judge import check_refusal
from .mutate import damaged
from .surface import SAMPLES, MediaError, demo_processor

SHARE = 40
TIME = re.compile(r"(\d+):(\d\d)")
FORMS = (
    ("mp4", "mpeg4"), ("mp4", "libx264"), ("mp4", "libx265"), ("mov", "mjpeg"), ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("matroska", "mpeg4"), ("matroska", "ffv1"), ("avi", "mpeg4"), ("avi", "mjpeg"), ("mpegts", "mpeg2video"),
    ("flv", "flv"),
    ("ogg", "libtheora"), ("gif", "gif"), ("apng", "apng"), ("3gp", "h263"), ("mpeg", "mpeg1video"),
    ("yuv4mpegpipe", "rawvideo"), ("h264", "libx264"), ("ivf", "libvpx"),
)  # fmt: skip

prepare = demo_processor


@cache
def seeds() -> list[bytes]:
    files = [(SAMPLES / "film.mp4").read_bytes()]
    for form, codec in FORMS:
        for times in ([n / 5 for n in range(8)], [0, 1, 2, 2.1, 2.2, 7]):
            try:
                files.append(encoded(form, codec, times))
            except (av.FFmpegError, ValueError):  # this FFmpeg has not got it
                continue
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
    for form in ("WEBP", "GIF", "PNG"):
        out = io.BytesIO()
        pictures[0].save(out, form, save_all=True, append_images=pictures[1:], duration=[500, 1500, 10])
        files.append(out.getvalue())
    return files


def encoded(form: str, codec: str, times: list[float]) -> bytes:
    out = io.BytesIO()
    side = (176, 144) if codec == "h263" else (64, 48)
    with av.open(out, "w", form) as container:
        stream: Any = container.add_stream(
            codec, rate=25, options={"x265-params": "log-level=none"} if codec == "libx265" else {}
        )
        stream.width, stream.height = side
        formats = stream.codec.video_formats
        stream.pix_fmt = "yuv420p" if not formats or "yuv420p" in [f.name for f in formats] else formats[0].name
        stream.codec_context.time_base = Fraction(1, 100)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((side[1], side[0], 3), 30 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(time * 100), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def strategy() -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({"data": damaged(seeds())})


def check(value: Any) -> str | None:
    processor = demo_processor()
    message = {"role": "user", "content": [{"type": "video", "video": value["data"]}]}
    try:
        prompt = processor([message])
    except Exception as error:  # any: it is judged
        check_refusal(error, (MediaError,))
        return "refused"
    must(1 <= len(prompt.media) <= processor.settings.num_frames, "too many frames", len(prompt.media))
    must(all(len(run) <= processor.settings.video_budget for run in prompt.media), "patches beyond the budget")
    text = processor.tokenizer.decode(prompt.token_ids, skip_special_tokens=True)
    times = [60 * int(minutes) + int(seconds) for minutes, seconds in TIME.findall(text)]
    must(len(times) == len(prompt.media), "frames without a time", text)
    must(times == sorted(times), "times go back", times)
    must(times[0] == 0, "the first frame is not at 00:00", times)
    return None
