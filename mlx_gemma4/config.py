"""What a checkpoint's `config.json` and `generation_config.json` say, checked and frozen."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlx_gemma4.errors import CheckpointError, one_line, shown

SLIDING, FULL = "sliding_attention", "full_attention"
WHOLE = "sliding_attention on every machine"  # of a model on several: its last sliding layer
KV_BITS = (4, 8)  # that entries of full layers can be kept in

# Values that would change the maths and are not implemented: anything else is refused, an absent key is fine.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_kv_shared_layers": (0,),
    "hidden_size_per_layer_input": (0, None),
    "enable_moe_block": (False,),
    "use_double_wide_mlp": (False,),
    "attention_bias": (False,),
    "attention_k_eq_v": (True,),
    "use_bidirectional_attention": ("vision",),
    "hidden_activation": ("gelu_pytorch_tanh",),
}
ROPE_TYPES = {SLIDING: "default", FULL: "proportional"}
# What a model can compute in, by the names that options and config.json have for it.
COMPUTING = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
# Of a size in config.json: far beyond any Gemma, and small enough that products of two fit MLX's shapes and positions.
LARGEST = 2**24
MOST_POSITIONS = 2**30
MOST_LAYERS = 1024
MOST_HEAD_DIM = 2**16

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class AttentionConfig:
    """The shape of one kind of attention layer."""

    head_dim: int
    num_key_value_heads: int
    rope_theta: float
    rotated_dims: int  # of head_dim; the rest pass through RoPE unturned
    window: int | None  # keys in sight, the query's own included; None: all before it
    kv_bits: int | None = None  # of what a full layer keeps; None: as it computes


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    layer_types: tuple[str, ...]
    sliding_window: int
    attention: dict[str, AttentionConfig]  # by layer type
    tie_word_embeddings: bool = True  # the embedding is also the head


@dataclass(frozen=True)
class VisionConfig:
    patch_side: int  # pixels; one soft token covers patch_side x patch_side
    mm_embed_dim: int
    mm_posemb_size: int
    output_proj_dims: int
    rms_norm_eps: float


@dataclass(frozen=True)
class AudioConfig:
    samples_per_token: int
    rms_norm_eps: float


@dataclass(frozen=True)
class GenerationConfig:
    """The checkpoint's own defaults for sampling."""

    eos_token_ids: tuple[int, ...]
    suppress_tokens: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Quantization:
    group_size: int
    bits: int
    mode: str


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    vision: VisionConfig | None
    audio: AudioConfig | None
    special_tokens: dict[str, int]  # by config key: image_token_id, boi_token_id, eoi_token_id, audio_token_id, …
    generation: GenerationConfig
    quantization: Quantization | None
    quantization_overrides: dict[str, Quantization]  # by the module's path as the checkpoint writes it
    dtype: mx.Dtype = mx.float32  # of all that floats, hidden states and caches too; settled when weights are looked at
    adapters: tuple[str, ...] = ()  # those that requests choose from, by name


def computing_type(name: str | None) -> mx.Dtype | None:
    """The type that an option asks for; None: what the checkpoint has. ValueError if it is none to compute in."""
    if name is not None and (not isinstance(name, str) or name not in COMPUTING):
        raise ValueError(f"dtype is {shown(name)}; expected one of {', '.join(COMPUTING)}")
    return None if name is None else COMPUTING[name]


def expanded(path: str | Path) -> Path:
    """A path whose `~` or `~user` is the folder that it stands for. ValueError if there is no such user, or no such
    path can be."""
    if "\0" in str(path):
        raise ValueError(f"{shown(str(path))} has a NUL in it; expected a path")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{shown(str(path))} names a user who is not known here; expected a path") from None


def read_given(path: str | Path, what: str) -> bytes:
    """What is in a file that a user names; ValueError that begins with `what` if it cannot be read."""
    file = expanded(path)
    try:
        if file.is_char_device():  # it may never end
            raise ValueError(f"{what} cannot be read: it is a device; expected a file")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {one_line(error)}") from None


def read_bytes_of(path: Path) -> bytes:
    """A file's content; CheckpointError if there is no such file, or it is closed to us."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; expected a model folder with a {path.name}{of_gguf(path.parent)}"
        ) from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; expected a file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    check_no_pointer(path, data)
    return data


def of_gguf(folder: Path) -> str:
    """How a folder that lacks something becomes a model's, if a GGUF file is there."""
    file = next(iter(sorted(folder.glob("*.gguf"))), None)
    return "" if file is None else f", which mlx_gemma4.convert makes of {file.name}"


