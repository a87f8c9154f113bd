"""Video → a few upright frames and their times."""

import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from mlx_gemma4.errors import MediaError
from mlx_gemma4.media.video import (
    Clock,
    Video,
    VideoSource,
    chosen_frames,
    decoded,
    full,
    make_clock,
    read_video,
    square,
    timestamp,
)

STEP = 6  # of brightness from frame to frame


def ramp(count: int) -> list[Image.Image]:
    """Frames 64 x 48, each brighter than the one before, with a black lower half but for a white left corner."""
    frames = []
    for i in range(count):
        pixels = np.full((48, 64, 3), STEP * i, np.uint8)
        pixels[24:] = 0
        pixels[24:, :32] = 255
        frames.append(Image.fromarray(pixels))
    return frames


def encoded(
    count: int,
    rate: Fraction | int = 10,
    format: str = "mp4",
    codec: str = "mpeg4",
    aspect: Fraction = Fraction(1),  # of a pixel
) -> bytes:
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        stream.codec_context.sample_aspect_ratio = aspect
        for image in ramp(count):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file.getvalue()


def read(source: VideoSource, fps: float | None, num_frames: int) -> Video:
    return read_video(source, fps, num_frames, lambda frame: frame)


def which(video: Video) -> list[int]:
    """The numbers of the ramp's frames in an upright video."""
    return [round(np.asarray(frame)[4:20].mean() / STEP) for frame in video.frames]


@pytest.fixture(scope="module")
def clip() -> bytes:
    return encoded(40)


@pytest.mark.parametrize("num_frames", [1, 3, 7, 32, 39, 40, 41, 100])
def test_frames_are_spread_evenly_with_their_times(clip: bytes, num_frames: int) -> None:
    video = read(clip, None, num_frames)
    expected = [i * 40 // num_frames for i in range(num_frames)] if num_frames < 40 else list(range(40))
    assert which(video) == expected
    assert video.seconds == tuple(i / 10 for i in expected)
    assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", (64, 48))}


def test_all_ways_to_give_a_file_agree(clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clip)
    for source in (tmp_path / "a.mp4", str(tmp_path / "a.mp4"), (tmp_path / "a.mp4").as_uri()):
        assert which(read(source, None, 4)) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("format", "codec", "rate"),
    [
        ("mp4", "mpeg4", Fraction(30000, 1001)),
        ("matroska", "mpeg4", 9),
        ("mpegts", "mpeg2video", 25),
        ("avi", "mpeg4", 4),
    ],
)
def test_containers_of_any_kind_are_read(format: str, codec: str, rate: Fraction | int) -> None:
    video = read(encoded(20, rate, format, codec), None, 4)
    assert which(video) == [0, 5, 10, 15]
    assert np.allclose(video.seconds, [i / float(rate) for i in (0, 5, 10, 15)])


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_the_rotation_of_a_phone_is_applied(clip: bytes, clockwise: int) -> None:
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]  # ISO/IEC 14496-12, 6.2.2
    place = clip.index(b"tkhd") + 44
    turned = clip[:place] + struct.pack(">9i", *matrix) + clip[place + 36 :]
    frame = read(turned, None, 1).frames[0]
    shown = ramp(1)[0].rotate(-clockwise, expand=True)
    assert frame.size == shown.size
    assert np.abs(np.asarray(frame, np.float32) - np.asarray(shown, np.float32)).mean() < 10


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [((1, 0, 0, 1), None), ((-1, 0, 0, 1), 0), ((1, 0, 0, -1), 1), ((0, -1, 1, 0), 2), ((-1, 0, 0, -1), 3),
     ((0, 1, -1, 0), 4), ((0, 1, 1, 0), 5), ((0, -1, -1, 0), 6), ((0, 0, 0, 0), None)],
)  # fmt: skip
def test_a_display_matrix_turns_and_mirrors(
    clip: bytes, matrix: tuple[int, int, int, int], turn: Image.Transpose | None
) -> None:
    a, b, c, d = (value << 16 for value in matrix)
    place = clip.index(b"tkhd") + 44
    turned = clip[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + clip[place + 36 :]
    frame, shown = read(turned, None, 1).frames[0], ramp(1)[0]
    shown = shown if turn is None else shown.transpose(Image.Transpose(turn))
    assert frame.size == shown.size
    assert np.abs(np.asarray(frame, np.float32) - np.asarray(shown, np.float32)).mean() < 10


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_frames_with_what_pyav_has_no_name_for_are_shown_upright(orientation: int) -> None:
    av = pytest.importorskip("av")
    exif, frame, file = Image.Exif(), BytesIO(), BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    ramp(1)[0].save(frame, "JPEG", exif=exif, quality=95)
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for index in range(3):
            packet = av.Packet(frame.getvalue())
            packet.pts = packet.dts = index
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), True
            container.mux(packet)
    video = read(file.getvalue(), None, 3)
    assert np.allclose(video.seconds, [0, 0.1, 0.2])
    shown = ImageOps.exif_transpose(Image.open(frame)).convert("RGB")
    assert video.frames[0].size == shown.size
    assert np.abs(np.asarray(video.frames[0], np.float32) - np.asarray(shown, np.float32)).mean() < 10


