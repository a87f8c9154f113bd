"""A small random checkpoint with Gemma 4's published file set, tensor names and config keys."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from toy import MEDIA, toy_tokenizer

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class Shape:
    hidden: int = 64
    mlp: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    global_head_dim: int = 32
    global_kv_heads: int = 1
    window: int = 16
    vocab: int = 512
    periods: int = 1  # of five sliding layers and a full one
    context: int = 4096


TINY = Shape()
OTHER = Shape(hidden=96, mlp=64, heads=6, kv_heads=3, global_kv_heads=2, window=24, vocab=640, periods=2)


def media_ids(shape: Shape) -> dict[str, int]:
    return {token: shape.vocab - len(MEDIA) + i for i, token in enumerate(MEDIA)}


def config(shape: Shape) -> dict:
    ids = media_ids(shape)
    text = {
        "model_type": "gemma4_unified_text",
        "attention_bias": False,
        "attention_k_eq_v": True,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": shape.global_head_dim,
        "head_dim": shape.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": shape.hidden,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": shape.mlp,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * shape.periods,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_global_key_value_heads": shape.global_kv_heads,
        "num_hidden_layers": 6 * shape.periods,
        "num_key_value_heads": shape.kv_heads,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": shape.window,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size": shape.vocab,
    }
    return {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        "text_config": text,
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "mm_embed_dim": shape.hidden,
            "mm_posemb_size": 1120,
            "model_patch_size": 48,
            "output_proj_dims": shape.hidden,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "rms_norm_eps": 1e-6,
        },
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640, "rms_norm_eps": 1e-6},
        "boi_token_id": ids["<|image>"],
        "boa_token_id": ids["<|audio>"],
        "image_token_id": ids["<|image|>"],
        "audio_token_id": ids["<|audio|>"],
        "eoi_token_id": ids["<image|>"],
        "eoa_token_index": ids["<audio|>"],
        "video_token_id": ids["<|video|>"],
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def tensors(shape: Shape, seed: int, plant: float = 1.0) -> dict[str, np.ndarray]:
    """Weights under Google's names; the same for a seed on every machine.

    plant: how strongly the layers speak against the token's own embedding. A planted drafter knows only the latter.
    """
    rng, h = np.random.default_rng(seed), shape.hidden
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, *size: int) -> None:
        weights[name] = (rng.standard_normal(size) * size[-1] ** -0.5).astype(np.float32)

    def norm(name: str, size: int, scale: float = 1.0) -> None:
        weights[name] = ((1 + 0.1 * rng.standard_normal(size)) * scale).astype(np.float32)

    root = "model.language_model"
    matrix(f"{root}.embed_tokens.weight", shape.vocab, h)
    norm(f"{root}.norm.weight", h)
    for i in range(6 * shape.periods):
        layer, full = f"{root}.layers.{i}", i % 6 == 5
        dims = shape.global_head_dim if full else shape.head_dim
        kv = (shape.global_kv_heads if full else shape.kv_heads) * dims
        matrix(f"{layer}.self_attn.q_proj.weight", shape.heads * dims, h)
        matrix(f"{layer}.self_attn.k_proj.weight", kv, h)
        if not full:
            matrix(f"{layer}.self_attn.v_proj.weight", kv, h)
        matrix(f"{layer}.self_attn.o_proj.weight", h, shape.heads * dims)
        for which in ("q_norm", "k_norm"):  # the scale is 1: unit norms would saturate the softmax
            norm(f"{layer}.self_attn.{which}.weight", dims, dims**-0.25)
        for which in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norm(f"{layer}.{which}_layernorm.weight", h, plant if which.startswith("post_") else 1.0)
        weights[f"{layer}.layer_scalar"] = np.array([0.9], np.float32)
        matrix(f"{layer}.mlp.gate_proj.weight", shape.mlp, h)
        matrix(f"{layer}.mlp.up_proj.weight", shape.mlp, h)
        matrix(f"{layer}.mlp.down_proj.weight", h, shape.mlp)
    vision, patch = "model.vision_embedder", 48 * 48 * 3
    matrix(f"{vision}.patch_dense.weight", h, patch)
    matrix(f"{vision}.pos_embedding", 1120, 2, h)
    for name, size in (("patch_ln1", patch), ("patch_ln2", h), ("pos_norm", h)):
        norm(f"{vision}.{name}.weight", size)
        weights[f"{vision}.{name}.bias"] = (0.1 * rng.standard_normal(size)).astype(np.float32)
    weights[f"{vision}.patch_dense.bias"] = (0.1 * rng.standard_normal(h)).astype(np.float32)
    matrix("model.embed_vision.embedding_projection.weight", h, h)
    matrix("model.embed_audio.embedding_projection.weight", h, 640)
    return weights


def drafter_config(shape: Shape) -> dict:
    """As the published assistant's: a decoder's config of its own in the target's config.json."""
    target = config(shape)
    text = target["text_config"] | {
        "final_logit_softcapping": None,
        "hidden_size": shape.hidden // 2,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "vocab_size_per_layer_input": 0,
    }
    media = ("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index", "image_token_id", "audio_token_id")
    return {
        "architectures": ["Gemma4UnifiedAssistantForCausalLM"],
        "model_type": "gemma4_unified_assistant",
        "backbone_hidden_size": shape.hidden,
        "centroid_intermediate_top_k": 32,
        "num_centroids": 2048,
        "text_config": text,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": False,
        "dtype": "float32",
    } | {key: target[key] for key in media}


