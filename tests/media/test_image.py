"""Images → upright RGB → patches."""

import contextlib
import json
import math
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import mlx_gemma4.media.image as image_module
from mlx_gemma4.errors import MediaError
from mlx_gemma4.media.image import IMAGE_BUDGETS, check_budget, cut, fitted, image_size, is_heic, read_image

SIDE = 48
GOLDEN = json.loads((Path(__file__).parents[1] / "data/image_sizes.json").read_text())


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient() -> Image.Image:
    """Left to right from black to red, top to bottom to green: smooth, so that lossy formats keep it, and lopsided."""
    y, x = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([x * 4, y * 5, x * 0], -1).astype(np.uint8))


def saved(image: Image.Image, format: str, exif: Image.Exif | None = None) -> bytes:
    file = BytesIO()
    image.save(file, format, exif=exif or Image.Exif())
    return file.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    assert (a.mode, a.size) == (b.mode, b.size)
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


@pytest.mark.parametrize("budget", [0, 69, 300, 1121])
def test_a_budget_outside_the_five_is_an_error(budget: int) -> None:
    message = f"^image_budget is {budget}; expected one of 70, 140, 280, 560, 1120$"
    with pytest.raises(ValueError, match=message):
        check_budget(budget)
    with pytest.raises(ValueError, match=message):
        image_size(100, 100, budget, SIDE)


def test_sizes_equal_the_reference_ones() -> None:
    assert len(GOLDEN) == 200
    for height, width, budget, new_height, new_width in GOLDEN:
        assert image_size(height, width, budget, SIDE) == (new_height, new_width)


sizes = st.integers(1, 100_000)


@given(sizes, sizes, st.sampled_from(IMAGE_BUDGETS), st.sampled_from([16, 48]))
def test_sizes_are_whole_patches_within_the_budget_at_the_same_aspect(h: int, w: int, budget: int, side: int) -> None:
    new_h, new_w = image_size(h, w, budget, side)
    rows, columns = new_h / side, new_w / side
    assert rows == int(rows) >= 1 and columns == int(columns) >= 1
    assert rows * columns <= budget
    ideal_rows, ideal_columns = math.sqrt(budget * h / w), math.sqrt(budget * w / h)
    if min(ideal_rows, ideal_columns) > 1.001:  # else one side is a single patch
        assert -0.001 <= ideal_rows - rows <= 1 and -0.001 <= ideal_columns - columns <= 1


@given(sizes, sizes, st.sampled_from(IMAGE_BUDGETS))
def test_sizes_of_a_turned_image_are_turned(h: int, w: int, budget: int) -> None:
    assert image_size(h, w, budget, SIDE) == image_size(w, h, budget, SIDE)[::-1]


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([70, 140]))
def test_patches_put_together_are_the_resized_image(h: int, w: int, budget: int) -> None:
    side = 8
    image = noise(h, w)
    patches, positions = cut(fitted(image, budget, side), side)
    new_h, new_w = image_size(h, w, budget, side)
    assert len(patches) == new_h * new_w // side**2 <= budget
    assert patches.shape == (len(patches), side * side * 3) and patches.dtype == np.uint8
    assert positions.shape == (len(patches), 2) and positions.dtype == np.int32
    whole = np.zeros((new_h, new_w, 3), np.uint8)
    for pixels, (x, y) in zip(patches, positions, strict=True):
        whole[y * side : (y + 1) * side, x * side : (x + 1) * side] = pixels.reshape(side, side, 3)
    assert np.array_equal(whole, np.asarray(image.resize((new_w, new_h), Image.Resampling.BICUBIC)))


def test_an_image_of_the_right_size_is_not_resized_and_goes_row_by_row() -> None:
    image = noise(672, 960)
    patches, positions = cut(fitted(image, 280, SIDE), SIDE)
    assert positions[:21].tolist() == [*([x, 0] for x in range(20)), [0, 1]]
    assert np.array_equal(patches[21].reshape(SIDE, SIDE, 3), np.asarray(image)[48:96, 48:96])


