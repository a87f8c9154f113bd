"""The demo model, end to end: held-out files and questions in, right answers out, through the command."""

import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run

from mlx_gemma4 import generate, load
from mlx_gemma4.commands.generate import main
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.weights.load import DEMO
from training.items import Question
from training.rows import messages_of
from training.texts import HELD_OUT_QUESTIONS, is_good_story, story, sum_question, word_question
from training.tools import tool_item
from training.world import DONT_KNOW, HEROES, THINGS

ITEMS = Path(__file__).with_name("demo")
LEAST = {"image": 0.8, "audio": 0.8, "video": 0.7, "image+audio": 0.7}  # part right; more in benchmarks/README.md


@pytest.fixture
def run(in_process: Callable[..., Run]) -> Run:
    return in_process("mlx_gemma4.generate", main)


@pytest.fixture(scope="module")
def demo() -> tuple[Model, Processor]:
    return load("demo")


def part_right(replies: list[tuple[str, str]]) -> float:
    return sum(reply.strip() == answer for reply, answer in replies) / len(replies)


def test_it_sees_and_hears_files_it_was_never_trained_on(run: Run) -> None:
    replies: dict[str, list[tuple[str, str]]] = {}
    for line in (ITEMS / "items.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        media = [word for kind, name in item["media"].items() for word in (f"--{kind}", ITEMS / name)]
        status, out, _ = run("--model", "demo", *media, "--prompt", item["question"])
        assert status == 0
        replies.setdefault("+".join(item["media"]), []).append((out, item["answer"]))
    assert replies.keys() == LEAST.keys()
    assert all(part_right(found) > LEAST[kind] for kind, found in replies.items()), replies
    assert part_right([one for found in replies.values() for one in found]) > 0.9, replies


def test_it_reads_and_reckons(run: Run) -> None:
    rng = random.Random(1)
    asked = [make(rng, True) for make in (word_question, sum_question) for _ in range(8)]
    asked += [Question("unknown", text, DONT_KNOW) for text in rng.sample(HELD_OUT_QUESTIONS, 8)]
    replies = [(run("--model", "demo", "--prompt", one.text)[1], one.answer) for one in asked]
    assert part_right(replies) > 0.85, replies


def test_it_thinks_before_it_answers_when_asked_to(demo: tuple[Model, Processor]) -> None:
    reply = generate(*demo, "What is 27 + 45?", thinking=True)
    assert reply.thinking and reply.text == "27 + 45 = 72."


def test_it_calls_tools_and_tells_what_they_gave(demo: tuple[Model, Processor]) -> None:
    rng = random.Random(2)
    right = 0
    for _ in range(12):
        question = tool_item(rng, True).questions[0]
        reply = generate(*demo, messages_of(question), tools=list(question.tools))
        called = question.response is None
        right += reply.tool_calls == [question.call] if called else reply.text == question.answer
    assert right >= 10


def test_it_tells_stories_of_its_world_and_drafts_them_well(demo: tuple[Model, Processor]) -> None:
    drafted = accepted = 0
    for hero, thing in zip(HEROES[:4], THINGS[:4], strict=True):
        plain = generate(*demo, f"Tell me a story about a {hero} and a {thing}.", draft_length=0)
        reply = generate(*demo, f"Tell me a story about a {hero} and a {thing}.", draft_length=3)
        assert reply.text == plain.text
        assert is_good_story(reply.text, hero, thing), reply.text
        drafted, accepted = drafted + reply.stats.drafted_tokens, accepted + reply.stats.accepted_tokens
    assert accepted > 0.5 * drafted


@pytest.mark.parametrize("text", ["Tell me a story.", "Could you tell me a tale?", "Write me a short story, please."])
def test_it_tells_a_story_of_its_own_choice(demo: tuple[Model, Processor], text: str) -> None:
    told = generate(*demo, text).text
    assert any(is_good_story(told, hero, thing) for hero in HEROES for thing in THINGS), told


def test_the_rule_for_stories_takes_those_of_the_world_alone() -> None:
    told = story(random.Random(3), "fox", "ball")
    assert is_good_story(told, "fox", "ball")
    assert not is_good_story(told, "fox", "drum")
    assert not is_good_story(told.replace("The end.", ""), "fox", "ball")
    assert not is_good_story(re.sub("fox", "cat", told, count=1), "fox", "ball")


def test_a_wheel_holds_the_demo(tmp_path: Path) -> None:
    """Whole, and small enough."""
    source = tmp_path / "source"  # a copy: a build leaves files beside what it is made of
    shutil.copytree(DEMO.parent, source / "mlx_gemma4")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(DEMO.parents[1] / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run(build, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("mlx_gemma4/demo/")]
        packed = {name.removeprefix("mlx_gemma4/demo/") for name in names}
        assert sum(wheel.getinfo(name).file_size for name in names if "/samples/" not in name) < 12e6
    assert packed == {str(path.relative_to(DEMO)) for path in DEMO.rglob("*") if path.is_file()}
