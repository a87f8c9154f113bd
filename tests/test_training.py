"""The demo's training: its items are right, and what it trains is the model that the package runs."""

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import Formatter

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from PIL import ImageFont

from mlx_gemma4.config import read_config
from mlx_gemma4.model.arrange import arrange
from mlx_gemma4.model.drafter import Drafter, read_drafter_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor, load_processor
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.toolcall import parse_tool_call
from mlx_gemma4.tune.state import merge, save, trees_of
from mlx_gemma4.weights.load import parameters
from training.checkpoint import write_files
from training.draft import loss as draft_loss
from training.draft import propose
from training.films import FRAMES, film_item
from training.forward import (
    attend,
    cross_entropy,
    for_heads,
    gelu,
    hidden_states,
    learnt_logits,
    loss,
    norm,
    rms_norm,
    turn,
    turns_of,
)
from training.items import Item, Question
from training.material import RATE, Material
from training.mixture import both_item, image_item, item
from training.pictures import SAME_COLOUR, SAME_KIND, SIDES, number_item, shapes_item
from training.rows import Passage, batch, passage
from training.sounds import beeps_item, still_item, tone_item
from training.start import initialise, initialise_drafter
from training.texts import is_good_story, is_held_out_sum, story, story_item, text_item
from training.tokens import make_tokenizer
from training.tools import TOOLS, tool_item
from training.train import LOOKING, Source, as_quantized, optimizer
from training.world import COLOURS, HEROES, MEDIUM_OF, MONTHS, SHAPES, THINGS, WORDINGS, plain, worded

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """One font that comes with Pillow, and tones for digits: enough to see that items fit together."""
    font = tmp_path_factory.mktemp("fonts") / "font.ttf"
    font.write_bytes(ImageFont.load_default(20).path.getvalue())
    t = np.arange(4000, dtype=np.float32) / RATE
    clips = {digit: [np.sin(6.28 * 200 * (digit + 1) * t).astype(np.float32)] for digit in range(10)}
    return Material(False, [str(font)], clips)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Drafter, Processor]:
    """The demo's model with fewer dimensions, as training starts it."""
    folder = tmp_path_factory.mktemp("small")
    write_files(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "global_head_dim": 32}
    for name in ("config.json", "drafter/config.json"):
        raw = json.loads((folder / name).read_text())
        raw["text_config"] |= sizes if name == "config.json" else sizes | {"hidden_size": 32}
        if name == "config.json":
            raw["vision_config"] |= {"mm_embed_dim": 64, "output_proj_dims": 64}
        else:
            raw["backbone_hidden_size"] = 64
        (folder / name).write_text(json.dumps(raw))
    config = read_config(folder)
    model, drafter = Model(config), Drafter(read_drafter_config(folder / "drafter"))
    initialise(model, 0)
    initialise_drafter(drafter, 0)
    return model, drafter, load_processor(folder, config)


def arranged(model: Model, drafter: Drafter | None = None) -> Model:
    """As it is in use: a copy, for training goes on with the checkpoint's names and order."""
    copied = Model(model.config)
    copied.load_weights(list(parameters(model).items()))
    copied.drafter = copy.deepcopy(drafter)
    arrange(copied)
    return copied


# --- items -------------------------------------------------------------------------------------


def test_train_and_held_out_share_no_wording() -> None:
    every = WORDINGS | {tool.name: tool.wordings for tool in TOOLS}
    for task, said in every.items():
        assert len(said.train) >= 4, task
        assert len(said.held_out) >= 2, task
        slots = {name: name for text in said.train for _, name, _, _ in Formatter().parse(text) if name}
        held_out = {plain(text.format(**slots)) for text in said.held_out}
        rng = random.Random(task)
        asked = {plain(worded(rng, said, False, True, slots, MEDIUM_OF.get(task))) for _ in range(2000)}
        assert len(asked) > 100, task
        assert not [text for text in asked if any(wording in text for wording in held_out)], task


def nearest_colour(pixel: tuple[int, ...]) -> str:
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], pixel, strict=True)))


