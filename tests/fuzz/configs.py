"""The JSON files of a model folder, damaged: it loads and answers, or one line names the file."""

import json
import zlib
from typing import Any

from hypothesis import strategies as st

from .folders import check_folder, model_folder
from .mutate import damaged, edited, json_edits, text_of, weighted
from .surface import DEMO, demo

SHARE = 8
FILES = (
    "config.json", "config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json",
    "drafter/config.json",
    "model.safetensors.index.json",
)  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {  # what others write there, and the demo does not
    "config.json": {"quantization_config": {"quant_method": "gptq"}, "rope_scaling": {"type": "yarn"},
    "dtype": "float16", "torch_dtype": "bfloat16"},
    "generation_config.json": {"min_p": 0.1, "repetition_penalty": 1.0, "max_new_tokens": 5, "stop_strings": ["a"],
    "top_k": None},
    "processor_config.json": {"image_token_id": 3, "video_processor": {"fps": 2, "num_frames": 32,
    "max_soft_tokens": 70}},
    "tokenizer_config.json": {"chat_template": "x", "additional_special_tokens": ["<a>"],
    "added_tokens_decoder": {"1": {"content": "a"}}},
}  # fmt: skip

prepare = demo


def strategy() -> st.SearchStrategy[Any]:
    def changed(name: str) -> st.SearchStrategy[Any]:
        original = (DEMO / name).read_bytes()
        document = json.loads(original) | KEYS.get(name, {}) if "index" not in name else json.loads(original)
        plain = json.loads(original)
        edits = st.builds(
            lambda base, edits: text_of(edited(base, edits)), st.sampled_from([plain, plain, document]), json_edits
        )
        data = weighted((9, edits), (1, damaged([original], 3)))
        return st.fixed_dictionaries({"file": st.just(name), "data": data})

    return st.sampled_from(FILES).flatmap(changed)


def check(value: Any) -> str | None:
    with model_folder({value["file"]: value["data"]}) as folder:
        return check_folder(folder, zlib.crc32(value["data"]) % 4 == 0)
