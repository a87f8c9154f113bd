"""The demo's training: its items are right, and what it trains is the model that the package runs."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import Formatter

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from PIL import ImageFont

from mlx_gemma4.config import read_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Loaded, Processor, load_processor
from mlx_gemma4.reply.toolcall import parse_tool_call
from mlx_gemma4.tune.data import read_split
from mlx_gemma4.tune.network import learnt_states, turn, turns_of
from mlx_gemma4.tune.rows import Passage, branches
from mlx_gemma4.tune.state import merge, save, trees_of
from mlx_gemma4.tune.step import Processes, slopes, update
from mlx_gemma4.weights.load import parameters
from training.checkpoint import write_files
from training.films import FRAMES, film_item
from training.items import Item, Question
from training.lesson import LESSONS, write_lesson
from training.material import RATE, Material
from training.mixture import both_item, image_item, item
from training.pictures import SAME_COLOUR, SAME_KIND, SIDES, new_colour_item, number_item, shapes_item
from training.rows import HINT_WEIGHT, answers_alone, of_hints, passage, rows
from training.sounds import beeps_item, still_item, tone_item
from training.start import initialise
from training.texts import is_good_story, is_held_out_sum, new_story_item, story, story_item, text_item
from training.tokens import make_tokenizer
from training.tools import NEW_TOOL, TOOLS, new_tool_item, tool_item
from training.train import LOOKING, Source, as_quantized, optimizer, states
from training.world import COLOURS, HEROES, MEDIUM_OF, MONTHS, NEW_STORIES, SHAPES, THINGS, WORDINGS, plain, worded

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
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Processor]:
    """The demo's model with fewer dimensions, as training starts it."""
    folder = tmp_path_factory.mktemp("small")
    write_files(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "global_head_dim": 32}
    raw["vision_config"] |= {"mm_embed_dim": 64, "output_proj_dims": 64}
    (folder / "config.json").write_text(json.dumps(raw))
    config = read_config(folder)
    model = Model(config)
    initialise(model, 0)
    return model, load_processor(folder, config)


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


def asked_alone(processor: Processor, one: Item, question: Question, seed: int) -> tuple[list[int], str]:
    """What is read before the answer, and what is learnt as one."""
    made = passage(processor, replace(one, questions=(question,)), random.Random(seed), 500)
    [row] = rows(processor, [made], 500)
    learnt = answers_alone(row)
    assert (row.soft[learnt.places] == 0).all() and (learnt.weights == 1).all()
    assert len(learnt.places) < len(row.places) or not one.hints
    said = processor.tokenizer.decode(learnt.targets.tolist(), skip_special_tokens=False)
    return row.ids[: learnt.places[0] + 1].tolist(), said


def test_a_prompt_in_training_is_the_prompt_in_use(small: tuple[Model, Processor], material: Material) -> None:
    processor, rng = small[1], random.Random(6)
    for one in (image_item(rng, material), both_item(rng, material)):
        for question in one.questions[:3]:
            ids, said = asked_alone(processor, one, question, 1)  # this seed: without thinking
            asked = processor([{"role": "user", "content": [*one.media, {"type": "text", "text": question.text}]}])
            assert ids == asked.token_ids
            assert said == f"{question.answer}<turn|>"
    calls = [tool_item(rng, False) for _ in range(12)]
    for question in (one.questions[0] for one in calls if one.questions[0].response is None):
        _, said = asked_alone(processor, Item("tool", (question,)), question, 0)
        call = re.fullmatch(r"<\|tool_call>(.*)<tool_call\|><\|tool_response>", said)[1]
        assert parse_tool_call(call) == question.call


def test_hints_are_said_after_four_layers(small: tuple[Model, Processor], material: Material) -> None:
    model = small[0]
    layers = model.language_model.layers
    [one] = rows(small[1], passages(small[1], material, 8), 2000)
    hints = of_hints(one)
    assert hints.any() and (one.weights[hints] == HINT_WEIGHT).all()
    got = states(model, False, one)
    assert mx.allclose(
        got[mx.array(np.flatnonzero(~hints))], learnt_states(model, answers_alone(one), False), atol=1e-5
    )
    model.language_model.layers = layers[:4]
    early = learnt_states(model, one, False)
    model.language_model.layers = layers
    at = mx.array(np.flatnonzero(hints))
    assert mx.allclose(got[at], early[at], atol=1e-5)


def test_media_stand_alone_at_first(small: tuple[Model, Processor], material: Material) -> None:
    source = Source(small[1], material, "a seed")
    end = small[1].control.ids["<turn|>"]
    for number, questions in ((0, 0), (LOOKING, 2)):
        made = [one for kind in ("image", "audio", "both") for one in source.row(kind, 256, number)]
        asked = [int((one.targets == end).sum()) for one in made]
        assert max(asked) == questions and len(asked) > 6 / (1 + questions)
        assert all((one.targets == end).any() for one in source.row("text", 256, number))
    first = [vars(one) for one in source.step(3)]
    source.step(4)
    for one, again in zip(first, source.step(3), strict=True):  # whatever was drawn before
        assert all(np.array_equal(value, vars(again)[name]) for name, value in one.items())


def hinted_run(processor: Processor, one: Item, rng: random.Random) -> tuple[list[tuple[int, int]], Loaded]:
    """The hints of an item's first medium, by their place in it, and its soft tokens."""
    made = passage(processor, one, rng, 500)
    run, [loaded] = made.runs[0], processor.read(made.media[0], 70)
    pairs = zip((made.places - run.start).tolist(), made.targets.tolist(), strict=True)
    return [(place, token) for place, token in pairs if 0 <= place < run.count], loaded


