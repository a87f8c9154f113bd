"""float16 whatever the weights are: nearer to float32 than bfloat16, and finite where its range is passed."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import WIDE, write_planted
from golden_cases import CHECKPOINTS, LAYOUTS, layout
from mlx import nn
from mlx.utils import tree_map
from rounds import GREEDY, Rounds, make_sampler
from toy_checkpoint import TINY, Shape, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, load
from mlx_gemma4.decoding.round import first_state, make_round
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.model.arrange import arrange
from mlx_gemma4.model.decoder import Layer
from mlx_gemma4.model.float16 import float16_is_safe
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.prompt import SoftTokens
from mlx_gemma4.weights import load as weights
from mlx_gemma4.weights.load import find_drafter, load_values, open_checkpoint

Edit = Callable[[Model], None]
TYPES = (mx.float32, mx.bfloat16, mx.float16)


def unarranged(folder: Path, dtype: mx.Dtype, edit: Edit) -> Model:
    """As `load` makes it, of values that bfloat16 holds: so no type is nearer to them than another."""
    checkpoint = open_checkpoint(folder, find_drafter(folder, folder, "auto"), mx.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "arrange", lambda *_: None)
        for _ in load_values(checkpoint):
            pass
    model = checkpoint.model
    edit(model)

    def cast(x: mx.array) -> mx.array:
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        x = x.astype(mx.bfloat16).astype(mx.float32)
        # as `load` has it: norms for which float16 has no room stay as they are
        return x if dtype == mx.float16 and mx.abs(x).max().item() > 65504 else x.astype(dtype)

    model.update(tree_map(cast, model.parameters()))
    model.language_model.dtype = dtype
    return model


def in_type(folder: Path, dtype: mx.Dtype, edit: Edit) -> Model:
    model = unarranged(folder, dtype, edit)
    arrange(model)
    return model


def prompt_of(name: str, shape: Shape) -> Prompt:
    ids, media = layout(name, shape)
    return Prompt(ids, tuple(SoftTokens(run.kind, run.start, run.values, run.positions) for run in media))


def all_logits(folder: Path, shape: Shape, names: list[str], edit: Edit) -> Iterator[dict[str, np.ndarray]]:
    """Of each prompt, in each type, [L, V]."""
    for dtype in TYPES:
        model = in_type(folder, dtype, edit)
        yield {name: np.array(model.logits(prompt_of(name, shape)))[0] for name in names}


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Of the logits' spread."""
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


# --- weights -----------------------------------------------------------------------------------


def layers(model: Model) -> list[Layer]:
    return [*model.language_model.layers, *(model.drafter.layers if model.drafter is not None else [])]


def nothing(model: Model) -> None:
    pass


def every(names: str, factor: float, row: int | None = None) -> Edit:
    """Weights of all layers, the drafter's too, times a factor; row: that one alone."""

    def edit(model: Model) -> None:
        for layer in layers(model):
            for name in names.split():
                module = layer
                for part in name.split("."):
                    module = module[part]
                factors = np.full(module.weight.shape[0], factor if row is None else 1, np.float32)
                factors[slice(None) if row is None else row] = factor
                module.weight = module.weight * mx.array(factors).reshape(-1, *[1] * (module.weight.ndim - 1))

    return edit


def whole(name: str, factor: float) -> Edit:
    """A part of the decoder times a factor."""

    def edit(model: Model) -> None:
        part = model.language_model[name]
        part.weight = part.weight * factor

    return edit


