"""Images → patches: one soft token for each square of side x side pixels."""

import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mlx_gemma4.errors import MediaError, shown
from mlx_gemma4.source import describe, needs_extra, read_source, unreadable

ImageSource = str | Path | bytes | Image.Image

IMAGE_BUDGETS = (70, 140, 280, 560, 1120)  # the most soft tokens an image may take; the model was trained with these
# Pillow's names; the rest is refused, EPS because it runs programs
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "QOI")
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}  # ISO/IEC 23008-12, annex B
HEIF_BRANDS, AVIF_BRANDS = {b"mif1", b"msf1"}, {b"avif", b"avis"}
# what Pillow and libheif raise on damaged files
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Patches:
    """An image cut into n squares, row by row."""

    pixels: np.ndarray  # [n, side * side * 3] uint8, (row, column, channel)
    positions: np.ndarray  # [n, 2] int32, (x, y) = (column, row) of the square

    def __len__(self) -> int:
        return len(self.pixels)


def check_budget(budget: int) -> None:
    """ValueError for an image budget that the model was not trained with."""
    if not isinstance(budget, Integral) or budget not in IMAGE_BUDGETS:
        raise ValueError(f"image_budget is {shown(budget)}; expected one of {', '.join(map(str, IMAGE_BUDGETS))}")


def read_image(source: ImageSource) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, from a path, a URL, a file's bytes or a PIL image.

    Transparency is laid on white. 16-bit grey is scaled to 8 bits; float grey within 0..1 is taken as 0..1, any
    other as 0..255. Of an animation the first frame (of a PIL image the current one). MediaError if it cannot be read.
    """
    if isinstance(source, Image.Image):
        name = f"image of mode {source.mode} and {source.width} x {source.height} pixels"
    else:
        name = describe(source, "image")
    try:
        image = source if isinstance(source, Image.Image) else open_image(read_source(source, "image"), name)
        if 0 in image.size:
            raise MediaError(f"{name} has no pixels")
        return to_rgb(ImageOps.exif_transpose(image), name)
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(f"{name} is no image known here; expected {', '.join(FORMATS)} or HEIC") from None
    except Image.DecompressionBombError:
        raise MediaError(f"{name} has more than 178 million pixels; expected fewer, 2.6 million are seen") from None
    except DAMAGED as error:
        raise unreadable(name, error) from None


def open_image(data: bytes, name: str) -> Image.Image:
    if is_heic(data):
        return open_heic(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # 90 million pixels: a phone's photo
        return Image.open(BytesIO(data), formats=FORMATS)


def is_heic(data: bytes) -> bool:
    """Whether a file is HEVC in HEIF, as iPhones write it; AVIF is HEIF too, but Pillow reads it."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[i : i + 4] for i in range(16, end, 4))}  # 12..16 is the minor version
    return bool(brands & HEIC_BRANDS) or (bool(brands & HEIF_BRANDS) and not brands & AVIF_BRANDS)


def open_heic(data: bytes, name: str) -> Image.Image:
    """Decoded upright: libheif applies the file's rotation and takes the orientation out of the EXIF."""
    try:
        import pillow_heif
    except ImportError:
        raise needs_extra(name, "pillow_heif", "sips -s format jpeg photo.heic --out photo.jpg") from None
    return pillow_heif.read_heif(data).to_pillow()


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(to_8_bits(np.asarray(image), name))  # Pillow's own conversion clips at 255
    elif image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, rgb, "LAB", "RGB")
        return transform.apply(image)
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")  # dropping alpha would show what hides under it, often black
        canvas.alpha_composite(image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def to_8_bits(grey: np.ndarray, name: str) -> np.ndarray:
    """Grey [height, width] of 16 bits (in any integer type) or float → uint8, rounded."""
    if grey.dtype.kind != "f":
        return ((np.clip(grey, 0, 65535).astype(np.int32) + 128) // 257).astype(np.uint8)
    if not np.isfinite(grey).all():
        raise MediaError(f"{name} has pixels that are NaN or infinite")
    scale = 255 if grey.min() >= 0 and grey.max() <= 1 else 1
    return np.clip(np.rint(grey * scale), 0, 255).astype(np.uint8)


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


def image_patches(image: Image.Image, budget: int, side: int) -> Patches:
    """Resize an RGB image to its budget of soft tokens and cut it into patches."""
    return cut(fitted(image, budget, side), side)


def fitted(image: Image.Image, budget: int, side: int) -> Image.Image:
    """Of the size for its budget of soft tokens, as the model was trained: bicubic, antialiased, on 8-bit values."""
    height, width = image_size(image.height, image.width, budget, side)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def cut(image: Image.Image, side: int) -> Patches:
    """A fitted RGB image as patches; the model itself scales by 1/255."""
    rows, columns = image.height // side, image.width // side
    pixels = np.asarray(image).reshape(rows, side, columns, side, 3)  # [H, W, 3] -> [rows, side, columns, side, 3]
    pixels = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, side * side * 3)  # -> [n, side * side * 3]
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return Patches(pixels, np.stack([x, y], -1))  # positions [n, 2]
