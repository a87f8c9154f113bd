"""The command `mlx_gemma4.generate`: the answer goes to standard output, everything else to standard error."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from mlx_gemma4 import flags
from mlx_gemma4.config import computing_type, expanded, read_given
from mlx_gemma4.decoding.controller import check_draft_length
from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.engine.generation import Reading, follow, generation_events
from mlx_gemma4.engine.request import Options, Request
from mlx_gemma4.engine.session import Saved, Session, Settings, is_session, read_saved, session_store
from mlx_gemma4.entry import if_stopped
from mlx_gemma4.errors import one_line, shown
from mlx_gemma4.flags import option
from mlx_gemma4.media.source import local_path
from mlx_gemma4.planner import check_memory
from mlx_gemma4.prompt.messages import Message, media_parts, request_messages
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.reply.reply import Piece, Stats
from mlx_gemma4.terminal import Bar, SizeBar, is_screen, run, show_warning, without_controls
from mlx_gemma4.weights.load import DEFAULT_MODEL, Checkpoint, check_split, find_checkpoint, load_values
from mlx_gemma4.weights.peers import follows, launched, lead, release, same


def generate(
    prompt: Annotated[str, option("TEXT", "What to ask; - reads standard input.", "--prompt", "-p")],
    model: flags.ModelName = DEFAULT_MODEL,
    image: Annotated[list[str], option("FILE", "An image file or URL; repeatable.")] = [],  # noqa: B006
    audio: Annotated[list[str], option("FILE", "A sound file or URL; repeatable.")] = [],  # noqa: B006
    video: Annotated[list[str], option("FILE", "A video file or URL; repeatable. Its sound is not heard.")] = [],  # noqa: B006
    system: flags.System = None,
    thinking: flags.Thinking = False,
    max_tokens: flags.MaxTokens = 1024,
    temp: flags.Temperature = None,
    top_p: flags.TopP = None,
    top_k: flags.TopK = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    seed: flags.Seed = None,
    image_budget: flags.ImageBudget = None,
    drafter: flags.DrafterName = "auto",
    draft_length: flags.DraftLength = "auto",
    adapter: flags.Adapter = None,
    dtype: flags.DType = None,
    kv_bits: flags.KvBits = None,
    split: flags.Split = None,
    session: Annotated[
        Path | None, option("FOLDER", "Go on with the conversation in a folder, and keep it there.")
    ] = None,
    schema: Annotated[Path | None, option("FILE", "Hold the answer to a JSON schema, or to another form.")] = None,
    stop: Annotated[list[str], option("TEXT", "The answer ends before this; repeatable.")] = [],  # noqa: B006
    repetition_detection: Annotated[str, option("MODE", "auto ends a reply that only repeats itself; off.")] = "auto",
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Ask Gemma 4 about text, images, sounds and videos. What is not given comes from the checkpoint."""
    lead()
    group = launched()
    is_first = not follows(group)
    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    length = parse_draft_length(draft_length)
    computing = computing_type(dtype)
    check_split(split)
    options = Options(
        max_tokens=max_tokens, sampling=sampling, draft_length=length, repetition_detection=repetition_detection,
        stop=stop, response_format=read_schema(schema) if is_first and schema is not None else None,
    )  # fmt: skip
    session = None if session is None else expanded(session)
    if is_first:
        saved = None if session is None or not is_session(session) else read_saved(session)
        turn = request_messages(read_prompt(prompt), image, audio, video, None if saved else system)
        check_media(turn, image_budget)
        split = saved.split if split is None and saved is not None else split
    split = same(group, split)
    # All that can be wrong with the request is found before gigabytes are downloaded or loaded for it.
    checkpoint = find_checkpoint(model, drafter, computing, kv_bits, adapter, group, split)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    if not is_first:
        load_shown(checkpoint)
        follow(checkpoint.model, processor, None if session is None else session_store(session))
        return
    if session is None:
        request = Request(content=turn, thinking=thinking, image_budget=image_budget)
        asked, prepared = request.timed_prompt(processor)
        events: Iterator[Reading | Piece] = generation_events(checkpoint.model, processor, asked, options, prepared)
    else:
        conversation = Session(checkpoint.model, processor, store=session_store(session))
        go_on(conversation, saved, system, thinking, image_budget)
        asked, prepared = conversation.prompt(turn, options)
        events = conversation.events(turn, asked, prepared, options)
    check_memory(checkpoint.footprint, len(asked), max_tokens)
    load_shown(checkpoint)
    if saved is not None:
        saved.check_model(checkpoint.model)
    print_end(print_reply(events))
    if session is not None:
        conversation.save(session)
    release(group)


