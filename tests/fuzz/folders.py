"""Model folders like the demo's with some files in the place of its own, and what must hold of them."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .judge import Fault, check_refusal
from .judge import check as must
from .surface import DEMO, SAMPLES, CheckpointError, Sampling, generate, load

LEFT_OUT = ("samples", "README.md")
TEMPLATE = b"""{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}
{% for p in m.content %}{{ "<|image|>" if p.type == "image" else p.text }}{% endfor %}
{% endif %}<turn|>{% endfor %}<|turn>model
"""  # Google's takes a quarter of a second to compile


@contextmanager
def model_folder(files: Mapping[str, bytes | None]) -> Iterator[Path]:
    """A folder of links to the demo's files; by name (drafter/… too) other bytes, a folder (b"/"), or none."""
    files = {"chat_template.jinja": TEMPLATE} | dict(files)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        (folder / "drafter").mkdir(parents=True)
        for file in [*DEMO.iterdir(), *(DEMO / "drafter").iterdir()]:
            inside = file.relative_to(DEMO)
            if file.is_file() and str(inside) not in files and inside.name not in LEFT_OUT:
                (folder / inside).symlink_to(file)
        for inner, data in files.items():
            path = folder / inner
            if inner == "drafter" and data is not None:
                path.rmdir()
            if data == b"/":
                path.mkdir()
            elif data is not None:
                path.write_bytes(data)
        if (folder / "drafter").is_dir() and not os.listdir(folder / "drafter"):
            (folder / "drafter").rmdir()
        yield folder


def check_folder(folder: Path, with_image: bool) -> str | None:
    """It loads and answers with finite numbers, or says what is wrong with it in one line."""
    try:
        model, processor = load(folder)
    except Exception as error:  # any: it is judged
        check_refusal(error, (CheckpointError,))
        return "refused"
    content: list[dict[str, Any]] = [{"type": "text", "text": "How many?"}]
    if with_image:  # takes a second
        content.append({"type": "image", "image": str(SAMPLES / "shapes.png")})
    try:
        prompt = processor([{"role": "user", "content": content}])
        logits = np.array(model.logits(prompt)[:, -1]) if not with_image else np.zeros(1)
        reply = generate(model, processor, prompt, max_tokens=1, sampling=Sampling(seed=1))
    except Exception as error:  # any: it is judged
        check_refusal(error, (ValueError, RuntimeError))  # the second where numbers that are not finite end a reply
        return "refused"
    finally:
        mx.clear_cache()
    if not np.isfinite(logits).all():
        raise Fault("logits that are not finite, and a reply", repr(reply)[:500])
    must(reply.finish_reason in ("stop", "length"), "a reply that does not say why it ended", reply.finish_reason)
    return None
