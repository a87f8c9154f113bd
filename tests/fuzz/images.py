"""Pictures in every format, damaged or odd: patches within the budget, or one line."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
import pillow_heif
from hypothesis import strategies as st
from PIL import Image

from .judge import check as must
from .judge import check_refusal
from .mutate import damaged, png_repaired, weighted
from .surface import MediaError, demo_processor

SHARE = 50
BUDGETS = (None, 70, 140, 280, 560, 1120)

prepare = demo_processor


@cache
def seeds() -> list[bytes]:
    """Small files of every format and mode that the libraries at hand write."""
    random = np.random.default_rng(0)
    colours = Image.fromarray(random.integers(0, 256, (30, 40, 4), dtype=np.uint8).repeat(2, 0).repeat(2, 1), "RGBA")
    flat = Image.new("RGB", (40, 30), "teal")
    grey16 = Image.fromarray(random.integers(0, 65536, (30, 40), dtype=np.uint16))
    float32 = Image.fromarray(random.random((30, 40), dtype=np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    files: list[bytes] = []

    def add(image: Image.Image, form: str, **options: Any) -> None:
        out = io.BytesIO()
        image.save(out, form, **options)
        files.append(out.getvalue())

    modes = {mode: colours.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr")
             if mode not in ("LAB", "CMYK", "YCbCr")}  # fmt: skip
    modes["CMYK"] = colours.convert("RGB").convert("CMYK")
    modes["LAB"] = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).copy()
    rgb = modes["RGB"]
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        add(modes[mode], "PNG")
    add(grey16, "PNG")
    add(flat, "PNG", exif=exif, icc_profile=b"x" * 100, dpi=(1, 1))
    add(rgb, "PNG", save_all=True, append_images=[flat.resize(rgb.size)], duration=100)
    for options in ({}, {"progressive": True, "exif": exif}, {"quality": 5, "subsampling": 2}):
        add(rgb, "JPEG", **options)
    add(modes["L"], "JPEG")
    add(modes["CMYK"], "JPEG")
    add(rgb, "MPO", save_all=True, append_images=[flat])
    add(rgb, "WEBP", exif=exif)
    add(modes["RGBA"], "WEBP", lossless=True)
    add(modes["RGBA"], "WEBP", save_all=True, append_images=[colours.rotate(90)], duration=100)
    add(rgb, "AVIF", speed=10)
    add(modes["P"], "GIF")
    add(rgb, "GIF", save_all=True, append_images=[colours.rotate(45).convert("RGB")], duration=100, disposal=2)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
        add(rgb, "TIFF", compression=compression)
    for image in (modes["1"], modes["L"], modes["RGBA"], modes["CMYK"], grey16, float32):
        add(image, "TIFF")
    add(modes["1"], "TIFF", compression="group4")
    add(rgb, "TIFF", big_tiff=True)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        add(modes[mode], "BMP")
    for mode in ("1", "L", "RGB"):
        add(modes[mode], "PPM")
    add(grey16.convert("I"), "PPM")
    files.append(b"P2 3 2 255\n1 2 3\n4 5 6\n")
    files.append(b"Pf 2 2 -1.0\n" + struct.pack("<4f", 0, 0.5, 1, float("nan")))
    add(rgb, "JPEG2000", irreversible=True)
    add(modes["LA"], "JPEG2000")
    add(modes["RGBA"], "ICO", sizes=[(16, 16), (32, 32)])
    add(modes["RGBA"], "QOI")
    heic = io.BytesIO()
    pillow_heif.from_pillow(rgb).save(heic, quality=50, exif=exif.tobytes())
    files.append(heic.getvalue())
    return files


def flat_png(width: int, height: int, depth: int, colour: int, rows: int) -> bytes:
    """A PNG of a size whose data, all zero, may be that of fewer rows."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    row = 1 + (width * channels * depth + 7) // 8
    packer, zeros, data = zlib.compressobj(9), bytes(min(row * max(rows, 1), 1 << 20)), b""
    left = min(row * rows, 1 << 29)
    while left > 0:
        data += packer.compress(zeros[:left])
        left -= len(zeros)
    data += packer.flush()
    parts = (
        [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"PLTE", b"\0" * 3)]
        if colour == 3
        else [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    )
    whole = b"\x89PNG\r\n\x1a\n"
    for name, body in [*parts, (b"IDAT", data), (b"IEND", b"")]:
        whole += struct.pack(">I", len(body)) + name + body + bytes(4)
    return png_repaired(whole)


def strategy() -> st.SearchStrategy[Any]:
    sides = st.sampled_from([1, 2, 3, 47, 48, 49, 1000, 4000, 9000, 13300, 16000, 70000, 2**24, 89_000_000, 2**31 - 1])
    huge = st.builds(
        lambda width, height, depth, colour, share: flat_png(
            width, height, depth, colour, int(height * share) if width * height <= 2 * 10**8 else 2
        ),
        sides, sides, st.sampled_from([1, 8, 16]), st.sampled_from([0, 2, 3, 4, 6]), st.sampled_from([0, 0.5, 1]),
    )  # fmt: skip
    data = weighted((80, damaged(seeds())), (1, huge))
    return st.fixed_dictionaries({"data": data, "budget": st.sampled_from(BUDGETS)})


def check(value: Any) -> str | None:
    processor = demo_processor()
    message = {"role": "user", "content": [{"type": "image", "image": value["data"]}]}
    try:
        prompt = processor([message], image_budget=value["budget"])
    except Exception as error:  # any: it is judged
        check_refusal(error, (MediaError,))
        return "refused"
    (run,) = prompt.media
    must(1 <= len(run) <= (value["budget"] or processor.settings.image_budget), "patches beyond the budget", len(run))
    must(run.values.dtype == np.uint8 and run.values.shape == (len(run), 48 * 48 * 3), "patches of another form")
    must(run.positions is not None and run.positions.shape == (len(run), 2), "positions of another form")
    return None