def drafter_tensors(shape: Shape, seed: int, target: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """A drafter's weights under Google's names, queries only.

    Planted on a target's weights, it reads its newest token in half of that one's embedding space and scores in the
    same half, so that it agrees with a target whose layers say little.
    """
    rng, h, d = np.random.default_rng([seed, 1]), shape.hidden, shape.hidden // 2
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, *size: int, scale: float = 1.0) -> None:
        weights[name] = (rng.standard_normal(size) * scale * size[-1] ** -0.5).astype(np.float32)

    def norm(name: str, size: int, scale: float = 1.0) -> None:
        weights[name] = ((1 + 0.1 * rng.standard_normal(size)) * scale).astype(np.float32)

    matrix("model.embed_tokens.weight", shape.vocab, d)
    norm("model.norm.weight", d)
    for i in range(4):
        layer, dims = f"model.layers.{i}", shape.global_head_dim if i == 3 else shape.head_dim
        matrix(f"{layer}.self_attn.q_proj.weight", shape.heads * dims, d)
        norm(f"{layer}.self_attn.q_norm.weight", dims, dims**-0.25)
        matrix(f"{layer}.self_attn.o_proj.weight", d, shape.heads * dims)
        for which in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norm(f"{layer}.{which}_layernorm.weight", d, 0.1 if target and which.startswith("post_") else 1.0)
        weights[f"{layer}.layer_scalar"] = np.array([0.9], np.float32)
        matrix(f"{layer}.mlp.gate_proj.weight", shape.mlp, d)
        matrix(f"{layer}.mlp.up_proj.weight", shape.mlp, d)
        matrix(f"{layer}.mlp.down_proj.weight", d, shape.mlp)
    matrix("pre_projection.weight", d, 2 * h)
    matrix("post_projection.weight", h, d)
    if target:
        half = np.linalg.qr(rng.standard_normal((h, d)))[0].astype(np.float32)  # [h, d], orthonormal columns
        matrix("pre_projection.weight", d, 2 * h, scale=0.2)
        weights["pre_projection.weight"][:, :h] = half.T
        weights["model.embed_tokens.weight"] = target["model.language_model.embed_tokens.weight"] @ half
        weights["post_projection.weight"] = half
    return weights


def write_drafter(
    folder: Path, shape: Shape = TINY, seed: int = 0, target_weights: dict[str, np.ndarray] | None = None,
    planted: bool = False, dtype: "mx.Dtype | None" = None,
) -> Path:  # fmt: skip
    """Write a drafter's folder, in float32 if nothing else is asked for, and return it."""
    import mlx.core as mx

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(drafter_config(shape), indent=2))
    made = drafter_tensors(shape, seed, target_weights if planted else None)
    weights = {name: mx.array(value).astype(dtype or mx.float32) for name, value in made.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def write_checkpoint(
    folder: Path, shape: Shape = TINY, seed: int = 0, dtype: "mx.Dtype | None" = None, plant: float = 1.0
) -> Path:
    """Write the whole model folder, in float32 if nothing else is asked for, and return it."""
    import mlx.core as mx  # here: make_golden.py needs the rest of this file where there is no MLX

    from mlx_gemma4.prompt.processor import PACKAGED_TEMPLATE

    folder.mkdir(parents=True, exist_ok=True)
    ids = media_ids(shape)
    generation = {
        "bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106, 50], "temperature": 1.0, "top_k": 64,
        "top_p": 0.95, "suppress_tokens": sorted(ids.values()),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    (folder / "chat_template.jinja").write_bytes(PACKAGED_TEMPLATE.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))
    toy_tokenizer(shape.vocab).save(str(folder / "tokenizer.json"))
    weights = {name: mx.array(value).astype(dtype or mx.float32) for name, value in tensors(shape, seed, plant).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder
