"""What is predicted is what generating takes, and what does not fit is said."""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import WIDE, joining
from toy_checkpoint import Shape, config, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, Sampling, generate, load, planner, stream_generate
from mlx_gemma4.config import FULL, SLIDING, GenerationConfig, TextConfig, parse_config
from mlx_gemma4.convert.command import convert
from mlx_gemma4.decoding.controller import MAX_DRAFTS
from mlx_gemma4.engine import reading
from mlx_gemma4.model import cache as cache_module
from mlx_gemma4.model.cache import AHEAD, ROUND, capacity, sliding_slots
from mlx_gemma4.model.model import CHUNK, Model, chunks
from mlx_gemma4.planner import (
    Footprint,
    check_memory,
    footprint,
    longest,
    memory_limit,
    predict,
    predict_tuning,
    reading_bytes,
)
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.load import DrafterChoice, find_drafter, load_values, open_checkpoint, parameters


@pytest.fixture(scope="module")
def bfloat16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("memory") / "half", WIDE, dtype=mx.bfloat16)


@pytest.fixture(scope="module")
def quantized_folder(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory") / "quantized"
    convert(hf_path=str(wide_folder), mlx_path=str(made), q_bits=4)
    return made


def footprint_of(folder: Path, drafter: str | None) -> Footprint:
    return open_checkpoint(folder, find_drafter(folder, folder, drafter)).footprint


# --- the prediction ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    folder: str
    drafter: str | None
    prompt_tokens: int
    reply_tokens: int
    step: int | None = None  # of what is reserved and of how it grows, where it is to grow soon


CASES = {
    "short": Case("wide_folder", None, 60, 8),
    "a chunk": Case("wide_folder", None, 512, 8),
    "chunks": Case("wide_folder", None, 1300, 8),
    "a reply that outgrows the cache": Case("wide_folder", None, 250, 260, step=128),
    "drafts": Case("wide_folder", "auto", 300, 12),
    "bfloat16": Case("bfloat16_folder", None, 100, 8),
    "4 bits with drafts": Case("quantized_folder", "auto", 200, 12),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_peak_is_predicted_within_a_twentieth(
    case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.step is not None:
        for module, name in ((cache_module, "STEP"), (planner, "AHEAD"), (reading, "AHEAD")):
            monkeypatch.setattr(module, name, case.step)
        assert capacity(case.prompt_tokens + case.step + ROUND) < capacity(
            case.prompt_tokens + case.reply_tokens + ROUND
        )
    folder = request.getfixturevalue(case.folder)
    predicted = footprint_of(folder, case.drafter)
    gc.collect()  # models of other tests, which would go while this one is measured
    others = mx.get_active_memory()
    with joining():
        model, processor = load(folder, case.drafter)
    model.config = replace(model.config, generation=replace(model.config.generation, eos_token_ids=()))
    assert mx.get_active_memory() - others == pytest.approx(predicted.weights + predicted.drafter, rel=0.01)
    prompt = Prompt([200 + i % 100 for i in range(case.prompt_tokens)])
    peak, greedy = 0, Sampling(temperature=0)
    drafts = MAX_DRAFTS if case.drafter else 0
    for _ in range(2):  # on a busy machine MLX hands over less at once, and takes less
        reply = generate(
            model, processor, prompt, max_tokens=case.reply_tokens, sampling=greedy, draft_length=drafts,
            repetition_detection="off",
        )  # fmt: skip
        assert reply.stats.generation_tokens == case.reply_tokens
        peak = max(peak, reply.stats.peak_memory - others)
    assert predict(predicted, case.prompt_tokens, case.reply_tokens).peak == pytest.approx(peak, rel=0.05)


def test_the_last_chunk_of_a_long_prompt_is_predicted(wide_folder: Path) -> None:
    """Where scores are largest; the rows before it are zeros, which take as much memory and no time."""
    predicted, model = footprint_of(wide_folder, None), load(wide_folder, None)[0]
    prompt = Prompt([200 + i % 100 for i in range(16384)])
    (start, end) = list(chunks(prompt, 0, CHUNK))[-1]
    peak = 0
    for _ in range(3):  # on a busy machine MLX hands over less at once, and takes less
        caches = model.caches(len(prompt))
        caches.length = start
        mx.eval(caches.arrays)
        mx.clear_cache()
        before = mx.get_active_memory() - predicted.row_bytes(SLIDING) * sliding_slots(WIDE.window)
        mx.reset_peak_memory()
        list(model.read(prompt, caches))
        peak = max(peak, mx.get_peak_memory() - before)
        del caches
    assert reading_bytes(predicted, start, end) == pytest.approx(peak, rel=0.15)


LONG = 40_000  # a context whose last step of an eighth would be 4096 slots


def with_context(text: TextConfig, tokens: int) -> TextConfig:
    return replace(text, max_position_embeddings=tokens)


@pytest.mark.parametrize(
    ("prompt_tokens", "reply_tokens"), [(700, 600), (768, 256), (100, 5000), (9000, 8200), (LONG - 9000, 9000)]
)
def test_caches_are_predicted_exactly(wide_folder: Path, prompt_tokens: int, reply_tokens: int) -> None:
    """As `decode` reserves them, round by round."""
    model = load(wide_folder, None)[0]
    model.config = replace(model.config, text=with_context(model.config.text, LONG))
    caches = model.caches(prompt_tokens + min(reply_tokens, AHEAD) + ROUND)
    for count in range(1, reply_tokens, 8):
        caches.reserve(prompt_tokens + count - 1 + ROUND + ROUND)
    own = footprint_of(wide_folder, "auto")
    found = predict(replace(own, text=with_context(own.text, LONG)), prompt_tokens, reply_tokens)
    assert sum(array.nbytes for arrays in caches.arrays for array in arrays) == found.sliding + found.full


def test_a_layer_that_grows_is_there_twice(wide_folder: Path) -> None:
    model = footprint_of(wide_folder, None)
    model = replace(model, text=with_context(model.text, LONG))
    before, short, long = (capacity(10 + tokens + ROUND) for tokens in (AHEAD, 4000, 6000))
    alone = predict(model, 10, 4000)
    assert alone.full == short * model.row_bytes(FULL) > alone.workspace  # it has all its slots from the start
    assert predict(model, 10, AHEAD).full == before * model.row_bytes(FULL)
    found = predict(model, 10, 6000)
    assert found.full == long * model.row_bytes(FULL) > before * model.row_bytes(FULL)
    assert found.workspace == alone.workspace + found.full  # there is one full layer


def test_the_longest_is_the_last_that_fits() -> None:
    assert longest(lambda tokens: tokens <= 37, 100) == 37
    assert longest(lambda tokens: True, 100) == 100
    assert longest(lambda tokens: False, 100) == 0


# --- what it depends on ------------------------------------------------------------------------


def test_a_folder_and_the_model_loaded_from_it_have_one_footprint(quantized_folder: Path) -> None:
    model, _ = load(quantized_folder)
    assert footprint_of(quantized_folder, "auto") == footprint(model.config, parameters(model))


def test_a_partner_is_counted_as_it_will_be_quantized(bfloat16_folder: Path, tmp_path: Path) -> None:
    own = write_drafter(tmp_path, WIDE, dtype=mx.bfloat16)
    checkpoint = open_checkpoint(bfloat16_folder, DrafterChoice(own, "partner", quantize=True))
    whole = open_checkpoint(bfloat16_folder, DrafterChoice(own, "partner", quantize=False)).footprint.drafter
    assert checkpoint.footprint.drafter < 0.3 * whole
    for _ in load_values(checkpoint):
        pass
    assert checkpoint.footprint == footprint(checkpoint.config, parameters(checkpoint.model))


def test_caches_have_the_computing_type(wide_folder: Path, bfloat16_folder: Path) -> None:
    assert footprint_of(wide_folder, None).item_bytes == 4
    assert footprint_of(bfloat16_folder, None).item_bytes == 2
    asked = open_checkpoint(wide_folder, None, mx.float16).footprint
    assert (asked.item_bytes, 2 * asked.weights) == (2, footprint_of(wide_folder, None).weights)


# --- what does not fit -------------------------------------------------------------------------


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**30 < memory_limit() < 2**50


def test_the_longest_prompt_that_fits_is_named(wide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = footprint_of(wide_folder, "auto")
    room = predict(model, 1000, 10).peak
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: room)
    check_memory(model, 1000, 10)
    expected = longest(lambda tokens: predict(model, tokens, 10).peak <= room, 4000)
    with pytest.raises(MemoryError, match=rf"^a prompt of 4000 tokens needs .* a prompt of at most {expected} tokens$"):
        check_memory(model, 4000, 10)


def test_a_model_that_fits_with_no_prompt_is_too_large(wide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = footprint_of(wide_folder, None)
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: model.weights)
    message = r"^the model needs 0\.1 GB, 0\.1 of them for weights, and this machine lets a model hold 0\.1 GB; "
    with pytest.raises(MemoryError, match=message + "expected a smaller model or fewer bits a weight"):
        check_memory(model)


def test_of_a_reply_only_the_beginning_has_to_fit(wide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = footprint_of(wide_folder, None)
    room = predict(model, 10, 256).peak
    assert predict(model, 10, 3000).peak > room
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: room)
    check_memory(model, 10, 3000)


def test_generate_says_what_does_not_fit_when_it_is_called(
    tiny: tuple[Model, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: 1000)
    with pytest.raises(MemoryError, match="the model needs"):
        stream_generate(model, processor, "a")


# --- training ----------------------------------------------------------------------------------

SMALL = Shape(hidden=256, mlp=1024, heads=4, kv_heads=2, head_dim=64, global_head_dim=128, window=256, vocab=4096)
# Shape, tokens, whether layers are computed twice; weights, numbers trained, and the peak of a step that was measured.
STEPS = [
    (SMALL, 256, True, 38559256, 135680, 73049708),
    (SMALL, 512, True, 38559256, 135680, 105725308),
    (SMALL, 512, False, 38559256, 135680, 250890684),
    (replace(SMALL, hidden=512, vocab=2048, periods=2), 512, True, 121414704, 1421312, 227342852),
    (replace(SMALL, hidden=512, vocab=2048, periods=2), 512, False, 36922416, 355328, 456368772),
    (replace(SMALL, mlp=512, heads=8, kv_heads=4, vocab=32768), 256, True, 63462936, 118272, 105093968),
    (replace(SMALL, hidden=128, mlp=256, heads=8, vocab=1024), 512, True, 12427800, 73728, 91781600),
    (replace(SMALL, hidden=128, mlp=256, heads=8, vocab=1024), 768, True, 12427800, 73728, 152028532),
    (replace(SMALL, hidden=128, mlp=256, heads=8, vocab=1024), 512, False, 12427800, 73728, 174120200),
    (replace(SMALL, hidden=384, mlp=1536, vocab=8192), 256, False, 78453288, 387072, 230950792),
    (replace(SMALL, hidden=384, mlp=1536, vocab=8192), 384, True, 25535000, 387072, 106626680),
]


@pytest.mark.parametrize("step", STEPS)
def test_a_training_step_takes_what_is_predicted(step: tuple[Shape, int, bool, int, int, int]) -> None:
    """As measured with mlx_gemma4.tune in float32 on a CPU, weights plain or at 4 bits, all tokens learnt or half."""
    shape, tokens, checkpoint, weights, trained, peak = step
    text = parse_config(config(shape), GenerationConfig(eos_token_ids=())).text
    found = predict_tuning(Footprint(text, 4, weights), trained, tokens, checkpoint, len(text.layer_types))
    assert found.peak == pytest.approx(peak, rel=0.07)


# Shape and the last layers that are trained; by how much less a step took than with all, of 507 tokens.
FEWER = [
    (SMALL, 2, 92619484),
    (SMALL, 3, 69370408),
    (replace(SMALL, hidden=512, vocab=2048, periods=2), 2, 265752160),
    (replace(SMALL, hidden=512, vocab=2048, periods=2), 6, 162608328),
]


@pytest.mark.parametrize("fewer", FEWER)
def test_of_the_layers_before_those_that_are_trained_nothing_is_kept(fewer: tuple[Shape, int, int]) -> None:
    """As measured with mlx_gemma4.tune --no-grad-checkpoint, the adapter's own numbers among it."""
    shape, layers, less = fewer
    text = parse_config(config(shape), GenerationConfig(eos_token_ids=())).text
    every, some = (
        predict_tuning(Footprint(text, 4, 0), 0, 507, False, own).peak for own in (len(text.layer_types), layers)
    )
    assert every - some == pytest.approx(less, rel=0.15)