@pytest.mark.parametrize("held_out", [False, True])
def test_pictures_show_what_their_answers_say(held_out: bool) -> None:
    rng = random.Random(int(held_out))
    for _ in range(40):
        shown, shapes = shapes_item(rng, held_out)
        image = shown.media[0]["image"]
        for shape in shapes:
            at = int(shape.x * image.width), int(shape.y * image.height)
            assert nearest_colour(image.getpixel(at)) == shape.colour
        for question in shown.questions:
            check_shape_answer(question, shapes)


def check_shape_answer(question: Question, shapes: list) -> None:
    """The answer, worked out again from the words of the question."""
    names = [str(shape) for shape in shapes]
    numbers = [int(number) for number in re.findall(r"\d+", question.answer)]
    if question.task == "count shapes":
        assert numbers == [len(shapes)]
    elif question.task == "count some":
        what = re.findall(r"number of (?:(\w+) \w+|(circle|square|triangle|star|cross)e?s) is", question.answer)[0]
        assert numbers == [sum(what[0] == s.colour if what[0] else what[1] == s.kind for s in shapes)]
        assert (what[0] or what[1]) in question.text
    elif question.task == "describe picture":
        assert Counter(re.findall(r"(\w+ (?:circle|square|triangle|star|cross))", question.answer)) == Counter(names)
    elif question.task in ("beside", "furthest"):
        assert re.fullmatch(r"The (.*)\.", question.answer)[1] in names
    elif question.task == "is beside":
        first, second = sorted((s for s in shapes if s.kind in question.text), key=lambda s: question.text.find(s.kind))
        asked = next(side for side, forms in SIDES.items() for form in forms if f" {form} " in question.text)
        true = {"left": first.x < second.x, "right": first.x > second.x,
                "above": first.y < second.y, "below": first.y > second.y}  # fmt: skip
        where, says = re.fullmatch(
            rf"The {first.kind} is (.*) the {second.kind}\. (Yes|No)\.", question.answer
        ).groups()
        assert true[where.split()[0]]
        assert says == ("Yes" if true[asked] else "No")
    else:
        fact = (question.answer.split()[-1].rstrip("."), question.answer.split()[1])
        assert any(fact[0] in (s.colour, s.kind) for s in shapes)


def test_films_move_as_told() -> None:
    rng = random.Random(2)
    for _ in range(30):
        film = film_item(rng, False)
        answers = {question.task: question.answer for question in film.questions}
        colour = COLOURS[answers["film colour"].split()[-1].rstrip(".")]
        centres = []
        for frame in film.media[0]["video"]:
            near = np.abs(np.asarray(frame, np.int16) - colour).max(axis=-1) <= 14
            centres.append(np.argwhere(near).mean(axis=0) if near.sum() > 30 else None)
        assert len(centres) == FRAMES
        first = next(i for i, centre in enumerate(centres) if centre is not None)
        assert answers["appears"] == f"It appears at 00:0{first}."
        dy, dx = centres[-1] - centres[first]
        way = "left" if dx < -abs(dy) else "right" if dx > abs(dy) else "up" if dy < 0 else "down"
        still = abs(dx) < 2 and abs(dy) < 2
        assert answers["direction"] == ("It does not move." if still else f"It moves {way}.")