def test_all_ways_to_give_an_image_agree(tmp_path: Path) -> None:
    image = noise(5, 7)
    data = saved(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (image, data, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()):
        assert difference(read_image(source), image) == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    upright = gradient()
    stored = {  # what a camera saves, by the EXIF standard's words for where row 0 and column 0 are
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, format, exif)
    assert difference(read_image(data), upright) < 4
    assert difference(read_image(Image.open(BytesIO(data))), upright) < 4


def test_transparency_is_laid_on_white() -> None:
    rgba = Image.new("RGBA", (4, 1))
    rgba.putdata([(9, 8, 7, 255), (9, 8, 7, 0), (0, 0, 0, 128), (255, 0, 0, 51)])
    white = [(9, 8, 7), (255, 255, 255), (127, 127, 127), (255, 204, 204)]
    for source in (rgba, saved(rgba, "PNG"), saved(rgba, "TIFF")):
        assert list(read_image(source).get_flattened_data()) == white
    la = Image.new("LA", (2, 1))
    la.putdata([(9, 255), (9, 0)])
    pa = Image.new("PA", (2, 1))
    pa.putpalette([9, 9, 9])
    pa.putdata([(0, 255), (0, 0)])
    for source in (la, pa, saved(la, "PNG"), la.convert("La"), la.convert("RGBA").convert("RGBa")):
        assert list(read_image(source).get_flattened_data()) == [(9, 9, 9), (255, 255, 255)]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(format: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert list(read_image(saved(image, format)).get_flattened_data()) == [(10, 20, 30), (40, 50, 60)]
    image.info["transparency"] = 0
    assert list(read_image(saved(image, format)).get_flattened_data()) == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize(
    ("bits", "colour_type", "pixels", "transparent", "expected"),
    [
        (1, 0, b"\x80", [1], [255, 0]),
        (2, 0, b"\x60", [1], [255, 170]),
        (4, 0, b"\x23", [2], [255, 51]),
        (8, 0, b"\x02\x34", [2], [255, 52]),
        (16, 0, b"\x03\xe8\x75\x30", [1000], [255, 117]),
        (16, 2, b"\x03\xe8\x03\xe8\x03\xe8\xe8\xe8\xe8\xe8\xe8\xe8", [1000] * 3, [255, 232]),
    ],
)
def test_a_transparent_grey_or_colour_of_any_depth_is_white(
    bits: int, colour_type: int, pixels: bytes, transparent: list[int], expected: list[int]
) -> None:
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour_type, 0, 0, 0)),
        (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
        (b"IDAT", zlib.compress(b"\0" + pixels)),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    image = read_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


def test_opaque_alpha_changes_nothing() -> None:
    image = noise(9, 9)
    assert difference(read_image(image.convert("RGBA")), image) == 0


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    values = np.array([[0, 128, 129, 257, 300 * 100, 65535]])
    image = Image.new(mode, (6, 1))
    image.putdata(values[0].tolist())
    expected = np.rint(values[0] / 257).astype(int).tolist()
    assert np.asarray(read_image(image))[0, :, 0].tolist() == expected
    png = saved(Image.fromarray(values.astype(np.uint16)), "PNG")
    assert np.asarray(read_image(png))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.uint32])
def test_grey_of_wide_integers_that_holds_8_bits_is_not_scaled(dtype: type) -> None:
    values = [0, 1, 128, 255]
    image = Image.fromarray(np.array([values], dtype))
    assert np.asarray(read_image(image))[0, :, 0].tolist() == values == list(image.convert("L").get_flattened_data())
    grey = Image.fromarray(np.array([values], np.uint8))
    for mode, format in (("I", "TIFF"), ("I;16", "TIFF"), ("I;16", "PNG")):
        assert np.asarray(read_image(saved(grey.convert(mode), format)))[0, :, 0].tolist() == values


def test_float_grey_is_0_to_1_or_0_to_255() -> None:
    for values in ([0, 0.5, 1], [0, 127.6, 255], [-5, 127.6, 300]):
        image = Image.fromarray(np.array([values], np.float32))
        assert np.asarray(read_image(image))[0, :, 0].tolist() == [0, 128, 255]
    for bad in (np.nan, np.inf):
        with pytest.raises(MediaError, match=r"^image of mode F and 2 x 1 pixels has pixels that are NaN or infinite$"):
            read_image(Image.fromarray(np.array([[0, bad]], np.float32)))


