"""The command `mlx_gemma4.evaluate`: how close candidates are to a reference on the answers of chats."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

from mlx_gemma4 import flags
from mlx_gemma4.config import computing_type, expanded
from mlx_gemma4.convert.card import CARD, name_of
from mlx_gemma4.errors import CheckpointError
from mlx_gemma4.evaluate.quality import (
    KEPT,
    Distributions,
    Exchange,
    Quality,
    Read,
    compare,
    distributions,
    encode,
    fingerprint,
    load_distributions,
    load_drafter,
    read_exchanges,
    unpack,
)
from mlx_gemma4.flags import above_0, adapters_of, check_name, option, switch
from mlx_gemma4.prompt.messages import json_lines, with_media_from
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.terminal import Bar, run
from mlx_gemma4.weights.load import Adapters, Checkpoint, find_adapter, find_drafter, find_folder, look_through
from mlx_gemma4.weights.peers import follows, hear, launched, lead, release
from mlx_gemma4.weights.writing import part_of, write_text

BUILT_IN = Path(__file__).with_name("exchanges.jsonl")  # written for this project
SAVED = ".safetensors"
KEYS = {"messages", "tools"}


def evaluate(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="A model folder, a hub id, or a file of --save-logits.")
    ],
    candidates: Annotated[
        list[str] | None, typer.Argument(metavar="CANDIDATE", help="Model folders or hub ids to compare with it.")
    ] = None,
    data: Annotated[Path | None, option("FILE", 'Lines of {"messages": [...], "tools": [...]}; else built-in.')] = None,
    save_logits: Annotated[
        Path | None, option("FILE", "Save what the reference says, to compare with elsewhere.")
    ] = None,
    max_tokens: Annotated[int | None, above_0("Of each answer, count the first N tokens.")] = None,
    drafter: flags.DrafterName = "auto",
    write_card: Annotated[bool, switch("Write the figures into the candidates' README.md.", "--write-card")] = False,
    adapter: Annotated[
        list[str], option("[NAME=]FOLDER", "The candidates'; or by name, repeatable: each of them.")
    ] = [],  # noqa: B006
    dtype: flags.DType = None,
    kv_bits: flags.KvBits = None,
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Compare next-token distributions on the answers of chats; models are read layer by layer, so that any fits.

    Adapters and the drafter are the candidates'.
    """
    names, computing, added = candidates or [], computing_type(dtype), find_adapter(adapters_of(adapter))
    each = {f" with {name}": own for name, own in added.items()} if isinstance(added, dict) else {"": added}
    lead()
    group = launched()
    if not names and save_logits is None:
        raise ValueError("there is no candidate; expected one or more, or --save-logits")
    if write_card and added is not None:
        raise ValueError("write_card excludes adapter; expected one of them, for a card tells of the model alone")
    if save_logits is not None:
        save_logits = expanded(save_logits)
        check_name(save_logits, "save-logits")
        check_name(part_of(save_logits), "save-logits")
    if save_logits is not None and (save_logits.suffix != SAVED or not save_logits.absolute().parent.is_dir()):
        raise ValueError(f"save-logits is {str(save_logits)!r}; expected a file in a folder, with a name in {SAVED}")
    for name in names if write_card else ():
        quality_line(expanded(name))
    lines = read_lines(BUILT_IN if data is None else expanded(data))
    # All that can be wrong is found before hours of reading.
    reference_of = open_reference(reference, lines, max_tokens, computing, group)
    subjects = [
        replace(open_subject(name, drafter, lines, max_tokens, computing, kv_bits, own, group), name=name + label)
        for name in names
        for label, own in each.items()
    ]
    for subject in subjects:
        check_same(subject, reference_of)
    known = reference_of if isinstance(reference_of, Distributions) else read_reference(reference_of)
    if save_logits is not None and not follows(group):
        known.save(save_logits)
    results: dict[str, Quality] = {}
    while subjects:
        subject = subjects.pop(0)
        own = results[subject.name] = measure(subject, known)
        if write_card and not follows(group):
            write_quality(expanded(subject.name), card_text(own, reference, len(lines)))
    if follows(group):
        hear()  # that the first one is done
        return
    release(group)
    if results:
        print(table(results))
    head = {"evaluation": "quality", "reference": reference, "data": str(data) if data else "built-in"}
    counts = {"exchanges": len(lines), "positions": known.positions}
    print(json.dumps(head | counts | {"results": [{"model": name} | asdict(own) for name, own in results.items()]}))


