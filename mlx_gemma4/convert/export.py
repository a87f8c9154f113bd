"""A checkpoint -> llama.cpp's files: the text model, and what reads images and sounds in a file of its own (mmproj).

The keys are those of ggml-org/llama.cpp's converter; what they say of tensors is in gguf.py.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from mlx_gemma4.config import FULL, SLIDING, ModelConfig
from mlx_gemma4.convert.gguf import (
    ARCHITECTURE,
    LAYER_NAMES,
    MEDIA_ARCHITECTURE,
    MEDIA_NAMES,
    NAMES,
    pixels_by_colour,
)
from mlx_gemma4.convert.job import Source
from mlx_gemma4.prompt.processor import find_template, optional_json
from mlx_gemma4.weights.tensors import TEXT, Rows, block_ranges

BLOCK = 32  # columns of a quantized block
NEVER_TURNS = 1e30  # what llama.cpp divides the frequencies by of dimensions that RoPE leaves alone
# The chat parser of llama.cpp reads these in the text: they are shown.
VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}

Kind = gguf.GGMLQuantizationType


def export(source: Source, folder: Path, name: str, kind: str) -> Iterator[int]:
    """Write `NAME-KIND.gguf`, and `mmproj-NAME.gguf` where there are media; yields the bytes of the source.

    kind: BF16, Q8_0 or Q4_0. folder: has the tokenizer, the template and generation_config.json, and gets the files.
    """
    assert isinstance(source.parsed, ModelConfig)
    text = {path: tensor for path, tensor in source.tensors.items() if path.startswith(TEXT)}
    media = {path: tensor for path, tensor in source.tensors.items() if not path.startswith(TEXT)}
    writer = gguf.GGUFWriter(folder / f"{name}-{kind}.gguf", ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    add_shapes(writer, source.parsed)
    add_tokenizer(writer, folder, source.parsed)
    own = source.parsed.text.attention[FULL]
    factors = np.ones(own.head_dim // 2, np.float32)
    factors[own.rotated_dims // 2 :] = NEVER_TURNS
    yield from write_tensors(writer, text, gguf.GGMLQuantizationType[kind], {"rope_freqs.weight": factors})
    if media:
        writer = gguf.GGUFWriter(folder / f"mmproj-{name}.gguf", MEDIA_ARCHITECTURE)
        writer.add_name(name)
        add_media_shapes(writer, source)
        yield from write_tensors(writer, media, Kind.BF16, {})


# --- what the files say ------------------------------------------------------------------------


def add_shapes(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    text, full, sliding = config.text, config.text.attention[FULL], config.text.attention[SLIDING]
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_block_count(len(text.layer_types))
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv([text.attention[kind].num_key_value_heads for kind in text.layer_types])
    writer.add_shared_kv_layers(0)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_sliding_window(text.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in text.layer_types])
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_rope_freq_base(full.rope_theta)
    writer.add_rope_freq_base_swa(sliding.rope_theta)
    if text.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(text.final_logit_softcapping)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    raw = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary: dict[str, int] = dict(raw["model"]["vocab"])
    added = {entry["content"]: entry for entry in raw["added_tokens"]}
    vocabulary |= {content: entry["id"] for content, entry in added.items()}
    tokens = {number: token for token, number in vocabulary.items()}
    names = [tokens.get(number, f"<unused{number}>") for number in range(config.text.vocab_size)]
    writer.add_tokenizer_model(ARCHITECTURE)
    writer.add_token_list(names)
    writer.add_token_scores([-1000.0] * len(names))  # of no use to a tokenizer of merges, and asked for
    writer.add_token_types([token_type(name, added.get(name)) for name in names])
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    writer.add_token_merges(pairs)
    for token, add in (
        ("<bos>", writer.add_bos_token_id),
        ("<eos>", writer.add_eos_token_id),
        ("<turn|>", writer.add_eot_token_id),
        ("<unk>", writer.add_unk_token_id),
        ("<pad>", writer.add_pad_token_id),
        ("<mask>", writer.add_mask_token_id),
    ):
        if token in vocabulary:
            add(vocabulary[token])
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if config.generation.suppress_tokens:
        writer.add_array("tokenizer.ggml.suppress_tokens", list(config.generation.suppress_tokens))
    template, _ = find_template(folder, optional_json(folder / "tokenizer_config.json"))
    if template is not None:
        writer.add_chat_template(template)


def token_type(name: str, added: dict[str, Any] | None) -> int:
    if name in VISIBLE:
        return int(gguf.TokenType.USER_DEFINED)
    if added is not None:
        return int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)
    is_byte = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
    return int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)


def add_media_shapes(writer: gguf.GGUFWriter, source: Source) -> None:
    """Of encoders that are none; llama.cpp asks for their sizes all the same."""
    config = source.parsed
    assert isinstance(config, ModelConfig)
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if config.vision is not None:
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_vision_projector_type("gemma4uv")
        writer.add_vision_projection_dim(config.text.hidden_size)
        writer.add_vision_image_size(224)
        writer.add_vision_patch_size(source.config["vision_config"]["patch_size"])
        writer.add_vision_embedding_length(config.vision.mm_embed_dim)
        writer.add_vision_feed_forward_length(0)
        writer.add_vision_block_count(0)
        writer.add_vision_head_count(0)
        writer.add_vision_attention_layernorm_eps(1e-6)
        writer.add_vision_image_mean([0.0, 0.0, 0.0])
        writer.add_vision_image_std([1.0, 1.0, 1.0])
    if config.audio is not None:
        writer.add_clip_has_audio_encoder(True)
        writer.add_clip_audio_projector_type("gemma4ua")
        writer.add_audio_projection_dim(config.text.hidden_size)
        writer.add_audio_embedding_length(config.audio.samples_per_token)
        writer.add_audio_feed_forward_length(0)
        writer.add_audio_block_count(0)
        writer.add_audio_head_count(0)
        writer.add_audio_num_mel_bins(128)
        writer.add_audio_attention_layernorm_eps(1e-6)


# --- tensors -----------------------------------------------------------------------------------


def gguf_name(path: str) -> str:
    """A path in the model -> llama.cpp's name; `model_path` and MEDIA_NAMES go back."""
    known = {own: name for name, own in (NAMES | MEDIA_NAMES).items() if own is not None}
    if path in known:
        return known[path]
    layer, _, part = path.removeprefix(f"{TEXT}layers.").partition(".")
    return f"blk.{layer}.{ {own: name for name, own in LAYER_NAMES.items()}[part] }"


