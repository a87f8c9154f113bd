"""Whole model folders in which several things are odd at once: files missing, twice, from elsewhere, damaged."""

import json
import zlib
from typing import Any

from hypothesis import strategies as st

from . import weights
from .folders import check_folder, model_folder
from .mutate import edited, json_edits, text_of
from .surface import DEMO, demo

SHARE = 8
NAMES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "tokenizer_config.json", "tokenizer.json", "chat_template.jinja",
    "chat_template.json", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-extra.safetensors", "consolidated.safetensors",
    "drafter/config.json", "drafter/model.safetensors", "drafter/model.safetensors.index.json", "drafter",
    "adapters.safetensors", "special_tokens_map.json",
    "quantize_config.json", "README.md",
)  # fmt: skip
TEXTS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"{",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b'{"a": NaN}',
    b"\x00" * 64,
    b"version https://git-lfs.github.com/spec/v1\n",
    b"/",
)
CONFIG: tuple[dict[str, Any], ...] = (
    {"tie_word_embeddings": False}, {"quantization": None, "quantization_config": None},
    {"quantization_config": {"quant_method": "awq", "bits": 4}, "quantization": None},
    {"quantization": {"group_size": 64, "bits": 4, "mode": "mxfp4"}}, {"quantization": {"group_size": 32, "bits": 4}},
    {"quantization": {"group_size": 64, "bits": 3}},
    {"quantization": {"group_size": 64, "bits": 4, "language_model.model.layers.0.mlp.down_proj": False}},
    {"dtype": "float16"}, {"dtype": "int8"},
    {"eos_token_id": 106}, {"eos_token_id": None}, {"eos_token_id": [10**9]}, {"vision_config": None},
    {"audio_config": None}, {"video_token_id": None},
    {"image_token_id": 10**6}, {"model_type": "gemma4"}, {"model_type": "gemma4_unified_assistant"},
    {"architectures": None},
)  # fmt: skip
INDEX: tuple[Any, ...] = (
    {"weight_map": {}}, {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}},
    {"weight_map": {"a": "config.json"}}, {"weight_map": {"a": ""}},
    {"weight_map": {"a": "."}}, {"weight_map": {"a": "drafter/model.safetensors"}},
    {"weight_map": {"a": "model.safetensors", "b": "missing.safetensors"}},
    {"weight_map": ["model.safetensors"]}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "a" * 5000}},
    {"weight_map": {"a": "a\x00b"}},
)  # fmt: skip

prepare = demo


def strategy() -> st.SearchStrategy[Any]:
    config = json.loads((DEMO / "config.json").read_bytes())

    whole = st.builds(
        lambda parts,
        edits: text_of(edited({key: entry for part in (config, *parts) for key, entry in part.items()}, edits)),
        st.lists(st.sampled_from(CONFIG), max_size=2), st.one_of(st.just([]), json_edits),
    )  # fmt: skip
    other = st.sampled_from(TEXTS)
    from_demo = st.sampled_from(
        ["config.json", "drafter/config.json", "model.safetensors", "drafter/model.safetensors", "tokenizer.json"]
    )
    file = st.one_of(
        st.tuples(st.sampled_from(NAMES), st.none()),
        st.tuples(st.sampled_from(NAMES), other),
        # as a template they would be a prompt of thousands of tokens
        st.tuples(st.sampled_from([name for name in NAMES if name != "chat_template.jinja"]), from_demo),
        st.tuples(st.just("config.json"), whole),
        st.tuples(st.just("config.json"), whole),
        st.tuples(st.just("model.safetensors.index.json"), st.sampled_from(INDEX).map(text_of)),
        st.tuples(st.sampled_from(["model.safetensors", "model-extra.safetensors"]), weights.strategy()),
    )  # fmt: skip
    return st.lists(file, min_size=1, max_size=3)


def check(value: Any) -> str | None:
    files: dict[str, bytes | None] = {}
    for name, content in value:
        data = content
        if isinstance(content, str):
            data = (DEMO / content).read_bytes()
        elif isinstance(content, dict):
            data = weights.written(content)
        files[name] = data
    if any(name.startswith("drafter/") for name in files):
        files.pop("drafter", None)
    elif "drafter" in files:  # in the place of the folder
        files |= {f"drafter/{file.name}": None for file in (DEMO / "drafter").iterdir()}
    with model_folder(files) as folder:
        return check_folder(folder, zlib.crc32(repr(value).encode()) % 4 == 0)