# --- what is read ------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Exchanges from JSON lines, paths of their media from where the file lies; ValueError that names the line if one
    is wrong."""
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is no file; expected one of JSON lines, for data")
    found = []
    for number, line in json_lines(file):
        messages = line.get("messages") if isinstance(line, dict) else None
        if not isinstance(messages, list) or len(messages) < 2 or not line.keys() <= KEYS:
            raise ValueError(f'{file}, line {number}: expected {{"messages": [at least two], "tools": [if any]}}')
        if not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
            raise ValueError(f"{file}, line {number}: expected an answer, of the role assistant, as the last message")
        try:
            found.append(with_media_from(file.parent, line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{file} has no exchanges; expected one in each line")
    return found


@dataclass(frozen=True)
class Subject:
    """A model to read, looked through, and the tokens that it makes of the exchanges."""

    name: str
    checkpoint: Checkpoint
    exchanges: list[Exchange]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.checkpoint.model, self.exchanges)

    @property
    def positions(self) -> int:
        return sum(own.rows.stop - own.rows.start for own in self.exchanges)


def open_subject(
    name: str,
    drafter: str | None,
    lines: Sequence[dict[str, Any]],
    max_tokens: int | None,
    dtype: mx.Dtype | None = None,
    kv_bits: int | None = None,
    adapter: Adapters = None,
    group: mx.distributed.Group | None = None,
) -> Subject:
    folder = find_folder(name)
    choice = find_drafter(name, folder, drafter, adapter=adapter)
    # by tensors, for layers are read one after the other, by all machines
    split = None if group is None else "tensors"
    checkpoint = look_through(folder, choice, dtype, kv_bits, adapter, group, split)
    processor = load_processor(folder, checkpoint.config)
    exchanges = []
    for number, line in enumerate(lines, 1):
        try:
            exchanges.append(encode(processor, line, max_tokens))
        except ValueError as error:
            raise ValueError(f"exchange {number}: {error}") from None
    return Subject(name, checkpoint, exchanges)


def open_reference(
    name: str,
    lines: Sequence[dict[str, Any]],
    max_tokens: int | None,
    dtype: mx.Dtype | None,
    group: mx.distributed.Group | None,
) -> Subject | Distributions:
    """The reference: a model, or what was saved of one."""
    path = expanded(name)
    if path.suffix == SAVED and path.is_file():
        return load_distributions(path)
    return open_subject(name, None, lines, max_tokens, dtype, group=group)


def check_same(subject: Subject, reference: Subject | Distributions) -> None:
    if subject.fingerprint != reference.fingerprint:
        raise ValueError(
            f"{subject.name} makes other tokens of the exchanges than the reference did; "
            "expected the same vocabulary, chat template, --data and --max-tokens"
        )
    if subject.positions != reference.positions:
        raise CheckpointError(
            f"the reference has {reference.positions} positions; expected {subject.positions}, as the exchanges have"
        )


def read_reference(reference: Subject) -> Distributions:
    reads = read_shown(reference)
    return distributions(reference.checkpoint.model, reference.exchanges, reads)


def measure(subject: Subject, known: Distributions) -> Quality:
    """A model against what is known of the reference."""
    reads = read_shown(subject)
    load_drafter(subject.checkpoint, reads[0])
    if subject.checkpoint.model.drafter is not None:
        unpack(subject.checkpoint.model.drafter, subject.checkpoint.config.dtype)
    return compare(known, subject.checkpoint.model, subject.exchanges, reads)


def read_shown(subject: Subject) -> list[Read]:
    with Bar(f"Reading {subject.checkpoint.folder.name}") as bar:
        return read_exchanges(subject.checkpoint, subject.exchanges, bar.show)


# --- what is written ---------------------------------------------------------------------------


def table(results: dict[str, Quality]) -> str:
    """The results in Markdown."""
    rows = [
        "| model | mean KL | 99 % below | same likeliest token | first draft accepted |",
        "|---|---|---|---|---|",
    ]
    for name, own in results.items():
        accepted = "–" if own.acceptance is None else f"{100 * own.acceptance:.1f} %"
        rows.append(f"| {name} | {own.kl_mean:.4f} | {own.kl_p99:.4f} | {100 * own.top1:.1f} % | {accepted} |")
    rest = next(iter(results.values())).rest
    note = f"{100 * rest:.2g} % of the reference's mass, beyond its likeliest {KEPT} tokens, is compared as one"
    return "\n".join([*rows, "", f"KL in nats; {note}."])


def card_text(own: Quality, reference: str, exchanges: int) -> str:
    """The line of a model card."""
    drafts = "" if own.acceptance is None else f"; {100 * own.acceptance:.1f} % of first drafts accepted"
    return (
        f"Quality: KL divergence {own.kl_mean:.4f} on average and below {own.kl_p99:.4f} in 99 % of positions, "
        f"the same likeliest token in {100 * own.top1:.1f} %{drafts} "
        f"({own.positions} tokens of {exchanges} chat answers, against {name_of(reference)})."
    )


def quality_line(folder: Path) -> re.Match[str]:
    """Where a model card speaks of quality. ValueError if it does not."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    match = re.search(r"^- Quality: .*$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"{card} has no line for the quality; expected the model card of mlx_gemma4.convert")
    return match


def write_quality(folder: Path, text: str) -> None:
    found = quality_line(folder)
    whole = found.string
    card = folder / CARD
    write_text(card, f"{whole[: found.start()]}- {text}{whole[found.end() :]}")


def main() -> int:
    return run(evaluate)