def loud_runs(samples: np.ndarray) -> int:
    """How often sound begins after at least 60 ms without."""
    frames = np.abs(samples[: len(samples) // 160 * 160]).reshape(-1, 160).max(axis=1)  # 10 ms each
    loud = frames > 0.35 * frames.max()
    starts = [i for i in range(len(loud)) if loud[i] and not loud[max(i - 6, 0) : i].any()]
    return len(starts)


@pytest.mark.parametrize("held_out", [False, True])
def test_sounds_are_what_their_answers_say(held_out: bool) -> None:
    rng = random.Random(3)
    for _ in range(30):
        sound = beeps_item(rng, held_out)
        assert str(loud_runs(sound.media[0]["audio"][0])) in sound.questions[0].answer
    for _ in range(30):
        sound = tone_item(rng, held_out)
        samples, _ = sound.media[0]["audio"]
        inside = np.flatnonzero(np.abs(samples) > 0.1 * np.abs(samples).max())
        pitches = [
            np.abs(np.fft.rfft(samples[at : at + 2000] * np.hanning(2000), 16000)).argmax()
            for at in (inside[0] + 500, inside[-1] - 2500)
        ]
        ratio = pitches[1] / pitches[0]
        way = "rising" if ratio > 1.08 else "falling" if ratio < 0.92 else "steady"
        assert sound.questions[0].answer == f"It is {way}."
    for _ in range(20):
        sound = still_item(rng, held_out)
        loud = np.abs(sound.media[0]["audio"][0]).max() > 0.02
        assert sound.questions[0].answer == ("It is noise." if loud else "It is silence.")


@pytest.mark.parametrize("held_out", [False, True])
def test_texts_have_right_answers(held_out: bool) -> None:
    rng, months = random.Random(4), list(MONTHS)
    for _ in range(400):
        question = text_item(rng, held_out).questions[0]
        numbers = [int(number) for number in re.findall(r"\d+", question.answer)]
        if question.task == "add":
            a, b, total = numbers
            assert a + b == total
            assert is_held_out_sum(a, b) == held_out
        elif question.task == "spell":
            assert question.answer.replace("-", "") in question.text
        elif question.task == "reverse":
            assert question.answer[::-1] in question.text
        elif question.task == "letters":
            assert len(question.answer.split()[0]) == numbers[0]
        elif question.task == "count up":
            assert numbers == list(range(numbers[0], numbers[-1] + 1))
        elif question.task == "month number":
            assert question.answer == f"{months[int(re.findall(r'[0-9]+', question.text)[0]) - 1]}."


def test_the_rule_for_stories() -> None:
    rng = random.Random(5)
    for _ in range(200):
        hero, thing = rng.choice(HEROES), rng.choice(THINGS)
        text = story(rng, hero, thing)
        assert is_good_story(text, hero, thing), text
        other = next(animal for animal in HEROES if animal not in text)
        assert not is_good_story(text, other, thing)
        assert not is_good_story(text.removesuffix(" The end."), hero, thing)
        assert not is_good_story(text.replace(f"the {hero}", "the whale", 1), hero, thing)
        sentences = text.split(". ")
        assert not is_good_story(". ".join([sentences[1], sentences[0], *sentences[2:]]), hero, thing)


def test_items_depend_on_their_seed_alone() -> None:
    """Not on the order of a set of strings, which is another in each process."""
    program = "import random; from training.pictures import shapes_item; rng = random.Random(1)\n"
    program += "for _ in range(20): print(shapes_item(rng, False)[0].questions)"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(outputs) == 1


# --- rows --------------------------------------------------------------------------------------


def test_the_tokenizer_keeps_every_text() -> None:
    tokenizer, size = make_tokenizer()
    assert size % 64 == 0
    assert tokenizer.to_str() == make_tokenizer()[0].to_str()
    for text in ("What colour is the circle?", "Spell zuqab, é and 中!", "  two  spaces\n", "27 + 45 = 72."):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("What colour is the circle?").ids) == 6


def passages(processor: Processor, material: Material, seed: int) -> list[Passage]:
    rng = random.Random(seed)
    found = [passage(processor, item(rng, kind, material), rng, 240) for kind in ("image", "audio", "both")]
    found += [passage(processor, one, rng, 240) for one in (tool_item(rng, False), story_item(rng, False))]
    return [*found, passage(processor, number_item(rng, material), rng, 240)]


def test_a_prompt_in_training_is_the_prompt_in_use(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    processor, rng = small[2], random.Random(6)
    for one in (image_item(rng, material), both_item(rng, material)):
        row = passage(processor, one, random.Random(1), 500)  # this seed: without thinking
        for question, segment in zip(one.questions, row.segments, strict=False):
            asked = processor([{"role": "user", "content": [*one.media, {"type": "text", "text": question.text}]}])
            assert row.prefix + segment.ids[: segment.answer] == asked.token_ids
            assert processor.tokenizer.decode(segment.ids[segment.answer :]) == question.answer
    calls = [tool_item(rng, False) for _ in range(12)]
    for question in (one.questions[0] for one in calls if one.questions[0].response is None):
        row = passage(processor, Item("tool", (question,)), random.Random(0), 500)
        ids, start = row.segments[0].ids, row.segments[0].answer
        text = processor.tokenizer.decode(ids[start:], skip_special_tokens=False)
        call = re.fullmatch(r"<\|tool_call>(.*)<tool_call\|><\|tool_response>", text)[1]
        assert parse_tool_call(call) == question.call


def test_rows_give_what_the_model_gives(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    """Every question of every row, asked alone."""
    model, _, processor = small
    row = passages(processor, material, 7)
    one = batch([row[:1], row[1:2], row[2:3], row[3:]], 800, 48, 640)
    got = model.language_model.head(hidden_states(model, one)[0])
    in_use = arranged(model)
    for number, members in enumerate([row[:1], row[1:2], row[2:3], row[3:]]):
        at = 0
        for member in members:
            at += len(member.prefix)
            for segment in member.segments:
                wanted = in_use.logits(Prompt(member.prefix + segment.ids, member.media))[0, len(member.prefix) :]
                here = got[number, at : at + len(segment.ids)]
                assert mx.max(mx.abs(here - wanted)).item() < 2e-3 * mx.max(mx.abs(wanted)).item()
                at += len(segment.ids)


def test_learnt_tokens_are_those_of_the_answers(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    row = passages(small[2], material, 8)
    one = batch([row], 1200, 48, 640)
    answers = [token for member in row for segment in member.segments for token in segment.ids[segment.answer :]]
    of_answers = one.weights == 1
    assert one.targets[of_answers].tolist() == answers
    assert one.ids.reshape(-1)[one.learnt[of_answers] + 1].tolist() == answers
    hints = [token for member in row for _, token in member.hints]
    assert hints and one.targets[~of_answers].tolist() == hints
    assert (one.soft.reshape(-1)[one.learnt[~of_answers]] > 0).all()


def test_hints_are_said_after_four_layers(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    model = small[0]
    layers = model.language_model.layers
    one = batch([passages(small[2], material, 8)], 1200, 48, 640)
    hidden, early, _ = hidden_states(model, one)
    logits = learnt_logits(model, hidden, early, one)
    late, soon = (model.language_model.head(states)[0][mx.array(one.learnt)] for states in (hidden, early))
    assert mx.allclose(logits, mx.where(mx.array(one.answers)[:, None], late, soon), atol=1e-4)
    model.language_model.layers = layers[:4]
    cut, _, _ = hidden_states(model, one)
    model.language_model.layers = layers
    assert mx.allclose(cut, early, atol=1e-5)


def test_media_stand_alone_at_first(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    source = Source(small[2], material, "a seed")
    for number, questions in ((0, 0), (LOOKING, 2)):
        rows = [source.row(kind, 256, number) for kind in ("image", "audio", "both")]
        asked = [len(one.segments) for row in rows for one in row]
        assert max(asked) == questions and len(asked) > 6 / (1 + questions)
        assert all(one.segments for one in source.row("text", 256, number))
    first = [vars(one) for one in source.step(3)]
    source.step(4)
    for one, again in zip(first, source.step(3), strict=True):  # whatever was drawn before
        assert all(np.array_equal(value, vars(again)[name]) for name, value in one.items())


def test_hints_say_what_lies_under_them(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    """A patch said to be of a colour has pixels of it; a frame with a number has so many beeps up to it."""
    processor, rng = small[2], random.Random(11)
    said, missed = Counter[str](), 0
    for _ in range(12):
        one = shapes_item(rng, False)[0]
        row = passage(processor, one, rng, 500)
        run = row.media[0]
        for place, token in row.hints:
            word = processor.tokenizer.decode([token]).strip()
            if word in COLOURS and word != "black":
                pixels = run.values[place - run.start].reshape(-1, 3).astype(int)
                said[word] += 1
                missed += np.abs(pixels - COLOURS[word]).max(axis=1).min() > 60  # beside a star's arm
        one = beeps_item(rng, False)
        row = passage(processor, one, rng, 500)
        run = row.media[0]
        loud = np.abs(run.values).max(axis=1) > 0.12
        begun = np.cumsum(loud & ~np.concatenate([[False], loud[:-1]]))
        for place, token in row.hints:
            frame = place - run.start
            if frame > 1 and loud[frame - 2 : frame + 1].all():  # not where one begins
                assert int(processor.tokenizer.decode([token])) == begun[frame]
                said["beep"] += 1
    assert len(said) > 5 and said["beep"] > 20
    assert missed < 0.05 * said.total()


def test_every_picture_has_hints(material: Material) -> None:
    rng = random.Random(13)
    items = [image_item(rng, material) for _ in range(120)]
    assert any(question.task == "unknown" for item in items for question in item.questions)
    assert all(item.hints for item in items)


def test_hints_say_how_many_shapes_are_alike() -> None:
    rng, checked = random.Random(12), 0
    for _ in range(60):
        shown = shapes_item(rng, False)[0]
        for question in shown.questions:
            if question.task == "count some":
                number = int(re.search(r"\d", question.answer)[0])
                name = next(name for name in (*COLOURS, *SHAPES) if name in question.answer)
                said = [hint.words for hint in shown.hints if name in hint.words]
                assert len(said) == number
                words = SAME_COLOUR if name in COLOURS else SAME_KIND
                assert all(words[number - 1] in one for one in said)
                checked += number
    assert checked > 60


# --- training ----------------------------------------------------------------------------------


def test_gradients_are_those_of_mlx(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    x = mx.random.normal((7, 33), key=mx.random.key(0)) * 4
    w = mx.random.normal((7, 33), key=mx.random.key(1))
    scale = 1 + 0.3 * w[0]

    def same(own: Callable[..., mx.array], plain: Callable[..., mx.array], *given: mx.array) -> None:
        where = list(range(len(given)))
        pull = mx.random.normal(plain(*given).shape, key=mx.random.key(2))
        for mine, theirs in zip(
            (own(*given), *mx.grad(lambda *y: (own(*y) * pull).sum(), where)(*given)),
            (plain(*given), *mx.grad(lambda *y: (plain(*y) * pull).sum(), where)(*given)),
            strict=True,
        ):
            assert mx.allclose(mine, theirs, rtol=1e-4, atol=5e-5)

    def plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        k, v = mx.repeat(k, 2, axis=1), mx.repeat(v, 2, axis=1)
        return (mx.softmax(q @ k.swapaxes(2, 3) + mask, axis=-1) @ v).swapaxes(1, 2).flatten(2)

    same(lambda y: gelu(y), nn.gelu_approx, x)
    same(lambda y, s: rms_norm(y, s, mx.array(1e-6)), lambda y, s: mx.fast.rms_norm(y, s, 1e-6), x, scale)
    mask = for_heads(mx.where(mx.tril(mx.ones((2, 9, 9))) > 0, 0.0, -1e4), 4)
    q, k, v = (mx.random.normal((2, heads, 9, 8), key=mx.random.key(heads + 3)) for heads in (4, 2, 2))
    same(lambda q, k, v: attend(q, k, v, mask), plain_attention, q, k, v)
    targets = mx.arange(7)
    mine, theirs = (mx.grad(lambda y, f=f: f(y, targets).sum())(x) for f in (cross_entropy, nn.losses.cross_entropy))
    assert mx.allclose(cross_entropy(x, targets), nn.losses.cross_entropy(x, targets), atol=2e-5)
    assert mx.allclose(mine, theirs, atol=2e-5)


def test_training_learns_and_goes_on_where_it_stopped(
    small: tuple[Model, Drafter, Processor], material: Material, tmp_path: Path
) -> None:
    _, _, processor = small
    row = passages(processor, material, 9)[4:5]
    one = batch([row], 200, 48, 640)

    def run(model: Model, optimise: object, steps: int) -> list[float]:
        step = nn.value_and_grad(model, lambda: loss(model, one)[0])
        losses = []
        for _ in range(steps):
            value, gradients = step()
            optimise.update(model, gradients)  # type: ignore[attr-defined]
            losses.append(value.item())
        return losses

    def start() -> tuple[Model, object]:
        model = Model(processor.config)
        initialise(model, 1)
        optimise = optimizer(0.02)
        optimise.init(model.trainable_parameters())
        return model, optimise

    model, optimise = start()
    whole = run(model, optimise, 8)
    assert whole[-1] < 0.85 * whole[0]
    model, optimise = start()
    first = run(model, optimise, 4)
    save(tmp_path / "state.safetensors", {"model": parameters(model), "optimizer": optimise.state}, {"step": "4"})  # type: ignore[attr-defined]
    model, optimise = start()
    trees, about = trees_of(tmp_path / "state.safetensors")
    model.update(trees["model"])
    optimise.state = merge(optimise.state, trees["optimizer"])  # type: ignore[attr-defined]
    assert about == {"step": "4"}
    assert np.allclose(first + run(model, optimise, 4), whole, rtol=1e-4)


def test_some_heads_start_by_looking_back(small: tuple[Model, Drafter, Processor]) -> None:
    """The first group's, in the first layer: one token back, and two."""
    model = Model(small[2].config)
    initialise(model, 3)
    ids = mx.random.randint(0, small[2].config.text.vocab_size, (2, 24), key=mx.random.key(0))
    layer = model.language_model.layers[0]
    attention, x = layer.self_attn, layer.input_layernorm(model.language_model.embed(ids))
    turns = turns_of(model, mx.broadcast_to(mx.arange(24), (2, 24)))["sliding_attention"]
    q, k = (
        turn(norm(part, y.reshape(2, 24, -1, attention.head_dim)).swapaxes(1, 2), *turns)
        for part, y in ((attention.q_norm, attention.q_proj(x)), (attention.k_norm, attention.k_proj(x)))
    )
    causal = mx.triu(mx.full((24, 24), -mx.inf), 1)
    seen = np.array(mx.argmax(q[:, :2] @ k[:, :1].swapaxes(-1, -2) + causal, axis=-1))  # [2, 2, 24]
    for head, back in enumerate((1, 2)):
        assert (seen[:, head, 4:] == np.arange(4, 24) - back).mean() > 0.8


def test_quantized_training_computes_with_four_bits(small: tuple[Model, Drafter, Processor]) -> None:
    model = Model(small[2].config)
    initialise(model, 2)
    kept = parameters(model)
    as_quantized(model)
    for name, weight in parameters(model).items():
        if name.endswith("_proj.weight"):
            back = mx.dequantize(*mx.quantize(kept[name], 64, 4), group_size=64, bits=4)
            assert mx.allclose(weight, back, atol=1e-6)
            assert not mx.allclose(weight, kept[name], atol=1e-4)
        elif "norm" in name:
            assert mx.array_equal(weight, kept[name])


def test_the_drafter_in_training_is_the_drafter_in_use(
    small: tuple[Model, Drafter, Processor], material: Material
) -> None:
    model, drafter, processor = small
    one = passages(processor, material, 10)[0]
    segment = one.segments[0]
    ids = one.prefix + segment.ids
    rows = batch([[Passage(one.prefix, one.media, [segment])]], len(ids), 48, 640)
    hidden, _, keys = hidden_states(model, rows)
    queries = drafter.layers[0].self_attn
    heads = len(queries.q_proj.weight) // queries.head_dim
    turns, mask = turns_of(model, mx.array(rows.positions)), for_heads(rows.full, heads)
    last = len(ids) - 5
    wanted = arranged(model, drafter).draft(Prompt(ids[: last + 2], one.media), 3)
    tokens = ids[: last + 2]
    for ahead, proposal in enumerate(wanted, 1):
        padded = np.array([tokens + [0] * (len(ids) + ahead - len(tokens))])[:, ahead : len(ids) + ahead]
        states, hidden = propose(drafter, model.language_model.embed(mx.array(padded)), hidden, turns, mask, keys)
        logits = drafter.embed_tokens.as_linear(states[0, last])
        suppressed = list(model.config.generation.suppress_tokens)
        logits[mx.array(suppressed)] = -mx.inf
        assert mx.argmax(logits).item() == proposal
        tokens.append(proposal)


def test_the_drafter_learns_from_answers_alone(small: tuple[Model, Drafter, Processor], material: Material) -> None:
    model, drafter, processor = small
    one = next(one for one in passages(processor, material, 12) if one.hints)
    with_hints, without = (
        draft_loss(drafter, model, batch([[member]], len(one), 48, 640)) for member in (one, replace(one, hints=[]))
    )
    assert all(mx.array_equal(a, b) for a, b in zip(with_hints, without, strict=True))
