"""A tokenizer.json, damaged: it loads and encodes, or one line names the file."""

import json
from typing import Any

from hypothesis import strategies as st

from .folders import model_folder
from .judge import check as must
from .judge import check_refusal
from .mutate import damaged, edited, json_edits, text_of, weighted
from .surface import DEMO, CheckpointError, demo_processor, load_processor

SHARE = 15
PARTS: tuple[tuple[str, Any], ...] = (  # what other tokenizers have there
    ("normalizer", None), ("normalizer", {"type": "NFKC"}), ("normalizer", {"type": "Lowercase"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Whitespace"}),
    ("decoder", None), ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}), ("post_processor", None),
    ("added_tokens", []),
    ("truncation", {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    ("padding", {"strategy": {"Fixed": 100}}),
    ("model", {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}),
    ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}),
    ("model", {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}),
    ("model", {"type": "BPE", "vocab": {"a": 5}, "merges": [["a", "b"]]}),
)  # fmt: skip
INSIDE: tuple[tuple[str, Any], ...] = (
    ("ignore_merges", True), ("byte_fallback", False), ("fuse_unk", True), ("unk_token", None),
    ("unk_token", "missing"), ("dropout", 0.5), ("dropout", 2),
    ("merges", []), ("merges", [["a", "zzzzz"]]), ("vocab", {}), ("continuing_subword_prefix", "##"),
    ("end_of_word_suffix", "</w>"),
)  # fmt: skip
TEXT = 'Hello, wörld 😀 <|"|> <turn|>\n\n12'

prepare = demo_processor


def strategy() -> st.SearchStrategy[Any]:
    original = (DEMO / "tokenizer.json").read_bytes()
    document = json.loads(original)

    def rebuilt(parts: list[Any], inside: list[Any], edits: Any) -> bytes:
        changed = document | dict(parts)
        changed["model"] = changed["model"] | dict(inside)
        small = {key: entry for key, entry in changed.items() if key != "model"}
        head = {key: entry for key, entry in changed["model"].items() if key not in ("vocab", "merges")}
        hurt = edited({"rest": small, "model": head}, edits)  # what holds few values, so that each is met
        body = hurt.get("model") if isinstance(hurt.get("model"), dict) else {}
        kept = {key: changed["model"][key] for key in ("vocab", "merges") if key in changed["model"]}
        rest = hurt.get("rest") if isinstance(hurt.get("rest"), dict) else {}
        return text_of(rest | {"model": body | kept})

    def deep(edits: Any) -> bytes:
        return text_of(edited(document, edits))

    swapped = st.builds(
        rebuilt, st.lists(st.sampled_from(PARTS), max_size=2), st.lists(st.sampled_from(INSIDE), max_size=1), json_edits
    )
    return weighted((4, swapped), (1, st.builds(deep, json_edits)), (1, damaged([original], 3))).map(
        lambda data: {"data": data}
    )


def check(value: Any) -> str | None:
    with model_folder({"tokenizer.json": value["data"]}) as folder:
        try:
            processor = load_processor(folder, demo_processor().config)
        except Exception as error:  # any: it is judged
            check_refusal(error, (CheckpointError,))
            return "refused"
    try:
        prompt = processor([{"role": "user", "content": TEXT}])
    except Exception as error:  # any: it is judged
        check_refusal(error, (ValueError,))
        return "refused"
    must(max(prompt.token_ids) < processor.config.text.vocab_size, "an id beyond the vocabulary")
    return None
