"""Video → a few RGB frames and their times."""

import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from mlx_gemma4.errors import MediaError, shown, unbroken
from mlx_gemma4.media.image import ImageSource, open_image, quietly, read_image, to_rgb, upright_rgb
from mlx_gemma4.media.source import describe, media_errors, needs_extra, open_source

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

VideoSource = str | Path | bytes | Sequence[ImageSource]
Smaller = Callable[[Image.Image], Image.Image]
Time = int | float | Fraction  # in ticks of the file's clock

ATTACHED_PICTURE = 1 << 10  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: the cover of a song
SLOWEST = 1e-9  # images a second of a list: one in 32 years
MOST_STEPS = 1 << 20  # of time: a second of ten days
MOST_PIXELS = 1 << 26  # of a frame: twice 8K
MOST_THREADS = 16  # as FFmpeg itself takes
THREADS_BYTES = 1 << 28  # that the frames which FFmpeg decodes at the same time may take
ANIMATIONS = ("GIF", "WEBP", "PNG")  # read by Pillow: FFmpeg knows no animated WebP, and lays transparency on black
MOST_ANIMATED = 1 << 24  # pixels of an animation's frame, of which Pillow holds a few
HASTY, UNHURRIED = 10, 100  # milliseconds: what says at most the one, browsers show for the other

# Where a display matrix (ISO/IEC 14496-12, 6.2.2) sends the right and the lower neighbour of a pixel: a b, c d.
MATRICES = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # anticlockwise, as Pillow counts
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Video:
    """The frames that the model is shown."""

    frames: tuple[Image.Image, ...]  # RGB
    seconds: tuple[float, ...]  # when each of them is seen, from the first frame's time


@dataclass(frozen=True)
class Clock:
    """When the frames of a file are shown."""

    times: Sequence[Time]  # ascending from 0
    end: Time  # of the last frame
    tick: Fraction  # seconds

    def chosen(self, num_frames: int) -> Sequence[int]:
        """Which frames are seen at even steps of time, as fine as shows at most `num_frames`, each once."""
        total = len(self.times)
        if total <= num_frames or self.is_steady():
            return chosen_frames(total, num_frames)
        edges = np.array([*self.times, max(self.end, self.times[-1] + 1)], np.float64)
        finest = coarsest = num_frames
        if len(frames := seen(edges, num_frames)) == num_frames:
            return frames
        while len(seen(edges, finest)) <= num_frames and finest < MOST_STEPS:
            coarsest, finest = finest, 2 * finest
        while finest - coarsest > 1:  # a still that lasts takes many steps and is one frame
            middle = (coarsest + finest) // 2
            coarsest, finest = (middle, finest) if len(seen(edges, middle)) <= num_frames else (coarsest, middle)
        return seen(edges, coarsest)

    def is_steady(self) -> bool:
        """Whether all frames last equally long, but for the rounding to ticks."""
        last = len(self.times) - 1
        return all(abs(float(time) * last - i * float(self.times[-1])) <= last for i, time in enumerate(self.times))

    def seconds(self, chosen: Sequence[int], rate: Fraction | None) -> tuple[float, ...]:
        """The times of the chosen frames; by the file's rate where that is what their ticks are rounded from."""
        if rate and all(abs(float(self.times[i] * self.tick - i / rate)) <= self.tick for i in chosen):
            return tuple(float(i / rate) for i in chosen)
        return tuple(float(self.times[i] * self.tick) for i in chosen)


def seen(edges: np.ndarray, steps: int) -> list[int]:
    """The frames that are shown at one of so many even steps; `edges`: when each begins, and the end."""
    first = np.ceil(edges * steps / edges[-1])  # the first step at or after each edge
    return [int(i) for i in np.flatnonzero(np.diff(first))]


