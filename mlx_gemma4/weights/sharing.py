"""Which part of a checkpoint's tensors one of several machines reads."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from mlx_gemma4.config import FULL, TextConfig
from mlx_gemma4.model.split import LAYER as ANY_LAYER
from mlx_gemma4.model.split import MEDIA, LayerShare, Share, last_sliding, layer_shares, shares
from mlx_gemma4.weights.tensors import EMBEDDING, HEAD, Own, Tensor

Known = TypeVar("Known")
LAYER = re.compile(r"language_model\.layers\.(\d+)\.\w+\.(\w+_proj)\.(\w+)")
DOWN = re.compile(r"language_model\.layers\.\d+\.mlp\.down_proj\.scales")


def columns_together(text: TextConfig, tensors: Mapping[str, Tensor]) -> int:
    """How many columns of the MLP share a scale, and stay on one machine."""
    counts = [tensor.shape[1] for path, tensor in tensors.items() if DOWN.fullmatch(path)]
    return text.intermediate_size // min(counts, default=text.intermediate_size)


def shares_by(
    split: str, text: TextConfig, tensors: Mapping[str, Tensor], memories: Sequence[int]
) -> Sequence[Share | LayerShare]:
    """Of all machines, in proportion to what each may hold. ValueError if the model cannot be shared so."""
    if split == "layers":
        return layer_shares(text, memories, *sizes_of(tensors, text))
    return shares(text, memories, columns_together(text, tensors))


def sizes_of(tensors: Mapping[str, Tensor], text: TextConfig) -> tuple[list[int], tuple[int, int]]:
    """Bytes of each layer, and of what the first and the last of machines that share layers hold besides."""
    sizes, first, last = [0] * len(text.layer_types), 0, 0
    for path, tensor in tensors.items():
        if match := ANY_LAYER.match(path):
            sizes[int(match[1])] += tensor.nbytes
        else:
            first += tensor.nbytes * path.startswith((*MEDIA, EMBEDDING))
            last += tensor.nbytes * (not path.startswith(MEDIA))
    return sizes, (first, last)


def shared(tensors: Mapping[str, Own], share: Share | LayerShare, text: TextConfig) -> dict[str, Own]:
    """What one machine reads of a model or an adapter, by the paths there. text: the whole decoder's."""
    if isinstance(share, LayerShare):
        return here(tensors, share)
    return {path: part_of(path, tensor, share, text) for path, tensor in tensors.items()}


def read_a_token(tensors: Mapping[str, Tensor], share: Share | LayerShare, machines: int) -> int:
    """Bytes of weights that one of several machines reads for each token, the drafter's not among them."""
    head = sum(own.nbytes for path, own in tensors.items() if path.startswith(HEAD))
    head = head or sum(own.nbytes for path, own in tensors.items() if path.startswith(EMBEDDING))
    part = 1 / machines if isinstance(share, Share) else float(share.is_last)
    return sum(own.nbytes for path, own in tensors.items() if ANY_LAYER.match(path)) + int(head * part)


def here(by_path: Mapping[str, Known], share: LayerShare) -> dict[str, Known]:
    """Of what is known of tensors or modules, what is on one machine, by the paths there."""
    return {own: found for path, found in by_path.items() if (own := share.path_here(path)) is not None}


def part_of(path: str, tensor: Own, share: Share, text: TextConfig) -> Own:
    match = LAYER.fullmatch(path)
    if match is None:
        return tensor
    layer, matrix, name = int(match[1]), match[2], match[3]
    if name == ("lora_b" if matrix in ("o_proj", "down_proj") else "lora_a"):  # which has not what is shared
        return tensor
    if name == "gain" and matrix in ("o_proj", "down_proj"):
        raise ValueError(
            f"the adapter is DoRA's, and no machine has whole rows of {matrix}; expected it fused, or LoRA"
        )
    kind = text.layer_types[layer]
    dims = text.attention[kind].head_dim
    first, last = share.queries(text)
    if matrix == "q_proj":
        return tensor.part_of_rows(first * dims, last * dims)
    if matrix == "o_proj":
        return part_of_columns(tensor, first * dims, last * dims, text.num_attention_heads * dims)
    if matrix == "down_proj":
        return part_of_columns(tensor, *share.columns, text.intermediate_size)
    if matrix in ("gate_proj", "up_proj"):
        return tensor.part_of_rows(*share.columns)
    if kind == FULL or layer == last_sliding(text):  # k_proj and v_proj
        return tensor
    return tensor.part_of_rows(share.heads[0] * dims, share.heads[1] * dims)


def part_of_columns(tensor: Own, first: int, last: int, total: int) -> Own:
    """Of a matrix with `total` columns, packed or not, or of its scales."""
    stored = tensor.shape[1]
    return tensor.part_of_columns(first * stored // total, last * stored // total)
