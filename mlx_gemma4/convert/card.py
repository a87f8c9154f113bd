"""The model card of a conversion, and the figures that it shows."""

import os.path
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_gemma4.config import ModelConfig, expanded, read_json
from mlx_gemma4.terminal import size_text

BASE_MODEL = "google/gemma-4-12B-it"  # of a folder that does not say what it is
HUB_ID = r"[\w.-]+/[\w.-]+"
CARD = "README.md"
NOT_MEASURED = "Quality: not measured."  # the line that an evaluation replaces

FRONT_MATTER = """\
---
language: en
library_name: mlx
license: apache-2.0
pipeline_tag: image-text-to-text
{base}tags:
- mlx
- gemma4
---
"""
TEMPLATE = """\
{front_matter}
# {name}

{source}, converted to MLX by mlx_gemma4.

- Recipe: {recipe}
- Size: {size}
- {quality}

{inputs} in; text out, with mlx_gemma4:

```sh
mlx_gemma4.generate --model {name} {request}
```
"""
OTHERS = """
It loads in mlx-vlm too, and in what builds on it:

```sh
mlx_vlm.generate --model {name} {request}
```
"""


@dataclass(frozen=True)
class Figures:
    """How large a conversion became."""

    nbytes: int
    weights: int  # values, before they were packed

    @property
    def text(self) -> str:
        return f"{size_text(self.nbytes)}, {8 * self.nbytes / max(1, self.weights):.2f} bits a weight"


def name_of(path_or_hub_id: str) -> str:
    """What a card calls a model or a file: the last name of its path, also where that is `.`, or its hub id."""
    path = expanded(path_or_hub_id)
    return os.path.basename(os.path.abspath(path)) if path.exists() else path_or_hub_id


def base_of(folder: Path) -> str:
    """The hub id of the model in a folder: as its card, its config.json or the hub's cache have it."""
    card, config = folder / CARD, folder / "config.json"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    matter = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
    said = re.search(r"^base_model:\s*(?:-\s*)?[\"']?([^\s\"'\[\],]+)", matter[1], re.MULTILINE) if matter else None
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{folder.absolute().as_posix()}/")
    names = [
        "/".join(cached.groups()) if cached else None,
        said[1] if said else None,
        read_json(config).get("_name_or_path") if config.is_file() else None,
    ]
    return next((name for name in names if isinstance(name, str) and re.fullmatch(HUB_ID, name)), BASE_MODEL)


def front_matter(base_model: str | None) -> str:
    """What mlx-community and mlx-vlm write, so that the hub lists a conversion among those of its base model."""
    return FRONT_MATTER.format(base=f"base_model: {base_model}\n" if base_model else "")


def write_card(
    folder: Path, name: str, source: str, base_model: str | None, recipe: str, target: Figures, drafter: Figures | None,
    config: ModelConfig,
) -> None:  # fmt: skip
    """Write the README.md of a model folder. `name` is what it will be called, `source` what it was made from."""
    media = {"images": config.vision, "audio": config.audio, "video": config.vision}
    request = '--prompt "What is this?" --image photo.jpg' if config.vision else '--prompt "What is the sea?"'
    text = TEMPLATE + OTHERS * config.text.tie_word_embeddings  # for a head of its own mlx-vlm has no place
    size = target.text + (f"; the drafter in `drafter/`: {drafter.text}" if drafter else "")
    text = text.format(
        front_matter=front_matter(base_model), name=name, source=source, recipe=recipe, size=size, quality=NOT_MEASURED,
        inputs=", ".join(["Text", *(name for name, own in media.items() if own is not None)]), request=request,
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")
