"""Images → patches: one soft token for each square of side x side pixels."""

import logging
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from io import SEEK_END
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    _imaging,
)  # fmt: skip

from mlx_gemma4.errors import MediaError, shown
from mlx_gemma4.media.source import describe, media_errors, needs_extra, open_source

ImageSource = str | Path | bytes | Image.Image

IMAGE_BUDGETS = (70, 140, 280, 560, 1120)  # the most soft tokens an image may take; the model was trained with these
# Pillow's names; the rest is refused, EPS because it runs programs
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "QOI")
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}  # ISO/IEC 23008-12, annex B
HEIF_BRANDS, AVIF_BRANDS = {b"mif1", b"msf1"}, {b"avif", b"avis"}
SEEN = "2.6 million are seen"  # 1120 squares of 48 x 48

LONGEST_SIDE = 1_000_000  # pixels
MOST_BYTES = 900_000_000  # that reading an image may take while it is decoded
LARGE = 90_000_000  # pixels: so many are seen as they are, of more the means of 2 x 2 or more
BAND = 4_000_000  # pixels that are converted at a time
# Bytes a pixel, measured: these libraries hold an image several times over (Pillow 13.0: 16 of WebP, 9.4 of AVIF and
# 7.4 of HEIC with 8 bits and half the colours; more with alpha and 10 bits), OpenJPEG 32-bit numbers.
BYTES_PER_PIXEL = {"WEBP": 18, "AVIF": 18, "HEIF": 18, "JPEG2000": 20}
PIXELS_PER_JPEG_BYTE = 512  # at most: a bit for a square of 8 x 8
HEAD_BYTES = 1 << 20  # of JPEG 2000, with its colour profile, before what is coded
MOST_IN_PYTHON = 3_000_000  # pixels of what Pillow decodes in Python, at 3.6 to 5 s a million

UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # rows become columns
LAST_FIRST = {UPRIGHT[orientation] for orientation in (3, 4, 6, 7)}  # the first row comes last

GREYS = {"L;2": 3, "L;4": 15}  # by Pillow's name for the form: white

one_at_a_time = threading.Lock()  # reading an image: its memory is bounded, and warnings are the whole process's


def check_budget(budget: int) -> None:
    """ValueError for an image budget that the model was not trained with."""
    if not isinstance(budget, Integral) or budget not in IMAGE_BUDGETS:
        raise ValueError(f"image_budget is {shown(budget)}; expected one of {', '.join(map(str, IMAGE_BUDGETS))}")