def test_other_colour_spaces_become_rgb() -> None:
    image = gradient()
    assert difference(read_image(saved(image.convert("CMYK"), "JPEG")), image) < 4
    assert difference(read_image(image.convert("YCbCr")), image) < 2
    assert difference(read_image(image.convert("HSV")), image) < 2
    grey = ImageOps.grayscale(image)
    assert difference(read_image(saved(grey, "PNG")), grey.convert("RGB")) == 0
    black_and_white = image.convert("1")
    assert difference(read_image(saved(black_and_white, "PNG")), black_and_white.convert("RGB")) == 0
    lab = Image.merge("LAB", [Image.new("L", (1, 1), value) for value in (137, 128, 128)])  # L* = 53.7, no colour
    assert difference(read_image(lab), Image.new("RGB", (1, 1), (128, 128, 128))) <= 2


def test_an_animation_shows_its_first_frame() -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for format in ("GIF", "PNG", "WEBP"):
        file = BytesIO()
        first.save(file, format, save_all=True, append_images=[second], lossless=True)
        assert read_image(file.getvalue()).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic_is_read_upright(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    turns = {1: 0, 3: 180, 6: 90, 8: 270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = gradient().rotate(turns[orientation], expand=True)
    heic = pillow_heif.from_pillow(stored)
    heic.info["exif"] = exif.tobytes()  # saved with both the EXIF orientation and HEIF's own rotation, as phones do
    file = BytesIO()
    heic.save(file, quality=90)
    assert (b"irot" in file.getvalue()) == (orientation != 1)
    assert is_heic(file.getvalue())
    assert difference(read_image(file.getvalue()), gradient()) < 4


def test_heic_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(MediaError) as caught:
        read_image(data)
    assert str(caught.value) == (
        'image of 124 bytes needs pillow_heif: pip install "mlx_gemma4[video]"; '
        "or convert it: sips -s format jpeg photo.heic --out photo.jpg"
    )


@pytest.mark.parametrize(
    ("brands", "heic"),
    [(b"heic....mif1", 1), (b"mif1....heic", 1), (b"mif1....miaf", 1), (b"mif1....avif", 0), (b"avif....mif1", 0),
     (b"isom....mp42", 0)],
)  # fmt: skip
def test_heic_is_told_from_avif(brands: bytes, heic: int) -> None:
    assert is_heic(b"\0\0\0\x14ftyp" + brands + b"heic") == bool(heic)  # what follows the box does not count


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's about damaged TIFF
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_an_error(format: str, tmp_path: Path) -> None:
    data = saved(noise(40, 50), format)
    for length in (len(data) // 2, 30, 5):
        (tmp_path / "x.bin").write_bytes(data[:length])
        with pytest.raises(MediaError, match=r"^image '.*x\.bin' (cannot be read: .|is no image known here; )"):
            read_image(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.data())
def test_a_damaged_file_is_read_or_an_error_of_one_line(data: st.DataObject) -> None:
    file = bytearray(saved(noise(8, 8), data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))))
    for place in data.draw(st.lists(st.integers(0, len(file) - 1), max_size=5)):
        file[place] = data.draw(st.integers(0, 255))
    try:
        assert read_image(bytes(file)).mode == "RGB"
    except MediaError as error:
        assert "\n" not in str(error)


def test_jpeg_2000_that_pillow_reads_wrongly_is_an_error() -> None:
    wide = np.full((48, 64), 65535, np.uint16)
    assert read_image(saved(Image.fromarray(wide), "JPEG2000")).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "LA", "RGB", "RGBA"):
        white = Image.new(mode, (64, 48), "white")
        data = saved(white, "JPEG2000")
        assert read_image(data).getpixel((0, 0)) == (255, 255, 255)
        place = data.index(b"\xff\x4f\xff\x51") + 42  # the first channel's depth
        with pytest.raises(
            MediaError, match=r"is JPEG 2000 of 12 bits a channel, of which Pillow reads white as black"
        ):
            read_image(data[:place] + b"\x0b" + data[place + 1 :])


def test_an_image_without_pixels_is_an_error() -> None:
    with pytest.raises(MediaError, match=r"^image of mode RGB and 0 x 5 pixels has no pixels$"):
        read_image(Image.new("RGB", (0, 5)))