def kind_of(path: str, tensor: Rows, kind: Kind) -> Kind:
    """Matrices by the file's kind where it fits; the embedding, which is the head too, at 8 bits at least."""
    if len(tensor.shape) != 2 or "pos_embedding" in path:
        return Kind.F32
    if kind == Kind.BF16 or tensor.shape[1] % BLOCK:
        return Kind.BF16
    return Kind.Q8_0 if path.endswith(("embed_tokens.weight", "lm_head.weight")) else kind


def write_tensors(
    writer: gguf.GGUFWriter, tensors: dict[str, Rows], kind: Kind, more: dict[str, np.ndarray]
) -> Iterator[int]:
    """Write a whole file, by blocks of rows."""
    for name, value in more.items():
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes, Kind.F32)
    for path, tensor in tensors.items():
        own = kind_of(path, tensor, kind)
        values, size = gguf.GGML_QUANT_SIZES[own]
        shape = (2, tensor.shape[0], tensor.shape[2]) if len(tensor.shape) == 3 else tensor.shape
        nbytes = prod(shape) // values * size
        writer.add_tensor_info(gguf_name(path), shape, np.dtype(np.float32), nbytes, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for value in more.values():
        file.write(value.tobytes())
        writer.write_padding(file, value.nbytes)
    for path, tensor in tensors.items():
        own, nbytes = kind_of(path, tensor, kind), 0
        for start, stop in [(0, tensor.shape[0])] if len(tensor.shape) == 3 else block_ranges(tensor):
            data = packed(as_llama_has_it(path, tensor.rows(start, stop)), own)
            file.write(data)
            nbytes += len(data)
            yield (stop - start) * prod(tensor.shape[1:]) * tensor.dtype.size
        writer.write_padding(file, nbytes)
    writer.close()


def as_llama_has_it(path: str, rows: mx.array) -> mx.array:
    """Positions by x and y first; of a pixel's colours one after the other."""
    if path.endswith("pos_embedding"):
        return rows.swapaxes(0, 1)
    if "patch_ln1" in path or path.endswith("patch_dense.weight"):
        return pixels_by_colour(rows)
    return rows


def packed(rows: mx.array, kind: Kind) -> bytes:
    if kind == Kind.BF16:
        return np.asarray(mx.contiguous(rows.astype(mx.bfloat16)).view(mx.uint16)).tobytes()
    values = np.asarray(mx.contiguous(rows.astype(mx.float32)))
    return values.tobytes() if kind == Kind.F32 else gguf.quants.quantize(values, kind).tobytes()
