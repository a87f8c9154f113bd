"""The demo's files beside its weights: configs with the published keys, the chat template, the tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_gemma4.prompt.processor import PACKAGED_TEMPLATE
from training.films import FRAMES
from training.tokens import CONTROL, MEDIA, media_ids, save_tokenizer

HIDDEN = 256
BUDGET = 70  # soft tokens a picture and a frame
DRAFTER_HIDDEN = 128


def text_config(vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "gemma4_unified_text",
        "attention_bias": False,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 128,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 768,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "max_position_embeddings": 8192,
        "num_attention_heads": 4,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size": vocabulary,
    }


def config(vocabulary: int) -> dict[str, Any]:
    ids = media_ids(vocabulary)
    return {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        "text_config": text_config(vocabulary),
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "mm_embed_dim": HIDDEN,
            "mm_posemb_size": 1120,
            "model_patch_size": 48,
            "num_soft_tokens": BUDGET,
            "output_proj_dims": HIDDEN,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "rms_norm_eps": 1e-6,
        },
        "audio_config": {
            "model_type": "gemma4_unified_audio",
            "audio_embed_dim": 640,
            "audio_samples_per_token": 640,
            "rms_norm_eps": 1e-6,
        },
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


def drafter_config(vocabulary: int) -> dict[str, Any]:
    text = text_config(vocabulary) | {
        "hidden_size": DRAFTER_HIDDEN,
        "intermediate_size": 256,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 2,
        "final_logit_softcapping": None,
    }
    return {
        "architectures": ["Gemma4UnifiedAssistantForCausalLM"],
        "model_type": "gemma4_unified_assistant",
        "backbone_hidden_size": HIDDEN,
        "text_config": text,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": False,
        "dtype": "float32",
    }


def write_files(folder: Path) -> None:
    """Everything of a checkpoint but its weights, into `folder` and its `drafter/`."""
    (folder / "drafter").mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder)
    ids = media_ids(size)
    roles = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    media_roles = {
        "boi_token": "<|image>", "boa_token": "<|audio>", "image_token": "<|image|>", "audio_token": "<|audio|>",
        "eoi_token": "<image|>", "eoa_token": "<audio|>",
    }  # fmt: skip
    files: dict[str, dict[str, Any]] = {
        "config.json": config(size),
        "drafter/config.json": drafter_config(size),
        "generation_config.json": {
            "bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106, 50], "pad_token_id": 0,
            "suppress_tokens": [ids["<audio|>"], ids["<image|>"]], "temperature": 0.0, "top_k": 64, "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer", **roles, **media_roles,
            "extra_special_tokens": [t for t in (*CONTROL.values(), *MEDIA) if t not in roles.values()],
        },
        "processor_config.json": {
            "processor_class": "Gemma4UnifiedProcessor",
            "image_seq_length": BUDGET,
            "image_processor": {"max_soft_tokens": BUDGET, "patch_size": 16, "pooling_kernel_size": 3},
            "video_processor": {
                "max_soft_tokens": BUDGET, "num_frames": FRAMES, "patch_size": 16, "pooling_kernel_size": 3,
            },
            "feature_extractor": {"sampling_rate": 16000, "audio_samples_per_token": 640, "feature_size": 640},
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(PACKAGED_TEMPLATE, folder / "chat_template.jinja")