@pytest.mark.parametrize(("aspect", "size"), [("16/11", (93, 48)), ("8/9", (64, 54)), ("1", (64, 48))])
@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
def test_pixels_that_are_not_square_are_made_so(format: str, aspect: str, size: tuple[int, int]) -> None:
    video = read(encoded(3, format=format, aspect=Fraction(aspect)), None, 3)
    assert which(video) == [0, 1, 2] and {frame.size for frame in video.frames} == {size}


def test_pixels_are_made_square_before_a_film_is_turned() -> None:
    wide = encoded(3, aspect=Fraction(2))
    place = wide.index(b"tkhd") + 44
    turned = wide[:place] + struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30) + wide[place + 36 :]
    assert read(turned, None, 1).frames[0].size == (48, 128)


def test_a_shape_of_pixels_beyond_all_bounds_is_an_error() -> None:
    with pytest.raises(MediaError, match=r"^x has frames of 1920000 x 48 pixels; expected at most 67108864$"):
        square(ramp(1)[0], Fraction(30_000), "x")


def test_each_frame_is_made_smaller(clip: bytes) -> None:
    for source, fps in ((clip, None), (ramp(40), 10.0)):
        video = read_video(source, fps, 4, lambda frame: frame.reduce(4))
        assert {frame.size for frame in video.frames} == {(16, 12)}


GOPS = {
    "closed": {},
    "open": {"x264-params": "open-gop=1:b-pyramid=normal:b-adapt=0:ref=6"},
    "refreshed": {"x264-params": "intra-refresh=1"},  # key frames that are whole only some frames later
    "one": {"g": "1000"},
}


def with_keys(gop: str, format: str, all_keys: bool = False) -> bytes:
    """The ramp of 40 frames in H.264; `all_keys`: each is said to be a key frame."""
    av = pytest.importorskip("av")
    if "libx264" not in av.codecs_available:
        pytest.skip("PyAV without libx264")
    file = BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "bf": "2", "crf": "5"} | GOPS[gop])
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in [*ramp(40), None]:
            for packet in stream.encode(image and av.VideoFrame.from_image(image)):
                packet.is_keyframe |= all_keys
                container.mux(packet)
    return file.getvalue()


def read_counted(source: bytes, num_frames: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Video, int]:
    """With the number of frames that were decoded."""
    count = 0

    def counted(*args: Any) -> Iterator[Any]:
        nonlocal count
        for frame in decoded(*args):
            count += 1
            yield frame

    monkeypatch.setattr("mlx_gemma4.media.video.decoded", counted)
    return read(source, None, num_frames), count


