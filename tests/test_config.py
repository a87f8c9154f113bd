"""config.json and generation_config.json: what is taken, and what is refused in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_checkpoint import TINY, config

from mlx_gemma4.config import (
    FULL,
    SLIDING,
    SUPPORTED,
    CheckpointError,
    GenerationConfig,
    ModelConfig,
    Quantization,
    expanded,
    parse_config,
    read_config,
)

PLAIN = GenerationConfig(eos_token_ids=(1,))


def parse(**text: Any) -> ModelConfig:
    """The tiny config with these keys of its text_config changed; None takes one away."""
    raw = config(TINY)
    raw["text_config"] = {key: value for key, value in (raw["text_config"] | text).items() if value is not None}
    return parse_config(raw, PLAIN)


def write(folder: Path, raw: Any, generation: Any = None) -> Path:
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_published_keys_are_understood() -> None:
    found = parse()
    assert found.text.attention[SLIDING].window == TINY.window
    assert found.text.attention[FULL].window is None
    assert found.text.attention[FULL].head_dim == TINY.global_head_dim
    assert found.text.attention[FULL].rotated_dims == TINY.global_head_dim // 4
    assert found.text.attention[SLIDING].rotated_dims == TINY.head_dim
    assert found.text.layer_types == (SLIDING,) * 5 + (FULL,)
    assert found.vision is not None and found.vision.patch_side == 48
    assert found.audio is not None and found.audio.samples_per_token == 640
    assert found.special_tokens["eoa_token_id"] == config(TINY)["eoa_token_index"]


@pytest.mark.parametrize("name", ["05", "5"])
def test_per_layer_config_is_the_older_keys_in_another_spelling(name: str) -> None:
    own = {"head_dim": TINY.global_head_dim, "num_key_value_heads": TINY.global_kv_heads}
    newer = parse(global_head_dim=None, num_global_key_value_heads=None, per_layer_config={name: own})
    assert newer == parse()


def test_per_layer_config_with_two_shapes_of_a_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^per_layer_config gives sliding_attention layers 2 shapes; supported"):
        parse(per_layer_config={"0": {"head_dim": 32}})


UNSUPPORTED = {
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 256,
    "enable_moe_block": True,
    "use_double_wide_mlp": True,
    "attention_bias": True,
    "attention_k_eq_v": False,
    "use_bidirectional_attention": "all",
    "hidden_activation": "silu",
}


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED.items())
def test_an_unsupported_value_is_named_with_what_is_supported(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^{key} is {value!r}; supported is {SUPPORTED[key][0]!r}$"):
        parse(**{key: value})
    assert parse(**{key: None}) == parse()  # an absent key is fine


@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_an_unsupported_kind_of_rope_is_refused(kind: str) -> None:
    ropes = copy.deepcopy(config(TINY)["text_config"]["rope_parameters"])
    ropes[kind]["rope_type"] = "yarn"
    with pytest.raises(
        CheckpointError, match=rf"^rope_type of {kind} is 'yarn'; supported is '(default|proportional)'$"
    ):
        parse(rope_parameters=ropes)


def test_layers_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^layer_types has \['chunked_attention'\]; supported are "):
        parse(layer_types=["chunked_attention"] * 6)
    with pytest.raises(CheckpointError, match=r"^layer_types has 6 entries; expected num_hidden_layers = 7$"):
        parse(num_hidden_layers=7)
    with pytest.raises(CheckpointError, match=r"^num_attention_heads is 3; expected a multiple of 2 key/value heads$"):
        parse(num_attention_heads=3)


def test_another_kind_of_model_is_refused() -> None:
    for kind in ("gemma3", "llama", None):
        with pytest.raises(CheckpointError, match=rf"^model_type is {kind!r}; expected 'gemma4_unified'$"):
            parse_config(config(TINY) | {"model_type": kind}, PLAIN)


def test_a_config_without_modalities_is_one_of_text() -> None:
    raw = {key: value for key, value in config(TINY).items() if key not in ("vision_config", "audio_config")}
    assert (parse_config(raw, PLAIN).vision, parse_config(raw, PLAIN).audio) == (None, None)
    raw |= {"vision_config": None, "audio_config": None}
    assert (parse_config(raw, PLAIN).vision, parse_config(raw, PLAIN).audio) == (None, None)


def test_quantization_with_overrides_is_read_from_either_key() -> None:
    raw = {"group_size": 64, "bits": 4, "a.b": {"bits": 8}, "c": {"group_size": 32, "mode": "mxfp4"}, "d": False}
    for key in ("quantization", "quantization_config"):
        found = parse_config(config(TINY) | {key: raw}, PLAIN)
        assert found.quantization == Quantization(64, 4, "affine")
        assert found.quantization_overrides == {
            "a.b": Quantization(64, 8, "affine"),
            "c": Quantization(32, 4, "mxfp4"),
        }


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"group_size": "64", "bits": 4}, r"^group_size is '64'; expected a whole number above 0$"),
        ({"group_size": 64, "bits": 4, "mode": {}}, r"^the mode of the quantization is {}; expected a name such as "),
    ],
)
def test_a_quantization_that_is_none_is_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(config(TINY) | {"quantization": own}, PLAIN)


@pytest.mark.parametrize(
    "own",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},  # MLX's keys among them
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    ],
    ids=lambda own: own["quant_method"],
)
def test_a_quantization_of_another_library_is_named(own: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^the weights are quantized by '{own['quant_method']}', which MLX does"
    ):
        parse_config(config(TINY) | {"quantization_config": own}, PLAIN)


def test_a_module_of_its_own_takes_nothing_of_the_default() -> None:
    """As MLX hands the entry to the module: what is left out is the mode's usual value, and the mode is affine."""
    raw = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    raw |= {"a": {"group_size": 64, "bits": 8}, "b": {"bits": 6}, "c": {"mode": "nvfp4"}}
    found = parse_config(config(TINY) | {"quantization": raw}, PLAIN)
    assert found.quantization == Quantization(32, 8, "mxfp8")
    assert found.quantization_overrides == {
        "a": Quantization(64, 8, "affine"),
        "b": Quantization(64, 6, "affine"),
        "c": Quantization(16, 4, "nvfp4"),
    }


