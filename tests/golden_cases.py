"""The prompts that tests/data/golden.npz answers, made from seeds. Imports no MLX, for make_golden.py does without."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from toy_checkpoint import OTHER, TINY, Shape, media_ids

GOLDEN = Path(__file__).with_name("data") / "golden.npz"
CHECKPOINTS = {"tiny": (TINY, 0), "other": (OTHER, 1)}  # shape and seed, as the fixtures of these names have them
IMAGE_BUDGET = 70
EVERY = 32  # of each position's logits every 32nd is kept, of the last position's all
GREEDY_TOKENS = 20

# A prompt as its runs: so many tokens of text or sound, or an image or a frame of so many columns and rows.
# The windows are 16 and 24, so some blocks are longer than them.
LAYOUTS: dict[str, list[tuple[Any, ...]]] = {
    "text": [("text", 21)],
    "text_of_four_windows": [("text", 101)],
    "image": [("text", 4), ("image", 3, 2), ("text", 9)],
    "image_at_the_start_and_the_end": [("image", 5, 2), ("text", 30), ("image", 2, 3)],
    "image_longer_than_the_window": [("text", 12), ("image", 6, 5), ("text", 11)],
    "two_images_with_text_between": [("text", 3), ("image", 4, 4), ("text", 5), ("image", 2, 5), ("text", 40)],
    "sound": [("text", 2), ("audio", 20), ("text", 7)],
    "sound_then_image_then_frames": [
        ("audio", 7), ("text", 3), ("image", 3, 3), ("video", 4, 2), ("text", 2), ("video", 2, 4), ("text", 6),
    ],
    "frames_then_image_then_sound": [
        ("video", 7, 2), ("video", 2, 7), ("text", 20), ("image", 1, 5), ("text", 3), ("audio", 18), ("image", 3, 1),
        ("text", 4),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of soft tokens, numbers only: what `SoftTokens` holds."""

    kind: str
    start: int
    values: np.ndarray  # [n, 6912] uint8 or [n, 640] float32
    positions: np.ndarray | None  # [n, 2] as (x, y)


def layout(name: str, shape: Shape) -> tuple[list[int], list[Run]]:
    return lay_out(LAYOUTS[name], shape, generator(name))


def lay_out(runs: list[tuple[Any, ...]], shape: Shape, rng: np.random.Generator) -> tuple[list[int], list[Run]]:
    """The token ids of runs as LAYOUTS has them, placeholders and their brackets included, and the media, at random."""
    ids = media_ids(shape)
    tokens: list[int] = []
    media = []
    for kind, *size in runs:
        if kind == "text":
            tokens += rng.integers(110, min(ids.values()), size[0]).tolist()
            continue
        bracket = "audio" if kind == "audio" else "image"
        n = int(np.prod(size))
        if kind == "audio":
            values, positions = sound(n * 640, rng).reshape(n, 640), None
        else:
            values = rng.integers(0, 256, (n, 48 * 48 * 3), dtype=np.uint8)
            positions = np.stack([np.arange(n) % size[0], np.arange(n) // size[0]], axis=-1).astype(np.int32)
        media.append(Run(kind, len(tokens) + 1, values, positions))
        tokens += [ids[f"<|{bracket}>"], *[ids[f"<|{kind}|>"]] * n, ids[f"<{bracket}|>"]]
    return tokens, media


def chats() -> dict[str, list[dict[str, Any]]]:
    """Chat messages with PIL images of exactly the budget's size, which are not resized, and sounds of 16 kHz."""
    rng = generator("chats")
    text = {"type": "text", "text": "what is the quick one?"}
    image = {"type": "image", "image": picture(480, 336, rng)}
    tall = {"type": "image", "image": picture(240, 672, rng)}
    audio = {"type": "audio", "audio": (sound(9000, rng), 16000)}
    video = {"type": "video", "video": [picture(336, 480, rng) for _ in range(2)], "fps": 0.5}
    answer = [{"role": "assistant", "content": "the model"}, {"role": "user", "content": "go on"}]
    return {
        "chat": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo, who are you?"}],
        "chat_about_images": [{"role": "user", "content": [text, image, {"type": "text", "text": "and"}, tall]}],
        "chat_about_all": [{"role": "user", "content": [audio, tall, text, video]}, *answer],
    }


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def picture(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Coloured blocks of 12 pixels."""
    blocks = rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(12, axis=0).repeat(12, axis=1))


def sound(samples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-0.5, 0.5, samples).astype(np.float32)