def test_hints_say_what_lies_under_them(small: tuple[Model, Processor], material: Material) -> None:
    """A patch said to be of a colour has pixels of it; a frame with a number has so many beeps up to it."""
    processor, rng = small[1], random.Random(11)
    said, missed = Counter[str](), 0
    for _ in range(12):
        one = shapes_item(rng, False)[0]
        hints, run = hinted_run(processor, one, rng)
        for place, token in hints:
            word = processor.tokenizer.decode([token]).strip()
            if word in COLOURS and word != "black":
                pixels = run.values[place].reshape(-1, 3).astype(int)
                said[word] += 1
                missed += np.abs(pixels - COLOURS[word]).max(axis=1).min() > 60  # beside a star's arm
        one = beeps_item(rng, False)
        hints, run = hinted_run(processor, one, rng)
        loud = np.abs(run.values).max(axis=1) > 0.12
        begun = np.cumsum(loud & ~np.concatenate([[False], loud[:-1]]))
        for frame, token in hints:
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


def test_training_learns_and_goes_on_where_it_stopped(
    small: tuple[Model, Processor], material: Material, tmp_path: Path
) -> None:
    processor, processes = small[1], Processes(mx.distributed.init())
    made = rows(processor, passages(processor, material, 9)[4:5], 512)

    def run(model: Model, optimise: optim.MultiOptimizer, steps: int) -> list[float]:
        told = partial(slopes, model, states=partial(states, model, False))
        return [update(model, optimise, made, told, processes).loss for _ in range(steps)]

    def start() -> tuple[Model, optim.MultiOptimizer]:
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
    save(tmp_path / "state.safetensors", {"model": parameters(model), "optimizer": optimise.state}, {"step": "4"})
    model, optimise = start()
    trees, about = trees_of(tmp_path / "state.safetensors")
    model.update(trees["model"])
    optimise.state = merge(optimise.state, trees["optimizer"])
    assert about == {"step": "4"}
    assert first + run(model, optimise, 4) == whole


def test_some_heads_start_by_looking_back(small: tuple[Model, Processor]) -> None:
    """The first group's, in the first layer: one token back, and two."""
    model = Model(small[1].config)
    initialise(model, 3)
    ids = mx.random.randint(0, small[1].config.text.vocab_size, (2, 24), key=mx.random.key(0))
    layer = model.language_model.layers[0]
    attention, x = layer.self_attn, layer.input_layernorm(model.language_model.embed(ids))
    turns = turns_of([layer], mx.broadcast_to(mx.arange(24), (2, 24)))["sliding_attention"]
    q, k = (
        turn(part(y.reshape(2, 24, -1, attention.head_dim)).swapaxes(1, 2), turns)
        for part, y in ((attention.q_norm, attention.q_proj(x)), (attention.k_norm, attention.k_proj(x)))
    )
    causal = mx.triu(mx.full((24, 24), -mx.inf), 1)
    seen = np.array(mx.argmax(q[:, :2] @ k[:, :1].swapaxes(-1, -2) + causal, axis=-1))  # [2, 2, 24]
    for head, back in enumerate((1, 2)):
        assert (seen[:, head, 4:] == np.arange(4, 24) - back).mean() > 0.8


def test_quantized_training_computes_with_four_bits(small: tuple[Model, Processor]) -> None:
    model = Model(small[1].config)
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


# --- lessons -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lesson", LESSONS)
def test_lessons_are_what_the_tuner_reads(
    lesson: str, material: Material, small: tuple[Model, Processor], tmp_path: Path
) -> None:
    sizes = {"train": 12, "valid": 1, "test": 4}
    sides = {False: material, True: replace(material, held_out=True)}
    write_lesson(lesson, sides, tmp_path, sizes, 0.5, 0)
    for split, size in sizes.items():
        found = read_split(str(tmp_path), split)
        assert found is not None and len(found) == size
        for example in found:
            own, media = branches(small[1], example, small[1].settings.image_budget)
            assert len(own) == 1  # only the last message is learnt
            assert all(small[1].read(part, small[1].settings.image_budget) for part in media)


def test_what_a_lesson_teaches_is_right() -> None:
    rng = random.Random(5)
    for held_out in (False, True):
        asked = new_story_item(rng, held_out).questions[0]
        hero, thing = re.search(r"of a (\w+) and a (\w+)", asked.thought).groups()
        assert is_good_story(asked.answer, hero, thing, NEW_STORIES) and not is_good_story(asked.answer, hero, thing)
        shown = new_colour_item(rng, held_out)
        assert shown.questions and all("turquoise" in q.text + q.answer for q in shown.questions)
        for question in new_tool_item(rng, held_out).questions:
            assert question.call is not None and question.call["name"] == NEW_TOOL.name
            assert all(str(value) in question.text for value in question.call["arguments"].values())
            assert NEW_TOOL.name in [tool["function"]["name"] for tool in question.tools]
    assert NEW_TOOL.name not in [tool.name for tool in TOOLS] and not set(NEW_STORIES.heroes) & set(HEROES)
    pairs = [{re.search(r"of a (\w+) and a (\w+)", new_story_item(rng, side).questions[0].thought).groups()
              for _ in range(300)} for side in (False, True)]  # fmt: skip
    assert not pairs[0] & pairs[1]