def read_image(source: ImageSource) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, from a path, a URL, a file's bytes or a PIL image.

    Transparency is laid on white. Grey of more than 8 bits is taken as 0..255 where all of it is within, as Pillow
    itself converts it, or else as 0..65535; float grey as 0..1 where all of it is within, or else as 0..255. Of an
    animation the first frame (of a PIL image the current one). More than 90 million pixels are halved, or more than
    halved, on the way; that takes at most 1 GB. MediaError if it cannot be read.
    """
    if isinstance(source, Image.Image):
        name = f"image of mode {source.mode} and {source.width} x {source.height} pixels"
    else:
        name = describe(source, "image")
    with media_errors(name):
        try:
            with quietly():
                if isinstance(source, Image.Image):
                    return upright_rgb(source, name)
                with open_source(source, "image") as file:
                    return upright_rgb(open_image(file, name), name)
        except UnidentifiedImageError:
            raise MediaError(f"{name} is no image known here; expected {', '.join(FORMATS)} or HEIC") from None
        except Image.DecompressionBombError:
            raise MediaError(f"{name} has more than 178 million pixels; expected fewer, {SEEN}") from None


@contextmanager
def quietly() -> Iterator[None]:
    """Without Pillow's warnings about large and damaged files; an image at a time."""
    with one_at_a_time, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def silence() -> None:
    """libtiff and Pillow's logger print to standard error what Pillow reports as exceptions besides."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    except (AttributeError, OSError):  # linked in without its names
        return


silence()


def open_image(file: BinaryIO, name: str) -> Image.Image:
    """An image whose size is known and taken, its pixels not yet decoded."""
    head = file.read(256)
    file.seek(0)
    if is_heic(head):
        return open_heic(file, name)
    image = Image.open(file, formats=FORMATS)
    check_size(image, name)
    check_backed(image, file.seek(0, SEEK_END), name)
    if isinstance(image, PngImagePlugin.PngImageFile) and "transparency" in image.info:
        image.info["transparency"] = as_decoded(image.info["transparency"], image.tile[0].args)
    if image.format == "JPEG2000" and image.mode != "I;16" and (bits := channel_bits(file)) > 8:
        got = f"{name} is JPEG 2000 of {bits} bits a channel"  # Pillow 13.0 rounds its white up to 256, which is 0
        raise MediaError(f"{got}, of which Pillow reads white as black; expected 8 bits, grey, or another format")
    pixels = image.width * image.height
    kind = f"{name} ({image.format}) has {image.width} x {image.height} pixels"
    if pixels > MOST_IN_PYTHON and image.tile and image.tile[0].codec_name in Image.DECODERS:
        most = MOST_IN_PYTHON // 1_000_000
        raise MediaError(f"{kind}; expected at most {most} million in this slow format, {SEEN}")
    if isinstance(image, JpegImagePlugin.JpegImageFile) and pixels > LARGE:
        image.draft(None, (-(-image.width // 2), -(-image.height // 2)))  # half of each side, while it is decoded
    if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile) and pixels * BYTES_PER_PIXEL["JPEG2000"] > MOST_BYTES:
        image.reduce = 2  # a quarter of each side
    elif (needed := decoding_bytes(image, pixels)) > MOST_BYTES:
        raise MediaError(f"{kind}; expected at most {MOST_BYTES * pixels // needed} in all of this kind, {SEEN}")
    return image


def as_decoded(transparent: Any, form: Any) -> Any:
    """PNG's transparent grey or colour in 8 bits where Pillow decodes to 8: it leaves the file's own number there."""
    if form in GREYS:
        return transparent * 255 // GREYS[form]
    return tuple(value >> 8 for value in transparent) if form == "RGB;16B" else transparent


def decoding_bytes(image: Image.Image, pixels: int) -> int:
    """The memory that decoding takes beside the file; `pixels`: of the file, where fewer are asked for."""
    size = image.width * image.height * (1 if image.mode in ("1", "L", "P") else 4)
    if isinstance(image, JpegImagePlugin.JpegImageFile) and "progression" in image.info:
        squares = [across * down for _, across, down, _ in image.layer]  # 16-bit coefficients until the last scan
        return size + 2 * pixels * sum(squares) // max(squares)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile[0].codec_name == "libtiff":
        tags = image.tag_v2
        width = tags.get(TiffImagePlugin.TILEWIDTH, image.width)
        rows = tags.get(TiffImagePlugin.TILELENGTH, tags.get(TiffImagePlugin.ROWSPERSTRIP, image.height))
        bits = sum(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        size *= 2 if tags.get(ExifTags.Base.Orientation, 1) != 1 else 1  # Pillow turns it as it is read
        return size + width * min(rows, image.height) * bits // 8  # a strip or a tile at a time
    return max(size, pixels * BYTES_PER_PIXEL.get(image.format or "", 0))


def check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not width or not height:
        raise MediaError(f"{name} has no pixels")
    if max(width, height) > LONGEST_SIDE:
        raise MediaError(f"{name} is {width} x {height} pixels; expected sides of at most {LONGEST_SIDE}")


def check_backed(image: Image.Image, size: int, name: str) -> None:
    """MediaError if a file of `size` bytes cannot hold so many pixels, where the decoder would make up the rest."""
    pixels = covered = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        extents = [tile.extents for tile in image.tile if tile.extents]
        covered = max(right for _, _, right, _ in extents) * max(bottom for *_, bottom in extents)
    jpeg = isinstance(image, JpegImagePlugin.JpegImageFile) or image.info.get("compression") == "jpeg"
    if covered < pixels or (jpeg and pixels > PIXELS_PER_JPEG_BYTE * size):
        told = f"{name} says that it is {image.width} x {image.height} pixels"
        raise MediaError(f"{told}; its {size} bytes hold fewer")


def channel_bits(file: BinaryIO) -> int:
    """Of JPEG 2000: the largest that the head of its codestream says (ISO/IEC 15444-1, A.5.1), 0 if none is found."""
    file.seek(0)
    data = file.read(HEAD_BYTES)
    place = data.find(b"\xff\x4f\xff\x51")  # start, and the segment of sizes
    if place < 0:
        return 0
    channels = int.from_bytes(data[place + 40 : place + 42], "big")
    return max(((size & 127) + 1 for size in data[place + 42 : place + 42 + 3 * channels : 3]), default=0)


def is_heic(data: bytes) -> bool:
    """Whether a file is HEVC in HEIF, as iPhones write it; AVIF is HEIF too, but Pillow reads it."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[i : i + 4] for i in range(16, end, 4))}  # 12..16 is the minor version
    return bool(brands & HEIC_BRANDS) or (bool(brands & HEIF_BRANDS) and not brands & AVIF_BRANDS)


