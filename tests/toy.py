"""A tiny tokenizer of Gemma's structure (byte-fallback BPE, published control-token ids), and the chat template."""

import json
from importlib import resources

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers

SPECIAL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>",
    48: "<|tool_call>", 49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>',
    98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
MEDIA = ["<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>"]  # the last ids
LETTERS = "abcdefghijklmnopqrstuvwxyz▁"  # all other characters are bytes
WORDS = ["thought", "the▁", "call", "model", "user", "system", "quick▁"]
LINE_BREAK = 107


def toy_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Every id below `vocab_size` is a token; unneeded ones are `<unused…>`."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        merges += [(word[:n], word[n]) for n in range(1, len(word)) if (word[:n], word[n]) not in merges]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list(LETTERS) + [left + right for left, right in merges]
    fixed = SPECIAL | {LINE_BREAK: "\n"} | {vocab_size - len(MEDIA) + n: token for n, token in enumerate(MEDIA)}
    rest = iter(pieces)
    vocab = {fixed[n] if n in fixed else next(rest, f"<unused{n}>"): n for n in range(vocab_size)}
    if next(rest, None) is not None:
        raise ValueError(f"vocab_size is {vocab_size}; the pieces need {len(pieces) + len(fixed)}")

    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model | {"vocab": vocab, "merges": merges}}))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL.values(), *MEDIA]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def chat_template() -> Template:
    """The packaged chat template, set up as transformers does."""
    source = resources.files("mlx_gemma4").joinpath("prompt/chat_template.jinja").read_text(encoding="utf-8")
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