def read_video(source: VideoSource, fps: float | None, num_frames: int, smaller: Smaller) -> Video:
    """At most `num_frames` frames, at even steps of time through a video; its sound is ignored.

    `source`: a path, a URL, a file's bytes, or a list of images `fps` a second. A file's frames have their own times,
    and it takes no `fps`. Frames are as they are shown: upright, their pixels square. `smaller` is applied to each as
    it is read: 32 in full may be gigabytes. GIF, WebP and PNG are read by Pillow, all else by FFmpeg. MediaError if it
    cannot be read.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return read_frames(source, fps, num_frames, smaller)
    name = describe(source, "video")
    if fps is not None:
        got = f'"fps" is {shown(fps)}'
        raise MediaError(f"{name} has its own frame rate, but {got}; expected only beside a list of images")
    with open_source(source, "video") as file:
        head = file.read(12)
        file.seek(0)
        if head[:6] in (b"GIF87a", b"GIF89a") or head[:4] == b"\x89PNG" or (head[:4], head[8:]) == (b"RIFF", b"WEBP"):
            return read_animation(file, name, num_frames, smaller)
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
    if not isinstance(fps, Real) or isinstance(fps, bool) or not SLOWEST <= fps < math.inf:
        got = unbroken(fps)[:40] if isinstance(fps, str) else shown(fps)
        raise MediaError(f'a video of {len(images)} images has "fps" {got}; expected their number a second beside it')
    chosen = chosen_frames(len(images), num_frames)
    return Video(tuple(smaller(read_image(images[i])) for i in chosen), tuple(float(i / fps) for i in chosen))


# --- animations ----------------------------------------------------------------------------------


def read_animation(file: BinaryIO, name: str, num_frames: int, smaller: Smaller) -> Video:
    """Decodes twice: how long a frame lasts is known when it has been reached."""
    with media_errors(name):
        try:
            with quietly():
                image = open_animation(file)
                if not show(image, 1):
                    file.seek(0)
                    return Video((smaller(upright_rgb(open_image(file, name), name)),), (0.0,))
                check_pixels(image.width, image.height, MOST_ANIMATED, name)
                edges, image = [0.0], open_animation(file)  # milliseconds
                while show(image, len(edges) - 1):
                    lasts = image.info.get("duration", 0)
                    edges.append(edges[-1] + (lasts if lasts > HASTY else UNHURRIED))
                clock = Clock(edges[:-1], edges[-1], Fraction(1, 1000))
                chosen = clock.chosen(num_frames)
                frames, image = [], open_animation(file)
                for index in chosen:
                    show(image, index)
                    frames.append(smaller(upright_rgb(image.copy(), name)))
        except UnidentifiedImageError:
            raise MediaError(f"{name} is damaged: no animation known here") from None
    return Video(tuple(frames), clock.seconds(chosen, None))


def open_animation(file: BinaryIO) -> Image.Image:
    """From its beginning: Pillow rewinds not all of them."""
    file.seek(0)
    return Image.open(file, formats=ANIMATIONS)


def show(image: Image.Image, index: int) -> bool:
    """Decodes that frame, if there is one."""
    if isinstance(image, PngImagePlugin.PngImageFile) and image.is_animated and image.default_image:
        index += 1  # the first is for those who know no animations
    with suppress(EOFError):
        image.seek(index)
        image.load()
        return True
    return False


def check_pixels(width: int, height: int, most: int, name: str) -> None:
    if width * height > most:
        raise MediaError(f"{name} has frames of {width} x {height} pixels; expected at most {most}")


# --- films -----------------------------------------------------------------------------------------


def decode(file: BinaryIO, name: str, num_frames: int, smaller: Smaller) -> Video:
    """Chooses by the packets' times, then decodes; once more in the rare case that the frames have others."""
    try:
        import av
    except ImportError:
        raise needs_extra(name, "PyAV", None) from None
    frames: list[Image.Image] = []
    options = {"protocol_whitelist": "none"}  # a playlist must not make FFmpeg open other files or URLs
    with media_errors(name):
        try:
            with av.open(file, "r", options=options, metadata_errors="ignore") as container:
                stream = video_stream(container, name)
                rate = stream.average_rate or stream.guessed_rate or None
                stamps, last = packet_times(container, stream)
                clock = make_clock(in_order(stamps), last, stream.time_base, rate, name)
            for _ in range(2):
                chosen = clock.chosen(num_frames)
                file.seek(0)
                with av.open(file, "r", options=options, metadata_errors="ignore") as container:
                    stream = video_stream(container, name)
                    frames, stamps = decode_frames(container, stream, chosen, smaller, name)
                    clock = make_clock(stamps, last, stream.time_base, rate, name)
                if list(clock.chosen(num_frames)) == list(chosen):
                    break
        except av.FFmpegError as error:
            raise MediaError(f"{name} cannot be read: {error.strerror}") from None
    if not frames:
        raise MediaError(f"{name} has no frames")
    return Video(tuple(frames), clock.seconds(chosen, rate))


