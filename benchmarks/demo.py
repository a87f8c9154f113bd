"""How much of its held-out items the demo model gets right, and what its drafter is worth.

    python benchmarks/demo.py --model demo --material RUN

RUN is the folder that `python -m training.material RUN` filled: fonts and voices never trained on. Replies are greedy
and go the whole way, from files or arrays through the processor to text. With `--kv-bits` each is asked twice, with
caches as they are and quantized, and how many replies are the same is told; with `--before` so many tokens of other
text stand before each. The last line of standard output is JSON.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from conversation import text_of
from decode import machine, machine_line, run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_gemma4 import PromptStore, Sampling, generate, load
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Reply

sys.path.insert(0, str(Path(__file__).parents[1]))  # training stands beside benchmarks

from training.films import film_item
from training.items import Item, Question
from training.lesson import LESSONS, one_question
from training.material import Material, load_material
from training.mixture import both_item, image_item
from training.rows import messages_of
from training.sounds import beeps_item, digit_item, still_item, tone_item
from training.texts import HELD_OUT_QUESTIONS, is_good_story, story_item, sum_question, text_item
from training.tools import tool_item
from training.world import DONT_KNOW, NEW_STORIES, STORIES, choose

MAX_TOKENS = 160
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Group:
    name: str
    goal: float  # part right
    make: Callable[[random.Random, Material], Item]


def sound_item(rng: random.Random, material: Material) -> Item:
    return choose(rng, (beeps_item, tone_item, still_item))(rng, material.held_out)


def lesson_item(lesson: str, rng: random.Random, material: Material) -> Item:
    return LESSONS[lesson](rng, material.held_out)


def sum_item(rng: random.Random, material: Material) -> Item:
    return Item("text", (sum_question(rng, material.held_out),))


def other_text_item(rng: random.Random, material: Material) -> Item:
    while True:
        found = text_item(rng, material.held_out)
        if found.questions[0].task != "add":
            return found


GROUPS = (
    Group("image", 0.95, image_item),
    Group("audio", 0.95, sound_item),
    Group("spoken digits", 0.85, digit_item),
    Group("video", 0.90, lambda rng, material: film_item(rng, material.held_out)),
    Group("both", 0.85, both_item),
    Group("text", 0.90, other_text_item),
    Group("addition", 0.80, sum_item),
    Group("tool", 0.95, lambda rng, material: tool_item(rng, material.held_out)),
    Group("story", 0.90, lambda rng, material: story_item(rng, material.held_out)),
)


def main(
    material: Annotated[Path, typer.Option(help="Folder of fonts and voices.")],
    model: Annotated[str, typer.Option(help="A model folder.")] = "demo",
    items: Annotated[int, typer.Option(min=1, help="Items of each group.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the items.")] = 0,
    wrong: Annotated[int, typer.Option(help="Wrong replies to show of each group.")] = 0,
    adapter: Annotated[Path | None, typer.Option(help="Ask with an adapter, and with its drafter.")] = None,
    lesson: Annotated[list[str] | None, typer.Option(help="Ask what one of training/lesson.py's teaches too.")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="Ask with caches of so many bits too.")] = None,
    before: Annotated[int, typer.Option(min=0, help="Tokens of other text before each item, about.")] = 0,
) -> None:
    """Parts right by group and task, and of three drafts accepted by group; stories with and without drafts."""
    loaded, processor = load(model, adapter=adapter)
    other = load(model, adapter=adapter, kv_bits=kv_bits)[0] if kv_bits is not None else None
    start: list[dict[str, Any]] = []
    stores: tuple[PromptStore | None, PromptStore | None] = None, None
    if before:  # which is read once
        text = text_of(processor, before, 0)
        start = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        stores = PromptStore(), PromptStore()
    held_out = load_material(material, held_out=True)
    results: list[dict[str, Any]] = []
    lessons = [Group(f"lesson: {name}", 0.90, partial(lesson_item, name)) for name in lesson or ()]
    for group in (*lessons, *GROUPS):
        rng = random.Random(f"{seed} {group.name}")
        asked = [one_question(rng, group.make(rng, held_out)) for _ in range(items)]
        tasks: dict[str, list[bool]] = {}
        same: list[bool] = []
        replies: list[Reply] = []
        for item in track(asked, group.name, console=Console(stderr=True), transient=True):
            question = item.questions[0]
            reply = ask(loaded, processor, item, 3, start, stores[0])
            replies.append(reply)
            if other is not None:
                same.append(ask(other, processor, item, 3, start, stores[1]).token_ids == reply.token_ids)
            right = is_right(question, reply)
            tasks.setdefault(question.task, []).append(right)
            if not right and sum(not r for rs in tasks.values() for r in rs) <= wrong:
                print(f"{group.name}: {question.text!r} -> {reply.text or reply.tool_calls!r}; "
                      f"right: {question.call or question.answer!r}", file=sys.stderr)  # fmt: skip
        results.append(summary(group.name, group.goal, tasks, same, replies))
    unknown = [Item("unknown", (Question("unknown", text, DONT_KNOW),)) for text in HELD_OUT_QUESTIONS]
    replies = [ask(loaded, processor, item, 3, start, stores[0]) for item in unknown]
    answers = [is_right(item.questions[0], reply) for item, reply in zip(unknown, replies, strict=True)]
    results.append(summary("unknown", 0.80, {"unknown": answers}, [], replies))
    speed = story_speeds(loaded, processor, seed) if loaded.drafter is not None else {}
    report(model, items, results, speed)


def ask(
    model: Model, processor: Processor, item: Item, draft_length: int | str, start: list[dict[str, Any]],
    store: PromptStore | None,
) -> Reply:  # fmt: skip
    """start: messages that stand before the item's."""
    question = item.questions[0]
    messages = messages_of(question)
    if item.media:
        messages[0]["content"] = [*item.media, {"type": "text", "text": question.text}]
    messages = start + messages
    length = draft_length if model.drafter is not None else 0
    return generate(
        model, processor, messages, tools=list(question.tools), max_tokens=MAX_TOKENS, sampling=GREEDY,
        draft_length=length, store=store,
    )  # fmt: skip