@pytest.mark.parametrize(("top", "text", "expected"), [
    (None, None, True), (None, False, False), (False, True, False), (True, False, True), (False, None, False),
])  # fmt: skip
def test_the_top_of_the_file_says_whether_the_head_is_tied(top: bool | None, text: bool | None, expected: bool) -> None:
    raw = config(TINY)
    for holder, value in ((raw, top), (raw["text_config"], text)):
        holder.pop("tie_word_embeddings")
        if value is not None:
            holder["tie_word_embeddings"] = value
    assert parse_config(raw, PLAIN).text.tie_word_embeddings is expected


def test_generation_defaults_come_from_their_own_file(tmp_path: Path) -> None:
    own = {"eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95, "temperature": 0.7, "suppress_tokens": [5, 6]}
    found = read_config(write(tmp_path, config(TINY), own)).generation
    assert found == GenerationConfig((1, 106), (5, 6), temperature=0.7, top_k=64, top_p=0.95)
    assert read_config(write(tmp_path, config(TINY), own | {"do_sample": False})).generation.temperature == 0
    assert read_config(write(tmp_path, config(TINY), {"eos_token_id": 106})).generation.eos_token_ids == (106,)


def test_without_a_generation_config_the_stop_tokens_are_the_configs(tmp_path: Path) -> None:
    found = read_config(write(tmp_path, config(TINY))).generation
    assert (found.eos_token_ids, found.temperature, found.top_k) == ((1, 106), 1.0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not valid JSON: Expecting property name"),
        ("", r"config\.json is not valid JSON: "),
        ("[]", r"config\.json holds a list; expected a JSON object$"),
        ("{}", r"config\.json: model_type is None; expected 'gemma4_unified'$"),
        ('{"model_type": "gemma4_unified"}', r"config\.json has no 'text_config'; expected a "),
        ('{"model_type": "gemma4_unified", "text_config": {}}', r"config\.json has no 'layer_types'; expected a "),
        ('{"model_type": "gemma4_unified", "text_config": 5}', r"config\.json has a value of the wrong type: "),
    ],
)
def test_a_damaged_config_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(write(tmp_path, text))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing; expected a model folder with a config\.json$"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON: "):
        read_config(tmp_path)


JUNK = st.sampled_from([None, -1, 0, 1.5, 10**30, "", "text", [], [0], {}, {"a": 1}, True])


def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where every value of nested dicts stands."""
    if not isinstance(value, dict):
        return [path]
    return [path, *(found for key in value for found in paths(value[key], (*path, key)))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_single_wrong_value_makes_the_parser_raise_anything_else(data: st.DataObject) -> None:
    raw = config(TINY) | {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    path = data.draw(st.sampled_from([found for found in paths(raw) if found]))
    holder = raw
    for key in path[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        del holder[path[-1]]
    else:
        holder[path[-1]] = data.draw(JUNK)
    try:
        found = parse_config(raw, PLAIN)
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:  # what read_config turns into one line
        assert str(error)
        return
    assert found.text.hidden_size > 0 and found.text.attention[SLIDING].num_key_value_heads > 0


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 0), ("hidden_size", "64"), ("vocab_size", 1.5), ("head_dim", None)]
)
def test_a_size_that_is_none_is_refused(key: str, value: Any) -> None:
    raw = config(TINY)
    raw["text_config"][key] = value
    with pytest.raises(CheckpointError, match=rf"^{key} is .*; expected a whole number above 0$"):
        parse_config(raw, PLAIN)


def test_a_sampling_default_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 'x'; expected a number from 0 to 1$"):
        read_config(write(tmp_path, config(TINY), {"top_p": "x"}))
    with pytest.raises(CheckpointError, match=r"top_p is 0; expected a number from 0 to 1, above 0$"):
        read_config(write(tmp_path, config(TINY), {"top_p": 0}))


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", Path("~nobody-of-this-name/x")])
def test_a_home_folder_of_nobody_is_named(path: str | Path) -> None:
    with pytest.raises(ValueError, match=r"^'~nobody-of-this-name/x' names a user who is not known here"):
        expanded(path)


@pytest.mark.parametrize("factor", [1.5, 0.001])
def test_a_part_of_a_head_that_cannot_turn_is_refused(factor: float) -> None:
    raw = config(TINY)
    raw["text_config"]["rope_parameters"]["full_attention"]["partial_rotary_factor"] = factor
    with pytest.raises(CheckpointError, match=rf"^partial_rotary_factor is {factor}; expected at most 1"):
        parse_config(raw, PLAIN)


def test_a_path_with_a_nul_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^'x\\x00y' has a NUL in it; expected a path$"):
        expanded("x\0y")
