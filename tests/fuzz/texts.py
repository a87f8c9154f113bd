"""Texts that people and programs send: words, control tokens and parts of them, odd Unicode, very long ones."""

from typing import Any

from hypothesis import strategies as st

from .mutate import weighted

CONTROLS = (
    "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|image|>", "<|video|>",
    "<|audio|>", "<|tool>", "<tool|>", "<|tool_response>", "<tool_response|>", "<|think|>", "<bos>", "<eos>", "<pad>",
    "<unk>", "<|image>", "<image|>", "<0x0A>", "<unused0>", "<mask>", "<start_of_turn>",
)  # fmt: skip
PIECES = (
    *CONTROLS, *CONTROLS, "<", "|>", "<|", '"', "'", "\\", "{", "}", "[", "]", ":", ",", "\n", "\r\n", "\t", " ",
    "\x00",
    "\x1b[31m", "call:f{a:1}", "thought\n", "model\n", "user\n", "{{ messages }}", "{% raw %}", "%s", "é", "e\u0301",
    "😀",
    "👩\u200d👩\u200d👧", "\u202e", "\ufeff", "\ufffd", "\ue000", "\uf8ff", "▁", "١٢", "1", "108.", "0012", "-0",
    "1e400", "null", "true",
    "the", "How many shapes are there?", "a" * 300,
)  # fmt: skip
RARE = ("\ud800", "a" * 20000, "\udfff<|turn>", " " * 5000, "<" * 3000)

usual = st.one_of(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), st.text(max_size=20))
texts = weighted((40, usual), (1, st.sampled_from(RARE)))
names = st.one_of(st.sampled_from(["f", "get_weather", "a.b", "a-b", "a b", "a:b", "type", "", "ü"]), texts)


def values(depth: int = 2) -> st.SearchStrategy[Any]:
    """What JSON holds, and what Python's reader also takes."""
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(-10, 10), st.integers(-(2**70), 2**70), st.floats(), texts,
        st.just(10**400),
    )  # fmt: skip
    if not depth:
        return leaves
    inner = values(depth - 1)
    return st.one_of(leaves, st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3))