def go_on(
    conversation: Session, saved: Saved | None, system: str | None, thinking: bool, image_budget: int | None
) -> None:
    """Take up what was saved, if anything; ValueError for options that it contradicts. Thinking stays on."""
    if saved is None:
        conversation.settings = Settings(thinking=thinking, image_budget=image_budget)
        return
    first = saved.messages[0] if saved.messages else {}
    own = first.get("content") if first.get("role") == "system" else None
    for name, given, known in (("system", system, own), ("image_budget", image_budget, saved.settings.image_budget)):
        if given is not None and given != known:
            raise ValueError(f"{name} is {shown(given)} and {shown(known)} in the session; expected the same, or none")
    conversation.messages = saved.messages
    conversation.settings = replace(saved.settings, thinking=thinking or saved.settings.thinking)


def read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise ValueError("standard input is closed; expected the prompt there, for --prompt -")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None


def read_schema(path: Path) -> Any:
    data = read_given(path, f"the schema {str(path)!r}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema {str(path)!r} is not JSON: {one_line(error)}") from None


def parse_draft_length(text: str) -> int | str:
    length = int(text) if text.isdecimal() else text
    check_draft_length(length)
    return length


def check_media(messages: list[Message], image_budget: int | None) -> None:
    """What can be said about the media without the checkpoint: whether the files are there and the budget exists."""
    for part in media_parts(messages):
        local_path(part[part["type"]], part["type"])
    if image_budget is not None:
        from mlx_gemma4.media.image import check_budget  # here: it imports Pillow, which a text prompt does not need

        check_budget(image_budget)


def load_shown(checkpoint: Checkpoint) -> None:
    """Load the weights with a bar."""
    with SizeBar("Loading") as bar:
        bar.count(load_values(checkpoint), checkpoint.nbytes)


def print_reply(events: Iterator[Reading | Piece]) -> Piece | None:
    """Show how far the prompt is read, then print the pieces as they come; notes wait until the answer is out.

    The last piece, if there was any. A terminal gets no control characters that the model made up.
    """
    last: Piece | None = None
    answered = thinking = False  # whether that line is still open
    notes: list[str] = []

    def end_lines() -> None:
        for is_open, stream in ((thinking, 2), (answered, 1)):
            if is_open:
                os.write(stream, b"\n")

    dim, plain = ("\x1b[2m", "\x1b[22m") if is_screen(sys.stderr) else ("", "")
    harmless = without_controls if is_screen(sys.stdout) else str
    with Bar("Reading") as bar, if_stopped(end_lines):
        try:
            for event in events:
                if isinstance(event, Reading):
                    bar.show(event.done, event.total)
                    continue
                bar.close()
                last = event
                notes += event.notes
                if event.thinking:
                    thinking = True
                    print(f"{dim}{without_controls(event.thinking)}{plain}", end="", file=sys.stderr, flush=True)
                if event.text:
                    if thinking:
                        thinking = False
                        print(file=sys.stderr)
                    answered = True
                    print(harmless(event.text), end="", flush=True)
        finally:
            bar.close()
            if thinking:
                print(file=sys.stderr)
            if answered:
                print(flush=True)
            for note in notes:
                show_warning(note)
    return last


def print_end(last: Piece | None) -> None:
    if last is not None and last.stats is not None:
        for call in last.tool_calls or ():
            print(f"tool call: {json.dumps(call, ensure_ascii=False)}", file=sys.stderr)
        print(stats_line(last.stats), file=sys.stderr)


def stats_line(stats: Stats) -> str:
    return (
        f"prompt {stats.prompt_tokens} tokens, {cached(stats)}{stats.prompt_tps:.1f} tokens/s; "
        f"reply {stats.generation_tokens} tokens, {stats.generation_tps:.1f} tokens/s; "
        f"first token after {stats.time_to_first_token:.2f} s; peak memory {stats.peak_memory / 1e9:.2f} GB"
        + drafting(stats)
    )


def cached(stats: Stats) -> str:
    return f"{stats.cached_tokens} of them not read again, " if stats.cached_tokens else ""


def drafting(stats: Stats) -> str:
    if not stats.drafted_tokens:
        return ""
    by_position = " ".join(f"{part:.2f}" for part in stats.acceptance_by_position)
    return (
        f"; {stats.rounds} rounds, {stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted "
        f"({by_position}), {stats.tokens_per_round:.2f} tokens a round"
    )


def main() -> int:
    return run(generate)
