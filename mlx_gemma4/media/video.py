"""Video → a few RGB frames and their times."""

import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, takewhile
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from PIL import GifImagePlugin, Image, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from mlx_gemma4.errors import MediaError, shown, unbroken
from mlx_gemma4.media.image import ImageSource, open_image, quietly, read_image, to_rgb, upright_rgb
from mlx_gemma4.media.source import describe, media_errors, needs_extra, open_source

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

Animation = GifImagePlugin.GifImageFile | PngImagePlugin.PngImageFile | WebPImagePlugin.WebPImageFile
VideoSource = str | Path | bytes | Sequence[ImageSource]
Smaller = Callable[[Image.Image], Image.Image]
Time = int | float | Fraction  # in ticks of the file's clock
Run = tuple[range, range]  # packets that are decoded one after the other, frames they show from their key frame on

ATTACHED_PICTURE = 1 << 10  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: the cover of a song
SLOWEST = 1e-9  # images a second of a list: one in 32 years
MOST_STEPS = 1 << 20  # of time: a second of ten days
MOST_PIXELS = 1 << 26  # of a frame: twice 8K
MOST_THREADS = 16  # as FFmpeg itself takes
THREADS_BYTES = 1 << 28  # that the frames which FFmpeg decodes at the same time may take
ANIMATIONS = ("GIF", "WEBP", "PNG")  # read by Pillow: FFmpeg knows no animated WebP, and lays transparency on black
MOST_ANIMATED = 1 << 24  # pixels of an animation's frame, of which Pillow holds a few
HASTY, UNHURRIED = 10, 100  # milliseconds: what says at most the one, browsers show for the other
TELLING = ("av1", "h264", "hevc", "vp9")  # codecs whose packets show one frame each
EVERYTHING: list[Run] = [(range(sys.maxsize), range(sys.maxsize))]

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
TURNS = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
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


@dataclass(frozen=True)
class Packets:
    """What a film's packets tell before they are decoded."""

    stamps: list[int | None]  # when each is shown, in ticks
    keys: list[int]  # those of key frames
    hidden: list[int]  # those that only lead to others
    last: int  # ticks that the last frame lasts, 0 for unknown
    telling: bool  # enough to decode a part

    def shown(self) -> list[int | None]:
        """When the frames are shown; in order, unless some are missing."""
        hidden = frozenset(self.hidden)
        stamps = [stamp for i, stamp in enumerate(self.stamps) if i not in hidden]
        known = sorted(stamp for stamp in stamps if stamp is not None)
        return [*known] if len(known) == len(stamps) else stamps

    def runs(self, chosen: Sequence[int]) -> list[Run]:
        """What leads to the chosen frames, each from a key frame with all before stored and shown before it."""
        if not self.telling:
            return EVERYTHING
        times = np.array(self.stamps, np.int64)
        before, after = np.maximum.accumulate(times), np.minimum.accumulate(times[::-1])[::-1]
        entries = np.array([0, *(i for i in self.keys if i and before[i - 1] < after[i])])
        order = np.argsort(times, kind="stable")
        order = order[~np.isin(order, self.hidden)]  # the packet of each frame
        stops, shown = np.maximum.accumulate(order) + 1, times[order]
        runs: list[Run] = []
        for frame in chosen:
            start = entries[max(np.searchsorted(times[entries], shown[frame], "right") - 1, 0)]
            first = np.searchsorted(shown, times[start]) if start else 0
            if runs and start <= runs[-1][0].stop:
                start, first = (part.start for part in runs.pop())
            runs.append((range(start, stops[frame]), range(first, frame + 1)))
        return runs


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
                if image.is_animated:
                    check_pixels(image.width, image.height, MOST_ANIMATED, name)
                if not show(image, 1):
                    file.seek(0)
                    return Video((smaller(upright_rgb(open_image(file, name), name)),), (0.0,))
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


def open_animation(file: BinaryIO) -> Animation:
    """From its beginning: Pillow rewinds not all of them."""
    file.seek(0)
    return cast(Animation, Image.open(file, formats=ANIMATIONS))


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
    """Chooses by the packets' times, then decodes what the chosen frames need; all, where that gives others than the
    packets tell, and once more in the rare case that the frames then have other times."""
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
                packets = read_packets(container, stream)
                told = packets.shown()
                clock = make_clock(told, packets.last, stream.time_base, rate, name)
            chosen = clock.chosen(num_frames)
            for runs in (packets.runs(chosen), EVERYTHING, EVERYTHING):
                file.seek(0)
                with av.open(file, "r", options=options, metadata_errors="ignore") as container:
                    stream = video_stream(container, name)
                    try:
                        frames, stamps = decode_frames(container, stream, runs, chosen, smaller, name)
                    except av.FFmpegError:
                        if runs is EVERYTHING:
                            raise
                        continue
                    if runs is EVERYTHING:
                        clock = make_clock(stamps, packets.last, stream.time_base, rate, name)
                    elif stamps != [told[i] for _, indices in runs for i in indices]:
                        continue
                before, chosen = chosen, clock.chosen(num_frames)
                if list(chosen) == list(before):
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


def read_packets(container: "InputContainer", stream: "VideoStream") -> Packets:
    stamps: list[int | None] = []
    keys: list[int] = []
    hidden: list[int] = []
    latest, lasts = None, 0
    telling = stream.codec_context.codec.canonical_name in TELLING
    for packet in full(container, stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if packet.is_keyframe:
            keys.append(len(stamps))
        if packet.is_discard:
            hidden.append(len(stamps))
        elif stamp is not None and (latest is None or stamp > latest):
            latest, lasts = stamp, packet.duration or 0
        stamps.append(stamp)
        if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
            telling = False
    return Packets(stamps, keys, hidden, lasts, telling)


def full(container: "InputContainer", stream: "VideoStream") -> "Iterator[Packet[VideoStream]]":
    """All packets but those that only say that a frame is as before: FFmpeg refuses empty ones, as of Theora."""
    return (packet for packet in container.demux(stream) if packet.size)


def decode_frames(
    film: "InputContainer", stream: "VideoStream", runs: list[Run], chosen: Sequence[int], smaller: Smaller, name: str
) -> tuple[list[Image.Image], list[int | None]]:
    """The chosen frames as they are shown, and when each of those decoded is shown."""
    frames: list[Image.Image] = []
    stamps: list[int | None] = []
    wanted = frozenset(chosen)
    packets = enumerate(full(film, stream))
    for run, indices in runs:
        for index, frame in zip(indices, decoded(packets, stream, run), strict=False):
            stamps.append(frame.pts if frame.pts is not None else frame.dts)
            if index in wanted:
                image, turn = square(picture(frame), stream.sample_aspect_ratio, name), display_turn(frame)
                frames.append(smaller(image.transpose(turn) if turn is not None else image))
    return frames, stamps


def decoded(
    packets: "Iterator[tuple[int, Packet[VideoStream]]]", stream: "VideoStream", run: range
) -> "Iterator[VideoFrame]":
    """The frames of these packets; later in a film from the key frame on, and while none is mended from others."""
    stream.codec_context.flush_buffers()
    fed = (packet for index, packet in takewhile(lambda packet: packet[0] < run.stop, packets) if index in run)
    frames = (frame for packet in chain(fed, [None]) for frame in stream.decode(packet))
    if not run.start:
        return frames
    return takewhile(lambda frame: not frame.is_corrupt, dropwhile(lambda frame: not frame.key_frame, frames))


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
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # there is also what PyAV 18.1 has no name for: EXIF, the view of a stereoscopic film
        return TURNS.get(frame.rotation)
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