def is_right(question: Question, reply: Reply) -> bool:
    if question.task == "call":
        return reply.tool_calls == [question.call]
    if question.task in ("story", "any story"):
        new = any(f" {hero}" in question.text for hero in NEW_STORIES.heroes)
        world = NEW_STORIES if new else STORIES
        named = [[w for w in words if f" {w}" in question.text] or words for words in (world.heroes, world.things)]
        heroes, things = named
        return any(is_good_story(reply.text, hero, thing, world) for hero in heroes for thing in things)
    return reply.text == question.answer


def summary(
    group: str, goal: float, tasks: dict[str, list[bool]], same: list[bool], replies: list[Reply]
) -> dict[str, Any]:
    """same: of replies with quantized caches, whether they are those without; may be empty."""
    answers = [right for rights in tasks.values() for right in rights]
    by_task = {task: round(sum(rights) / len(rights), 3) for task, rights in sorted(tasks.items())}
    right = round(sum(answers) / len(answers), 4)
    found: dict[str, Any] = {"group": group, "items": len(answers), "right": right, "goal": goal, "tasks": by_task}
    if drafted := sum(reply.stats.drafted_tokens for reply in replies):
        found["acceptance"] = round(sum(reply.stats.accepted_tokens for reply in replies) / drafted, 3)
    return found | {"same": round(sum(same) / len(same), 4)} if same else found


def story_speeds(model: Model, processor: Processor, seed: int) -> dict[str, Any]:
    """Tokens a second on stories, plain and with "auto" taking turns; medians of eight."""
    rng = random.Random(f"{seed} speed")
    speeds: dict[str, list[float]] = {"plain": [], "auto": []}
    for turn in range(10):
        item = story_item(rng, True)
        for name, length in (("plain", 0), ("auto", "auto")):
            reply = ask(model, processor, item, length, [], None)
            if turn > 1:  # the first ones compile
                speeds[name].append(reply.stats.generation_tps)
    found = {f"{name}_tps": round(median(values), 1) for name, values in speeds.items()}
    return found | {"auto_to_plain": round(median(a / p for a, p in zip(*reversed(speeds.values()), strict=True)), 3)}


def report(model: str, items: int, results: list[dict[str, Any]], speed: dict[str, Any]) -> None:
    table = Table(title=f"{model}: greedy replies to held-out items")
    for heading in ("group", "items", "right", "goal", "accepted", "by task"):
        table.add_column(heading, justify="left" if heading in ("group", "by task") else "right")
    for row in results:
        by_task = ", ".join(f"{task} {100 * part:.0f}" for task, part in row["tasks"].items())
        accepted = f"{row['acceptance']:.2f}" if "acceptance" in row else ""
        if "same" in row:
            by_task += f"; {100 * row['same']:.1f} % the same reply with quantized caches"
        table.add_row(
            row["group"], str(row["items"]), f"{100 * row['right']:.1f} %", f"{100 * row['goal']:.0f} %", accepted,
            by_task,
        )  # fmt: skip
    found = machine()
    print(machine_line(found))
    Console(width=140).print(table)
    print(", ".join(f"{name} {value}" for name, value in speed.items()))
    print(
        json.dumps({"benchmark": "demo", "machine": found, "model": model, "items": items, "results": results} | speed)
    )


if __name__ == "__main__":
    run_script(main)