def video_stream(container: "InputContainer", name: str) -> "VideoStream":
    streams = [s for s in container.streams.video if not s.disposition & ATTACHED_PICTURE]
    if not streams:
        raise MediaError(f"{name} has no video track")
    stream = next((s for s in streams if s.frames != 1), streams[0])  # an animated AVIF has a still before it
    check_pixels(stream.width, stream.height, MOST_PIXELS, name)
    stream.thread_type = "AUTO"
    frame_bytes = max(3 * stream.width * stream.height, 1)  # 4:2:0 in 16 bits
    stream.codec_context.thread_count = min(max(THREADS_BYTES // frame_bytes, 1), os.cpu_count() or 1, MOST_THREADS)
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # the size may change midway
    return stream


def packet_times(container: "InputContainer", stream: "VideoStream") -> tuple[list[int | None], int]:
    """When each packet is shown, in ticks, None where it does not say, and how long the last lasts, 0 for unknown."""
    stamps: list[int | None] = []
    latest, lasts = None, 0
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            stamp = packet.pts if packet.pts is not None else packet.dts
            stamps.append(stamp)
            if stamp is not None and (latest is None or stamp > latest):
                latest, lasts = stamp, packet.duration or 0
    return stamps, lasts


def in_order(stamps: Sequence[int | None]) -> list[int | None]:
    """As shown, not as stored; unless some are missing."""
    known = sorted(stamp for stamp in stamps if stamp is not None)
    return [*known] if len(known) == len(stamps) else [*stamps]


def decode_frames(
    container: "InputContainer", stream: "VideoStream", chosen: Sequence[int], smaller: Smaller, name: str
) -> tuple[list[Image.Image], list[int | None]]:
    """The chosen frames as they are shown, and when each of all is shown."""
    frames: list[Image.Image] = []
    stamps: list[int | None] = []
    wanted = frozenset(chosen)
    for index, frame in enumerate(decoded(container, stream)):
        stamps.append(frame.pts if frame.pts is not None else frame.dts)
        if index in wanted:
            image, turn = square(picture(frame), stream.sample_aspect_ratio, name), display_turn(frame)
            frames.append(smaller(image.transpose(turn) if turn is not None else image))
    return frames, stamps


def decoded(container: "InputContainer", stream: "VideoStream") -> "Iterator[VideoFrame]":
    """All frames, those that are only said to be as before left out: FFmpeg refuses an empty packet, as of Theora."""
    for packet in container.demux(stream):
        if packet.size or packet.dts is None:  # the last one, which ends the decoding
            yield from packet.decode()


def picture(frame: "VideoFrame") -> Image.Image:
    """A frame as RGB, its transparency laid on white as that of images is."""
    if any(component.is_alpha for component in frame.format.components):
        return to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")), 255)
    return frame.to_image()


def square(image: Image.Image, aspect: Fraction | None, name: str) -> Image.Image:
    """A frame whose pixels are shown `aspect` times as wide as high, as a DVD's are, with square ones.

    transformers leaves such films squeezed.
    """
    width, height = image.size
    if not aspect or aspect == 1:
        return image
    size = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    check_pixels(*size, MOST_PIXELS, name)
    return image.resize(size, Image.Resampling.BICUBIC)


def display_turn(frame: "VideoFrame") -> Image.Transpose | None:
    """What makes a frame upright, by its display matrix; the nearest of the eight that keep pixels pixels."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    return MATRICES[max(MATRICES, key=lambda m: a * m[0] + b * m[1] + c * m[2] + d * m[3])]


def make_clock(
    stamps: Sequence[int | None], last: int, time_base: Fraction | None, rate: Fraction | None, name: str
) -> Clock:
    """Times from the first frame's; one that is missing or behind the one before it is a step of `rate` after that."""
    tick = time_base or Fraction(1)
    known = next(((i, stamp) for i, stamp in enumerate(stamps) if stamp is not None), (0, 0))
    if rate is None and None in stamps:
        raise MediaError(f"{name} has no frame rate")
    step = 1 / (rate * tick) if rate else Fraction(0)
    now: Time = known[1] - (known[0] + 1) * step
    times: list[Time] = []
    for stamp in stamps:
        now = stamp if stamp is not None and (stamp >= now or not times) else now + step
        times.append(now)
    if not times:
        return Clock((), 0, tick)
    times = [time - times[0] for time in times]
    lasts = last or step or times[-1] / len(times)
    return Clock(times, times[-1] + lasts, tick)