def open_heic(file: BinaryIO, name: str) -> Image.Image:
    """Decoded upright: libheif applies the file's rotation and takes the orientation out of the EXIF."""
    try:
        import pillow_heif
    except ImportError:
        raise needs_extra(name, "pillow_heif", "sips -s format jpeg photo.heic --out photo.jpg") from None
    heif = pillow_heif.open_heif(file)
    width, height = heif.size
    if width * height * BYTES_PER_PIXEL["HEIF"] > MOST_BYTES:
        most = MOST_BYTES // BYTES_PER_PIXEL["HEIF"]
        raise MediaError(f"{name} (HEIC) has {width} x {height} pixels; expected at most {most}, {SEEN}")
    return heif.to_pillow()


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decodes, converts and turns band by band, so that there is never a second image of the size of the first."""
    check_size(image, name)
    image.load()
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    white = white_of(image, name) if is_deep(image) else 255
    width, height = image.size
    step = 1
    while width * height > LARGE * step * step:
        step += 1
    rows = max(BAND // width // step, 1) * step
    if rows >= height and step == 1:  # one band
        whole = to_rgb(image, white)
        return whole.transpose(turn) if turn is not None else whole
    if image.mode == "RGB" and turn is None and not image.has_transparency_data:
        return image.reduce(step) if step > 1 else image
    across, down = -(-width // step), -(-height // step)
    upright = Image.new("RGB", (down, across) if turn in SIDEWAYS else (across, down))
    for top in range(0, height, rows):
        band = to_rgb(image.crop((0, top, width, min(top + rows, height))), white)
        band = band.reduce(step) if step > 1 else band
        place = down - top // step - band.height if turn in LAST_FIRST else top // step
        band = band.transpose(turn) if turn is not None else band
        upright.paste(band, (place, 0) if turn in SIDEWAYS else (0, place))
    return upright


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits: Pillow's own conversions clip that at 255."""
    return image.mode == "F" or image.mode.startswith("I")


def to_rgb(image: Image.Image, white: int) -> Image.Image:
    """`white`: of deep grey."""
    if is_deep(image):
        grey = np.asarray(image)
        shades = to_8_bits(grey, white)
        if "transparency" in image.info:
            shades[grey == image.info["transparency"]] = 255
        image = Image.fromarray(shades)
    elif image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, rgb, "LAB", "RGB")
        return transform.apply(image)
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")  # dropping alpha would show what hides under it, often black
        canvas.alpha_composite(image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def white_of(grey: Image.Image, name: str) -> int:
    """The value that is white in deep grey: 1 or 255 of float, 255 or 65535 of integers."""
    rows = max(BAND // grey.width, 1)
    lowest, highest = math.inf, -math.inf
    for top in range(0, grey.height, rows):
        band = np.asarray(grey.crop((0, top, grey.width, min(top + rows, grey.height))))
        if not np.isfinite(band).all():
            raise MediaError(f"{name} has pixels that are NaN or infinite")
        lowest, highest = min(lowest, float(band.min())), max(highest, float(band.max()))
    narrow, wide = (1, 255) if grey.mode == "F" else (255, 65535)
    return narrow if lowest >= 0 and highest <= narrow else wide


def to_8_bits(grey: np.ndarray, white: int) -> np.ndarray:
    """Grey [height, width] of integers or float → uint8, rounded."""
    return np.rint(np.clip(grey, 0, white) * (255 / white)).astype(np.uint8)


def image_size(height: int, width: int, budget: int, side: int) -> tuple[int, int]:
    """Height and width in pixels after the aspect-preserving resize, multiples of `side`; area <= budget * side ** 2.

    A side that would become 0 is `side`, the other then a whole multiple of it; both cannot, for any of
    IMAGE_BUDGETS. Source: transformers 5.23.0, gemma4_unified, get_aspect_ratio_preserving_size.
    """
    check_budget(budget)
    factor = math.sqrt(budget * side**2 / (height * width))
    new_height = math.floor(height * factor / side) * side
    new_width = math.floor(width * factor / side) * side
    if new_height == 0:
        return side, min(width // height, budget) * side
    if new_width == 0:
        return min(height // width, budget) * side, side
    return new_height, new_width


def fitted(image: Image.Image, budget: int, side: int) -> Image.Image:
    """Of the size for its budget of soft tokens, as the model was trained: bicubic, antialiased, on 8-bit values."""
    height, width = image_size(image.height, image.width, budget, side)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def cut(image: Image.Image, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A fitted RGB image as n squares, row by row: pixels [n, side * side * 3] uint8, (row, column, channel), and
    positions [n, 2] int32, (x, y) = (column, row). The model itself scales by 1/255."""
    rows, columns = image.height // side, image.width // side
    pixels = np.asarray(image).reshape(rows, side, columns, side, 3)  # [H, W, 3] -> [rows, side, columns, side, 3]
    pixels = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, side * side * 3)  # -> [n, side * side * 3]
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return pixels, np.stack([x, y], -1)
