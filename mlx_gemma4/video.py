"""Video → a few RGB frames and their times."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from mlx_gemma4.errors import MediaError
from mlx_gemma4.image import ImageSource, read_image
from mlx_gemma4.source import describe, local_path, needs_extra, read_source, unreadable

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

VideoSource = str | Path | bytes | Sequence[ImageSource]
Smaller = Callable[[Image.Image], Image.Image]

ATTACHED_PICTURE = 1 << 10  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: the cover of a song


@dataclass(frozen=True, eq=False)
class Video:
    """The frames that the model is shown."""

    frames: tuple[Image.Image, ...]  # RGB
    seconds: tuple[float, ...]  # when each of them is seen


def read_video(source: VideoSource, fps: float | None, num_frames: int, smaller: Smaller) -> Video:
    """At most `num_frames` frames, evenly spread over a video; its sound is ignored.

    `source`: a path, a URL, a file's bytes, or a list of images `fps` a second. A file has its own (average) frame
    rate, and takes no `fps`. Frames are upright by the file's rotation. `smaller` is applied to each as it is read: 32
    in full may be gigabytes. MediaError if it cannot be read.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return read_frames(source, fps, num_frames, smaller)
    name = describe(source, "video")
    if fps is not None:
        raise MediaError(f'{name} has its own frame rate, but "fps" is {fps}; expected only beside a list of images')
    path = None if isinstance(source, bytes) else local_path(source, "video")
    if path is None or not path.is_file():  # in a pipe nobody can go back
        return decode(BytesIO(read_source(source, "video")), name, num_frames, smaller)
    try:
        file = path.open("rb")  # not read into memory: it may be larger
    except OSError as error:
        raise unreadable(name, error) from None
    with closing(file):
        return decode(file, name, num_frames, smaller)


def timestamp(seconds: float) -> str:
    """mm:ss, as the model is told the time of a frame; minutes go on beyond 99."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def chosen_frames(total: int, num_frames: int) -> Sequence[int]:
    """Which of `total` frames to show. Source: transformers 5.23.0, default_sample_indices_fn, which refuses fewer."""
    return range(total) if total <= num_frames else [i * total // num_frames for i in range(num_frames)]


def read_frames(images: Sequence[ImageSource], fps: float | None, num_frames: int, smaller: Smaller) -> Video:
    if not images:
        raise MediaError("video is an empty list; expected at least one image")
    if not isinstance(fps, Real) or not 0 < fps < math.inf:
        raise MediaError(f'a video of {len(images)} images has "fps" {fps}; expected their number a second beside it')
    chosen = chosen_frames(len(images), num_frames)
    return Video(tuple(smaller(read_image(images[i])) for i in chosen), tuple(i / fps for i in chosen))


def decode(file: BinaryIO, name: str, num_frames: int, smaller: Smaller) -> Video:
    """Counts packets, then decodes; once more in the rare case that a packet holds a hidden frame or half of one."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise needs_extra(name, "PyAV", None) from None
    frames: list[Image.Image] = []
    chosen: Sequence[int] = ()
    options = {"protocol_whitelist": "none"}  # a playlist must not make FFmpeg open other files or URLs
    try:
        with av.open(file, "r", options=options, metadata_errors="ignore") as container:
            stream = video_stream(container, name)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            total = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
        for _ in range(2):
            chosen, expected = chosen_frames(total, num_frames), total
            file.seek(0)
            with av.open(file, "r", options=options, metadata_errors="ignore") as container:
                frames, total = decode_frames(container, video_stream(container, name), chosen, smaller)
            if total == expected:
                break
    except FFmpegError as error:
        raise MediaError(f"{name} cannot be read: {error.strerror}") from None
    if not frames or not fps:
        raise MediaError(f"{name} has no {'frame rate' if frames else 'frames'}")
    return Video(tuple(frames), tuple(i / fps for i in chosen))


def video_stream(container: "InputContainer", name: str) -> "VideoStream":
    stream = next((s for s in container.streams.video if not s.disposition & ATTACHED_PICTURE), None)
    if stream is None:
        raise MediaError(f"{name} has no video track")
    stream.thread_type = "AUTO"
    return stream


def decode_frames(
    container: "InputContainer", stream: "VideoStream", chosen: Sequence[int], smaller: Smaller
) -> tuple[list[Image.Image], int]:
    """The chosen frames, upright, and how many frames there are."""
    frames, wanted, count = [], frozenset(chosen), 0
    for count, frame in enumerate(container.decode(stream), 1):
        if count - 1 in wanted:
            image = frame.to_image()
            upright = image.rotate(frame.rotation, expand=True) if frame.rotation else image  # both anticlockwise
            frames.append(smaller(upright))
    return frames, count