GATE_UP = "mlp.gate_proj mlp.up_proj"
POST = "post_attention_layernorm post_feedforward_layernorm"
PRE = "input_layernorm pre_feedforward_layernorm"
PLANTED: dict[str, Edit] = {
    "as it is": nothing,
    "a residual of 2e5 in one dimension": every("post_feedforward_layernorm", 1e5, 3),
    "a residual of 2e5 everywhere": every(POST, 1e5),
    "embeddings of 1e4": whole("embed_tokens", 1e4),
    "products of 1e6": every(GATE_UP, 1e3),
    "products of 1e8": every(GATE_UP, 1e4),
    "products of 1e6 in one neuron": every(GATE_UP, 1e3, 5),
    "products of 1e8 in one neuron": every(GATE_UP, 1e4, 5),
    "gates of 1e5": every("mlp.gate_proj", 3e4),
    "up of 1e5": every("mlp.up_proj", 3e4),
    "a gate of 1e5": every("mlp.gate_proj", 3e4, 5),
    "sums of 1e5": every("mlp.down_proj self_attn.o_proj", 1e4),
    "norms of 1e4": every(PRE, 1e4),
    "a last norm of 1e4": whole("norm", 1e4),
    "tiny sums": every("mlp.down_proj self_attn.o_proj", 1e-3),
    "tiny products": every(GATE_UP, 1e-2),
    "tiny gates": every("mlp.gate_proj", 1e-3),
    "tiny embeddings": whole("embed_tokens", 1e-3),
    "tiny norms": every(f"{PRE} {POST}", 1e-3),
}


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """On a CPU the eps of each norm would be a kernel of its own, compiled for seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# --- how near ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_logits_are_nearer_to_float32_than_those_of_bfloat16(checkpoint: str, tmp_path: Path) -> None:
    shape, seed = CHECKPOINTS[checkpoint]
    exact, half, found = all_logits(write_checkpoint(tmp_path, shape, seed), shape, list(LAYOUTS), nothing)
    for name in LAYOUTS:
        assert error(found[name], exact[name]) < error(half[name], exact[name]) / 4, name


@pytest.mark.parametrize("planted", PLANTED)
def test_no_weights_are_too_large_or_too_small(planted: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TINY)
    write_drafter(folder / "drafter", TINY)
    names = ["text", "sound_then_image_then_frames"]
    exact, half, found = (
        np.concatenate(list(own.values())) for own in all_logits(folder, TINY, names, PLANTED[planted])
    )
    assert np.isfinite(found).all()
    assert error(found, exact) <= error(half, exact)
    assert (found.argmax(-1) == exact.argmax(-1)).mean() > 0.95


@pytest.mark.parametrize("planted", [name for name in PLANTED if "2e5" in name or "1e6" in name or "1e8" in name])
def test_greedy_replies_drafted_or_not_are_those_of_float32(planted: str, tmp_path: Path, uncompiled: None) -> None:
    folder = write_planted(tmp_path, TINY, seed=1, plant=2.2)
    replies = []
    for dtype in (mx.float32, mx.float16):
        model = in_type(folder, dtype, PLANTED[planted])
        for length in (0, 3):
            rounds = Rounds(model, make_sampler(model, GREEDY), prompt_of("text", TINY))
            while len(rounds.tokens) < 24:
                rounds.run(length)
            replies.append(rounds.tokens[:24])
    assert replies[1:] == replies[:1] * 3


def test_a_wide_model_with_one_large_neuron_is_nearer_than_bfloat16(tmp_path: Path) -> None:
    edit = PLANTED["products of 1e8 in one neuron"]
    exact, half, found = (own["text"] for own in all_logits(write_checkpoint(tmp_path, WIDE), WIDE, ["text"], edit))
    assert error(found, exact) <= error(half, exact)


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 32, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_quantized_weights_stay_as_near(tmp_path: Path, mode: str, group_size: int, bits: int) -> None:
    folder = write_checkpoint(tmp_path, TINY)

    def edit(model: Model) -> None:
        every(GATE_UP, 1e3, 5)(model)
        nn.quantize(model, group_size, bits, mode=mode)

    exact, half, found = (own["text"] for own in all_logits(folder, TINY, ["text"], edit))
    assert error(found, exact) <= error(half, exact)


# --- what it costs -----------------------------------------------------------------------------


VIEWS = ("Transpose", "Reshape", "Unflatten", "Flatten", "ExpandDims", "Squeeze", "Broadcast", "Split", "Slice")


def kernels(file: Path, array: mx.array) -> int:
    """Of a graph that is not evaluated: its operations that are no views."""
    mx.export_to_dot(str(file), array)
    return sum(name not in VIEWS for name in re.findall(r'label ="([^"]*)", shape=rectangle', file.read_text()))


def round_kernels(model: Model, file: Path) -> int:
    """Of a plain round, compiled."""
    prompt, sampler = prompt_of("text", TINY), make_sampler(model, GREEDY)
    caches = model.caches(64)
    *_, hidden = model.read(prompt, caches)
    state = first_state(model, sampler, prompt.token_ids, hidden[:, -1:], 0)
    mx.eval(state, caches.arrays)
    return kernels(file, make_round(model, sampler.stages, 0)(state, caches.arrays)[0])


def test_a_layer_costs_one_norm_more_than_in_bfloat16(tmp_path: Path) -> None:
    folder, graph = write_checkpoint(tmp_path / "model", TINY), tmp_path / "graph.dot"
    half, found = (round_kernels(in_type(folder, dtype, nothing), graph) for dtype in TYPES[1:])
    x = mx.zeros((1, 1, TINY.mlp), mx.float16)
    norm = kernels(graph, mx.compile(lambda x: mx.fast.rms_norm(x, mx.ones(TINY.mlp, mx.float16), 1.0))(x + 1)) - 2
    assert 0 < norm < 6 and half > 300  # one kernel on a GPU, its operations on a CPU
    assert found <= half + 6 * TINY.periods * norm


def test_hidden_states_and_caches_are_float16(tmp_path: Path) -> None:
    model = in_type(write_checkpoint(tmp_path, TINY), mx.float16, nothing)
    prompt = prompt_of("sound_then_image_then_frames", TINY)
    caches = model.caches(len(prompt))
    hidden = list(model.read(prompt, caches))
    assert {own.dtype for own in hidden} == {mx.float16}
    assert {array.dtype for own in caches.arrays for array in own} == {mx.float16}
    assert model.embed(prompt, 0, len(prompt)).dtype == mx.float16


# --- what cannot be -----------------------------------------------------------------------------


def test_scores_that_no_power_of_two_makes_smaller_are_a_reason_not_to(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TINY)
    assert float16_is_safe(unarranged(folder, mx.float16, nothing)) is None
    reason = float16_is_safe(unarranged(folder, mx.float16, every("self_attn.q_norm", 1e4)))
    assert reason is not None and reason.startswith("attention's scores may reach ")


def test_a_checkpoint_with_such_scores_stays_in_its_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "emulates_bfloat16", lambda: True)
    folder = write_checkpoint(tmp_path, TINY, dtype=mx.bfloat16)
    assert open_checkpoint(folder, None).config.dtype == mx.float16
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.language_model.layers.3.self_attn.q_norm.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | {name: tensors[name] * 1e4}, {"format": "pt"})
    assert open_checkpoint(folder, None).config.dtype == mx.bfloat16
    with pytest.raises(
        CheckpointError, match=r"^attention's scores may reach .*; expected bfloat16 or float32, for dty"
    ):
        load(folder, dtype="float16")
