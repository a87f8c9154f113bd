"""What is trained: mlx-lm's LoRA or DoRA layers around the decoder's matrices and the projections of media."""

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_gemma4.errors import shown
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import optional_json
from mlx_gemma4.tune.settings import Adapter
from mlx_gemma4.tune.state import flat
from mlx_gemma4.weights.adapter import CONFIG, read_weights

PROJECTION = "embedding_projection"
KINDS = {"lora": LoRALinear.from_base, "dora": DoRALinear.from_base}
DORA_BITS = (2, 4, 8)  # mlx-lm's DoRA takes the columns of matrices at 3, 5 and 6 bits for fewer than they are


def attach(model: Model, adapter: Adapter, media: Iterable[str], seed: int) -> None:
    """Freeze a model and put an adapter's layers, which can be trained, around its matrices.

    model: loaded, not arranged. media: of "image" and "audio", those whose projection is adapted.
    """
    model.freeze()
    decoder = model.language_model
    linear = (nn.Linear, nn.QuantizedLinear)
    owners = {"image": "embed_vision", "audio": "embed_audio"}
    own = {name for layer in decoder.layers for name, part in layer.named_modules() if isinstance(part, linear)}
    if adapter.fine_tune_type == "dora":
        check_dora(decoder)
    around = KINDS[adapter.fine_tune_type]
    mx.random.seed(seed)
    settings = {"rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0, "keys": sorted(own)}
    linear_to_lora_layers(decoder, adapter.num_layers, settings, adapter.fine_tune_type == "dora")
    for name in (owners[kind] for kind in sorted(media)):
        model[name][PROJECTION] = around(model[name][PROJECTION], adapter.rank, scale=adapter.scale)
    mx.eval(model.trainable_parameters())


def begin_with(model: Model, file: Path, scale: float) -> None:
    """Start from the weights in an adapter's file; ValueError unless they are those that are trained here."""
    settings = optional_json(file.with_name(CONFIG)).get("lora_parameters")
    theirs = settings.get("scale") if isinstance(settings, dict) else None
    if theirs not in (None, scale):  # the same weights would say something else
        raise ValueError(f"scale is {scale:g} and that of {file} {shown(theirs)}; expected the same --scale")
    found, own = read_weights(file), dict(flat(model.trainable_parameters()))
    for path in sorted(own.keys() ^ found.keys()):
        where = "is not in the file" if path in own else "is in the file and is not trained here"
        raise ValueError(f"{file}: {path} {where}; expected an adapter of the same matrices")
    for path, value in own.items():
        if found[path].shape != value.shape:
            got, wanted = list(found[path].shape), list(value.shape)
            raise ValueError(f"{file}: {path} has the shape {got}; expected {wanted}: the same --rank and model")
        if not mx.isfinite(found[path]).all().item():
            raise ValueError(f"{file}: {path} is not finite; expected an adapter of sound numbers")
    model.load_weights(list(found.items()), strict=False)


def check_dora(decoder: nn.Module) -> None:
    for name, part in decoder.named_modules():
        if isinstance(part, nn.QuantizedLinear) and part.bits not in DORA_BITS:
            raise ValueError(
                f"{name} has {part.bits} bits, where mlx-lm's DoRA is wrong; expected lora, or weights at 4 or 8 bits"
            )