@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "mpegts", "flv"])
@pytest.mark.parametrize("gop", GOPS)
@pytest.mark.parametrize("num_frames", [1, 4, 5, 7])
def test_only_what_leads_to_the_chosen_frames_is_decoded(
    gop: str, format: str, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = with_keys(gop, format)
    video, count = read_counted(film, num_frames, monkeypatch)
    assert which(video) == [i * 40 // num_frames for i in range(num_frames)]
    monkeypatch.setattr("mlx_gemma4.media.video.TELLING", ())
    whole, all_frames = read_counted(film, num_frames, monkeypatch)
    assert whole.seconds == video.seconds and all_frames == 40
    assert [frame.tobytes() for frame in whole.frames] == [frame.tobytes() for frame in video.frames]
    most = {"closed": 10 * num_frames - 9, "open": 12 * num_frames - 9, "one": 39, "refreshed": 80}[gop]
    assert count <= min(most, 39 if gop != "refreshed" else 80)


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_key_frames_that_are_none_give_no_other_frames(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    film = with_keys("closed", format, all_keys=True)
    video, _ = read_counted(film, 7, monkeypatch)
    monkeypatch.setattr("mlx_gemma4.media.video.TELLING", ())
    whole, _ = read_counted(film, 7, monkeypatch)
    assert which(video) == which(whole) == [i * 40 // 7 for i in range(7)] and video.seconds == whole.seconds
    assert [frame.tobytes() for frame in whole.frames] == [frame.tobytes() for frame in video.frames]


def test_a_film_cut_off_at_its_beginning_is_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    film = with_keys("closed", "mpegts")
    late = film[188 * (len(film) // 188 // 3) :]
    video, _ = read_counted(late, 5, monkeypatch)
    monkeypatch.setattr("mlx_gemma4.media.video.TELLING", ())
    whole, _ = read_counted(late, 5, monkeypatch)
    assert which(video) == which(whole) and video.seconds == whole.seconds and len(which(video)) == 5


def test_hidden_frames_are_not_counted() -> None:
    av = pytest.importorskip("av")
    if "libvpx" not in av.codecs_available:
        pytest.skip("PyAV without libvpx")
    file = BytesIO()
    with (
        av.open(BytesIO(encoded(20, 10, "matroska", "libvpx"))) as shown,
        av.open(file, "w", format="matroska") as container,
    ):
        stream = container.add_stream_from_template(shown.streams.video[0])
        for i, packet in enumerate(p for p in shown.demux(video=0) if p.size):
            data = bytearray(bytes(packet))
            if i % 2:
                data[0] &= ~0x10  # VP8's show_frame (RFC 6386, 9.1)
            hidden = av.Packet(bytes(data))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.is_keyframe, hidden.stream = packet.is_keyframe, stream
            container.mux(hidden)
    assert which(read(file.getvalue(), None, 5)) == [0, 4, 8, 12, 16]


def test_frames_that_repeat_the_one_before_are_no_error(clip: bytes) -> None:
    """Theora writes them as packets without bytes, which FFmpeg's decoders refuse."""
    av = pytest.importorskip("av")
    empty = av.Packet(b"")
    empty.dts = 1
    with av.open(BytesIO(clip)) as container:

        class Repeating:
            def demux(self, stream: Any) -> Iterator[Any]:
                first, *rest = container.demux(stream)
                yield from (first, empty, *rest)

        stream: Any = container.streams.video[0]
        repeating: Any = Repeating()
        assert len(list(decoded(enumerate(full(repeating, stream)), stream, range(sys.maxsize)))) == 40


def test_an_animated_avif_is_a_film_and_not_its_still() -> None:
    pytest.importorskip("av")
    file, images = BytesIO(), ramp(5)
    images[0].save(file, "AVIF", save_all=True, append_images=images[1:], duration=200)
    video = read(file.getvalue(), None, 32)
    assert which(video) == [0, 1, 2, 3, 4] and video.seconds == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def timed(times: list[int], format: str = "matroska", start: int = 0, codec: str = "mpeg4") -> bytes:
    """A film whose frames are those of the ramp, at these milliseconds."""
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=1000)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(ramp(len(times)), times, strict=True):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = start + time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("format", ["matroska", "mp4", "mov"])
@pytest.mark.parametrize("start", [0, 5000])
def test_frames_have_their_own_times_and_are_chosen_at_even_steps_of_time(format: str, start: int) -> None:
    times = [*range(0, 10_000, 1000), *range(10_000, 11_000, 40)]  # 10 frames a second apart, 25 in the eleventh
    video = read(timed(times, format, start), None, 8)
    steps = [i * 11_000 / 8 for i in range(8)]
    assert which(video) == [max(i for i, time in enumerate(times) if time <= step) for step in steps]
    assert video.seconds == tuple(times[i] / 1000 for i in which(video))


def test_a_still_that_lasts_is_one_frame_and_leaves_the_others_to_what_moves() -> None:
    times = [0, *range(600_000, 602_000, 100)]  # ten minutes, then two seconds
    video = read(timed(times), None, 8)
    assert which(video)[0] == 0 and len(set(which(video))) == len(which(video)) > 5
    assert video.seconds == tuple(times[i] / 1000 for i in which(video))


def test_few_frames_are_all_shown_whatever_their_times() -> None:
    times = [0, 7000, 7033, 7066, 60_000]
    video = read(timed(times), None, 5)
    assert which(video) == [0, 1, 2, 3, 4] and video.seconds == (0, 7, 7.033, 7.066, 60)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300), st.integers(1, 40))
def test_chosen_frames_of_any_times_are_distinct_and_in_order(times: list[int], num_frames: int) -> None:
    times = sorted(times)
    clock = Clock([time - times[0] for time in times], times[-1] - times[0] + 1, Fraction(1, 1000))
    chosen = list(clock.chosen(num_frames))
    assert (
        1 <= len(chosen) <= num_frames and chosen == sorted(set(chosen)) and 0 <= chosen[0] <= chosen[-1] < len(times)
    )


@given(st.integers(1, 3000), st.sampled_from([1001 / 24, 100 / 3, 40.0, 1001 / 60, 200.0]), st.integers(1, 40))
def test_a_constant_rate_is_chosen_by_count_however_its_times_are_rounded(total: int, step: float, n: int) -> None:
    clock = Clock([round(i * step) for i in range(total)], round(total * step), Fraction(1, 1000))
    assert list(clock.chosen(n)) == list(chosen_frames(total, n))


@pytest.mark.parametrize(
    ("stamps", "times"),
    [([5, 15, 25], [0, 10, 20]), ([None, None, None], [0, 10, 20]), ([None, 10, 20], [0, 10, 20]),
     ([0, None, 25], [0, 10, 25]), ([0, 10, 0, 10], [0, 10, 20, 30]), ([7, 7, 17], [0, 0, 10])],
)  # fmt: skip
def test_times_that_are_missing_or_run_back_are_a_step_after_the_one_before(
    stamps: list[int | None], times: list[int]
) -> None:
    clock = make_clock(stamps, 0, Fraction(1, 1000), Fraction(100), "x")
    assert list(clock.times) == times and clock.end == times[-1] + 10


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_film_read_without_pyav(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    file, lasts = BytesIO(), [1000] * 10 + [50] * 20
    first, *rest = ramp(30)
    first.save(file, format, save_all=True, append_images=rest, duration=lasts, lossless=True)
    video = read(file.getvalue(), None, 32)
    assert which(video) == list(range(30))
    assert np.allclose(video.seconds, np.cumsum([0, *lasts[:-1]]) / 1000)
    assert which(read(file.getvalue(), None, 11)) == [*range(10), 10]
    still = BytesIO()
    first.save(still, format)
    assert read(still.getvalue(), None, 32).seconds == (0,)


def test_transparency_of_an_animation_is_laid_on_white() -> None:
    frames = [Image.new("RGBA", (8, 8), (255, 0, 0, alpha)) for alpha in (255, 0)]
    file = BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=500, lossless=True)
    video = read(file.getvalue(), None, 32)
    assert [frame.getpixel((0, 0)) for frame in video.frames] == [(255, 0, 0), (255, 255, 255)]


def test_transparency_of_a_film_is_laid_on_white() -> None:
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=2)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "rgba"
        for alpha in (255, 0):
            frame = av.VideoFrame.from_ndarray(np.full((8, 8, 4), (255, 0, 0, alpha), np.uint8), format="rgba")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = read(file.getvalue(), None, 32)
    assert [frame.getpixel((0, 0)) for frame in video.frames] == [(255, 0, 0), (255, 255, 255)]


def test_a_frame_beyond_all_bounds_is_an_error() -> None:
    file = BytesIO()
    first, *rest = (Image.new("L", (5000, 4000), value) for value in (0, 9))
    first.save(file, "GIF", save_all=True, append_images=rest)
    with pytest.raises(MediaError, match=r"has frames of 5000 x 4000 pixels; expected at most 16777216$"):
        read(file.getvalue(), None, 2)


def test_a_canvas_beyond_all_bounds_is_refused_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    file = BytesIO()
    first, *rest = (Image.new("RGB", (64, 48), (value, 0, 0)) for value in (0, 200))
    first.save(file, "WEBP", save_all=True, append_images=rest, lossless=True)
    data = bytearray(file.getvalue())
    assert data[12:16] == b"VP8X"
    data[27:30] = (2**20).to_bytes(3, "little")  # its height, less one
    monkeypatch.setattr("mlx_gemma4.media.video.show", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(MediaError, match=r"has frames of 64 x 1048577 pixels; expected at most 16777216$"):
        read(bytes(data), None, 2)


def test_a_list_of_images_is_spread_evenly_at_its_frame_rate(tmp_path: Path) -> None:
    images = ramp(9)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    for source in (images, tuple(paths), [str(path) for path in paths], [path.read_bytes() for path in paths]):
        video = read(source, 0.5, 4)
        assert which(video) == [0, 2, 4, 6]
        assert video.seconds == (0, 4, 8, 12)
    assert which(read(images, 2, 32)) == list(range(9))


def test_only_the_chosen_images_are_read(tmp_path: Path) -> None:
    ramp(1)[0].save(tmp_path / "a.png")
    assert len(read([tmp_path / "a.png", "missing.png"], 1, 1).frames) == 1


@given(st.integers(0, 5000), st.integers(1, 100))
def test_chosen_frames_are_distinct_in_order_and_begin_with_the_first(total: int, num_frames: int) -> None:
    chosen = list(chosen_frames(total, num_frames))
    assert len(chosen) == min(total, num_frames) and chosen == sorted(set(chosen))
    assert not chosen or (chosen[0] == 0 and chosen[-1] < total)
    gaps = np.diff([*chosen, total])
    assert not chosen or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("fps", [1e-320, True, Fraction(1, 10**40), -(10**400), -(10**5000)], ids=[*"abcde"])
def test_a_frame_rate_beyond_all_bounds_is_an_error_of_one_line(clip: bytes, fps: float) -> None:
    for source in (ramp(2), clip):
        with pytest.raises(MediaError, match=r'"fps"') as caught:
            read(source, fps, 32)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("fps", [None, 0, -1, float("nan"), float("inf"), "2"])
def test_a_list_of_images_needs_their_frame_rate(fps: float | None) -> None:
    with pytest.raises(MediaError, match=rf'^a video of 2 images has "fps" {fps}; expected their number a second'):
        read(ramp(2), fps, 32)


def test_a_file_takes_no_frame_rate(clip: bytes) -> None:
    with pytest.raises(MediaError, match=r'has its own frame rate, but "fps" is 2; expected only beside a list'):
        read(clip, 2, 32)


def test_what_is_no_video_is_an_error(clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"not a video at all")
    (tmp_path / "empty.mp4").touch()
    cases: dict[object, str] = {
        tmp_path / "x.mp4": r"^video '.*x\.mp4' cannot be read: Invalid data found when processing input$",
        tmp_path / "empty.mp4": r"^video '.*empty\.mp4' is empty \(0 bytes\)$",
        tmp_path / "no.mp4": r"^video '.*no\.mp4' does not exist$",
        tmp_path: r"is a folder; expected a file$",
        clip[: len(clip) // 2]: r"^video of \d+ bytes cannot be read: ",
        b"": r"^video of 0 bytes is empty",
        5: r"^the source of the video is of type int; expected a path, a URL, bytes or a list",
    }
    for source, message in cases.items():
        with pytest.raises(MediaError, match=message):
            read(source, None, 32)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match=r"^video is an empty list; expected at least one image$"):
        read([], 1, 32)
    with pytest.raises(MediaError, match=r"^image 'no\.png' does not exist$"):
        read(["no.png"], 1, 32)
    with pytest.raises(ValueError, match=r"^num_frames is 0; expected at least 1$"):
        read(clip, None, 0)


def test_a_sound_is_no_video() -> None:
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(MediaError, match=r"has no video track$"):
        read(file.getvalue(), None, 32)


def test_a_playlist_opens_no_other_file(clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_bytes(encoded(5, 25, "mpegts", "mpeg2video"))
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match=r"cannot be read: "):
        read(tmp_path / "a.m3u8", None, 32)


def test_without_pyav_the_message_names_the_extra(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r'^video of \d+ bytes needs PyAV: pip install "mlx_gemma4\[video\]"$'):
        read(clip, None, 32)


def test_timestamps_are_minutes_and_seconds() -> None:
    assert [timestamp(t) for t in (0, 0.99, 59.999, 60, 61.5, 5999, 6000, 100_000)] == [
        "00:00", "00:00", "00:59", "01:00", "01:01", "99:59", "100:00", "1666:40"
    ]  # fmt: skip