def test_a_decompression_bomb_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(noise(40, 50), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(MediaError, match=r"^image of \d+ bytes has more than 178 million pixels; expected fewer"):
        read_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # between this and twice as many Pillow warns
    assert read_image(data).size == (50, 40)


def test_a_file_that_is_no_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(MediaError, match=r"^image '.*x\.png' is no image known here; expected PNG, .* or HEIC$"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_put_together_are_the_whole(mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(30, 45)
    if mode in ("I;16", "I", "F"):
        values = np.random.default_rng(0).integers(0, 256, (30, 45))
        image = Image.fromarray({"I;16": (values * 257).astype(np.uint16), "I": (values * 257).astype(np.int32),
                                 "F": (values / 255).astype(np.float32)}[mode])  # fmt: skip
    else:
        image = image.convert(mode)
    image.getexif()[0x0112] = orientation
    whole = read_image(image)
    monkeypatch.setattr(image_module, "BAND", 45 * 4)
    assert difference(read_image(image), whole) == 0
    monkeypatch.setattr(image_module, "LARGE", 30 * 45 // 4)  # three in a row become one
    halved = read_image(image)
    assert halved.size == tuple(side // 3 for side in whole.size)
    assert difference(halved, ImageOps.exif_transpose(image).convert("RGB").reduce(3)) < 2 or mode in ("I;16", "I", "F")


def test_a_large_jpeg_is_halved_while_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "LARGE", 1000)
    assert read_image(saved(gradient(), "JPEG")).size == (32, 24)


def test_what_would_take_more_than_a_gigabyte_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MOST_BYTES", 18 * 1000)
    for format in ("WEBP", "AVIF"):
        with pytest.raises(MediaError, match=rf"\({format}\) has 64 x 48 pixels; expected at most 1000 in all of this"):
            read_image(saved(gradient(), format))
    monkeypatch.setattr(image_module, "MOST_IN_PYTHON", 1000)
    with pytest.raises(MediaError, match=r"\(QOI\) has 64 x 48 pixels; expected at most .* in this slow format"):
        read_image(saved(gradient(), "QOI"))


@pytest.mark.parametrize("size", [(89_000_000, 2), (2, 89_000_000)])
def test_a_side_beyond_all_bounds_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match=rf"^image .* is {size[0]} x {size[1]} pixels; expected sides of at most"):
        read_image(saved(Image.new("1", size), "PNG"))


def test_a_size_that_the_data_cannot_back_is_an_error() -> None:
    for format in ("TIFF", "JPEG"):
        data = bytearray(saved(gradient(), format))
        if format == "JPEG":
            place = data.index(b"\xff\xc0") + 5
            data[place : place + 4] = (10_000).to_bytes(2, "big") * 2
        else:
            place = int.from_bytes(data[4:8], "little")
            entries = range(place + 2, place + 2 + 12 * data[place], 12)
            at = next(entry for entry in entries if data[entry : entry + 2] == b"\x01\x01")  # ImageLength
            data[at + 2 : at + 12] = b"\x04\x00\x01\x00\x00\x00" + (400_000).to_bytes(4, "little")
        with pytest.raises(
            MediaError, match=r" says that it is .* pixels; its \d+ bytes hold fewer$| cannot be read: "
        ):
            read_image(bytes(data))


@pytest.mark.parametrize("budget", [70.0, np.array([70, 140]), True, 10**400, 10**5000, None, "70"], ids=[*"abcdefg"])
def test_a_budget_of_another_type_is_an_error_of_one_line(budget: int) -> None:
    with pytest.raises(ValueError, match=r"^image_budget is .*; expected one of 70, 140, 280, 560, 1120$") as caught:
        check_budget(budget)
    assert len(str(caught.value)) < 200


def test_libtiff_and_pillow_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    file = BytesIO()
    noise(40, 50).save(file, "TIFF", compression="tiff_lzw")
    data = file.getvalue()
    for place in range(8, 400, 3):
        with contextlib.suppress(MediaError):
            read_image(data[:place] + b"\xff" + data[place + 1 :])
    at = data.index(b"\x15\x01\x03\x00")  # SamplesPerPixel, SHORT
    with contextlib.suppress(MediaError):
        read_image(data[: at + 8] + b"\x03\x14" + data[at + 10 :])
    assert capfd.readouterr() == ("", "")