def check_no_pointer(path: Path, data: bytes) -> None:
    """CheckpointError for a file that begins as what Git leaves in the place of a large one, without Git LFS."""
    if data.startswith(b"version https://git-lfs."):
        raise CheckpointError(f"{path} is a pointer of Git LFS; expected the file itself, which `git lfs pull` fetches")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError if there is none."""
    raw = read_bytes_of(path)
    try:
        found = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def read_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration.

    Keys that change nothing are ignored; a value that would change the maths and is not implemented
    raises CheckpointError with the key, its value and what is supported.
    """
    return read_checked(folder / "config.json", lambda raw: parse_config(raw, generation_defaults(folder, raw)))


def read_checked(path: Path, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
    """What `parse` makes of a JSON file; what it misses or cannot take is a CheckpointError that names the file."""
    raw = read_json(path)
    try:
        return parse(raw)
    except KeyError as error:
        raise CheckpointError(f"{path} has no {shown(error.args[0])}; expected a Gemma 4 checkpoint") from None
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a value of the wrong type: {one_line(error)}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def with_kv_bits(text: TextConfig, kv_bits: int | None) -> TextConfig:
    """The decoder with full layers that keep their entries in so many bits; ValueError for bits that there are not."""
    if kv_bits is not None and not (isinstance(kv_bits, Integral) and kv_bits in KV_BITS):
        raise ValueError(f"kv_bits is {shown(kv_bits)}; expected 8, 4 or None")
    full = replace(text.attention[FULL], kv_bits=kv_bits)
    return replace(text, attention=text.attention | {FULL: full})


def count(raw: dict[str, Any], key: str, most: int = LARGEST) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{key} is {shown(value)}; expected a whole number above 0")
    if value > most:
        raise CheckpointError(f"{key} is {shown(value)}; expected at most {most}")
    return value


def amount(raw: dict[str, Any], key: str) -> float:
    value = raw[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise CheckpointError(f"{key} is {shown(value)}; expected a number above 0")
    return float(value)  # MLX takes no larger integers than C does


def check_product(text: str, *sides: int) -> None:
    """CheckpointError if a size that is a product is beyond what MLX has shapes for."""
    if prod(sides) >= 2**31:
        raise CheckpointError(f"{text} is {prod(sides)}; expected less than 2**31")


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


MODEL_TYPE = "gemma4_unified"


def parse_config(raw: dict[str, Any], generation: GenerationConfig) -> ModelConfig:
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"model_type is {shown(raw.get('model_type'))}; expected {MODEL_TYPE!r}")
    # transformers asks the top of the file, where it says anything
    text = raw["text_config"] | {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}
    vision, audio = raw.get("vision_config"), raw.get("audio_config")
    quantization, overrides = parse_quantization(raw.get("quantization") or raw.get("quantization_config"))
    given = raw if "eoa_token_index" not in raw else raw | {"eoa_token_id": raw["eoa_token_index"]}  # as published
    specials = {key: value for key, value in given.items() if key.endswith("_token_id") and is_id(value)}
    own = parse_text(text)
    if len({token for token in generation.suppress_tokens if token < own.vocab_size}) == own.vocab_size:
        raise CheckpointError(
            f"generation_config.json: suppress_tokens has all {own.vocab_size} tokens; expected it to leave some"
        )
    return ModelConfig(
        text=own,
        vision=parse_vision(vision) if vision else None,
        audio=parse_audio(audio) if audio else None,
        special_tokens=specials,
        generation=generation,
        quantization=quantization,
        quantization_overrides=overrides,
    )


def parse_text(raw: dict[str, Any]) -> TextConfig:
    """The decoder's shape; the drafter's config.json holds one too."""
    for key, values in SUPPORTED.items():
        if key in raw and raw[key] not in values:
            raise CheckpointError(f"{key} is {shown(raw[key])}; supported is {values[0]!r}")
    if not isinstance(tied := raw.get("tie_word_embeddings", True), bool):
        raise CheckpointError(f"tie_word_embeddings is {shown(tied)}; expected true or false")
    kinds = tuple(raw["layer_types"])
    if unknown := [kind for kind in kinds if kind not in (SLIDING, FULL)]:
        raise CheckpointError(f"layer_types has {shown(unknown[:1])}; supported are {SLIDING!r} and {FULL!r}")
    if len(kinds) != raw["num_hidden_layers"]:
        expected = f"num_hidden_layers = {shown(raw['num_hidden_layers'])}"
        raise CheckpointError(f"layer_types has {len(kinds)} entries; expected {expected}")
    if len(kinds) > MOST_LAYERS:
        raise CheckpointError(f"layer_types has {len(kinds)} entries; expected at most {MOST_LAYERS}")
    return TextConfig(
        hidden_size=count(raw, "hidden_size"),
        intermediate_size=count(raw, "intermediate_size"),
        num_attention_heads=count(raw, "num_attention_heads"),
        vocab_size=count(raw, "vocab_size"),
        max_position_embeddings=count(raw, "max_position_embeddings", MOST_POSITIONS),
        rms_norm_eps=amount(raw, "rms_norm_eps"),
        final_logit_softcapping=amount(raw, "final_logit_softcapping") if raw.get("final_logit_softcapping") else None,
        layer_types=kinds,
        sliding_window=count(raw, "sliding_window", MOST_POSITIONS),
        tie_word_embeddings=tied,
        attention={kind: parse_attention(raw, kind) for kind in (SLIDING, FULL)},
    )


def parse_attention(raw: dict[str, Any], kind: str) -> AttentionConfig:
    rope = raw["rope_parameters"][kind]
    if rope["rope_type"] != ROPE_TYPES[kind]:
        raise CheckpointError(f"rope_type of {kind} is {shown(rope['rope_type'])}; supported is {ROPE_TYPES[kind]!r}")
    head_dim, heads = raw["head_dim"], raw["num_key_value_heads"]
    if kind == FULL:
        head_dim = raw.get("global_head_dim") or head_dim
        heads = raw.get("num_global_key_value_heads") or heads
    # transformers >= 5.23 saves the full layers' shape as overrides by layer number ("05")
    overrides = {
        int(layer) if str(layer).isdecimal() else -1: values
        for layer, values in (raw.get("per_layer_config") or {}).items()
    }
    shapes = {
        (own.get("head_dim", head_dim), own.get("num_key_value_heads", heads))
        for own in (overrides.get(layer, {}) for layer, other in enumerate(raw["layer_types"]) if other == kind)
    }
    if len(shapes) > 1:
        raise CheckpointError(f"per_layer_config gives {kind} layers {len(shapes)} shapes; supported is one")
    if shapes:
        head_dim, heads = shapes.pop()
    shape = {"head_dim": head_dim, "num_key_value_heads": heads}
    head_dim, heads = count(shape, "head_dim", MOST_HEAD_DIM), count(shape, "num_key_value_heads")
    if (queries := count(raw, "num_attention_heads")) % heads:
        raise CheckpointError(f"num_attention_heads is {queries}; expected a multiple of {heads} key/value heads")
    check_product("num_attention_heads times head_dim", queries, head_dim)
    rotated = amount({"partial_rotary_factor": 1.0} | rope, "partial_rotary_factor")
    if not 2 <= rotated * head_dim <= head_dim:
        raise CheckpointError(f"partial_rotary_factor is {rotated}; expected at most 1, and 2 of {head_dim} to turn")
    return AttentionConfig(
        head_dim=head_dim,
        num_key_value_heads=heads,
        rope_theta=amount(rope, "rope_theta"),
        rotated_dims=2 * int(rotated * head_dim // 2),
        window=count(raw, "sliding_window", MOST_POSITIONS) if kind == SLIDING else None,
    )


def parse_vision(raw: dict[str, Any]) -> VisionConfig:
    side = count(raw, "patch_size") * count(raw, "pooling_kernel_size")
    check_product("the number of values of a patch", side, side, 3)
    return VisionConfig(
        patch_side=side,
        mm_embed_dim=count(raw, "mm_embed_dim"),
        mm_posemb_size=count(raw, "mm_posemb_size"),
        output_proj_dims=count(raw, "output_proj_dims"),
        rms_norm_eps=amount(raw, "rms_norm_eps"),
    )


def parse_audio(raw: dict[str, Any]) -> AudioConfig:
    return AudioConfig(samples_per_token=count(raw, "audio_embed_dim"), rms_norm_eps=amount(raw, "rms_norm_eps"))


# Group size and bits of each mode, where MLX's own quantization entries leave them out.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


def parse_quantization(raw: Any) -> tuple[Quantization | None, dict[str, Quantization]]:
    """The default, and that of modules with an entry of their own: MLX takes nothing of the default for those."""
    if not raw:
        return None, {}
    if "quant_method" in raw:  # awq, gptq, auto-round, compressed-tensors, fp8, …: some have group_size and bits too
        raise CheckpointError(
            f"the weights are quantized by {shown(raw['quant_method'])}, which MLX does not read; expected MLX's own "
            "quantization, or the original checkpoint"
        )
    if "group_size" not in raw or "bits" not in raw:
        raise CheckpointError(
            f"quantization has the keys {shown(sorted(raw))}; expected group_size and bits, as MLX writes them"
        )
    overrides = {
        path: one_quantization(value)
        for path, value in raw.items()
        if isinstance(value, dict) and path not in ("group_size", "bits", "mode")
    }
    return one_quantization(raw), overrides


def one_quantization(raw: dict[str, Any]) -> Quantization:
    mode = raw.get("mode", "affine")
    if not isinstance(mode, str) or mode not in MODES:
        raise CheckpointError(
            f"the mode of the quantization is {shown(mode)}; expected a name such as {', '.join(MODES)}"
        )
    group_size, bits = MODES[mode]
    own = {"group_size": group_size, "bits": bits} | raw
    return Quantization(count(own, "group_size"), count(own, "bits"), mode)


def generation_defaults(folder: Path, raw: dict[str, Any]) -> GenerationConfig:
    """The checkpoint's sampling defaults; without a generation_config.json, stop tokens of config.json, no filters.

    The published stop tokens are among the stops even if neither file names them: Google's config.json does not name
    the end of a reply that calls a tool.
    """
    path = folder / "generation_config.json"
    own = read_json(path) if path.exists() else {}
    eos = own.get("eos_token_id", raw.get("eos_token_id"))
    stops = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    # the embeddings of these two hold folded projections and would win with the tied head
    suppressed = [raw[key] for key in ("eoi_token_id", "eoa_token_index", "eoa_token_id") if is_id(raw.get(key))]
    ranges = {"temperature": 1e9, "top_k": 2**31, "top_p": 1, "min_p": 1, "repetition_penalty": 1e9}
    chosen = {key: own[key] for key in ranges if own.get(key) is not None}
    for key, value in chosen.items():
        kinds = int if key == "top_k" else (int, float)
        above = key in ("top_p", "repetition_penalty") and value == 0
        if not isinstance(value, kinds) or isinstance(value, bool) or above or not 0 <= value <= ranges[key]:
            raise CheckpointError(
                f"generation_config.json: {key} is {shown(value)}; expected a number from 0 to {ranges[key]:g}"
                + (", above 0" if above else "")
            )
    for key, ids in (("eos_token_id", stops), ("suppress_tokens", own.get("suppress_tokens") or [])):
        if not isinstance(ids, list) or not all(map(is_id, ids)):
            raise CheckpointError(f"generation_config.json: {key} is {shown(ids)}; expected ids of tokens")
    if own.get("do_sample") is False:
        chosen["temperature"] = 0.0
    return GenerationConfig(
        eos_token_ids=tuple(dict.fromkeys([*stops, *published_stops(folder / "tokenizer.json")])),
        suppress_tokens=tuple(own.get("suppress_tokens") or suppressed),
        **chosen,
    )


STOP_TOKENS = ("<eos>", "<turn|>", "<|tool_response>")  # of the published generation_config.json


def published_stops(tokenizer: Path) -> list[int]:
    """The ids of those stop tokens that a tokenizer.json has, whose 30 MB are searched: to parse them takes 0.4 s."""
    if not tokenizer.is_file():
        return []
    text, found = read_bytes_of(tokenizer), []
    for token in STOP_TOKENS:
        name = b'"%b"' % re.escape(token.encode())
        in_vocabulary, added = rb"%b\s*:\s*(\d{1,9})\b" % name, rb'"id"\s*:\s*(\d{1,9})\s*,\s*"content"\s*:\s*%b' % name
        if match := re.search(in_vocabulary, text) or re.search(added, text):
            found.append(int(match[1]))
    return found
