"""The options that commands share, and how each kind of option is said."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

import mlx_gemma4
from mlx_gemma4.errors import shown

# Parsers: typer's own messages do not say which value was wrong.


def parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{shown(text)}; expected a number") from None


def parse_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{shown(text)}; expected a whole number") from None


def parse_above_0(text: str) -> int:
    if (value := parse_whole(text)) < 1:
        raise typer.BadParameter(f"{shown(text)}; expected a whole number above 0")
    return value


def option(metavar: str, help: str, *names: str) -> Any:
    """A text; without names the option is called as its parameter."""
    return typer.Option(*names, metavar=metavar, help=help)


def switch(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help)


def number(help: str, metavar: str = "X") -> Any:
    return typer.Option(parser=parse_number, metavar=metavar, help=help)


def whole(help: str) -> Any:
    return typer.Option(parser=parse_whole, metavar="N", help=help)


def above_0(help: str) -> Any:
    return typer.Option(parser=parse_above_0, metavar="N", help=help)


def print_version(asked: bool) -> None:
    if asked:
        print(f"mlx_gemma4 {mlx_gemma4.__version__}")
        raise typer.Exit


def drafter_name(text: str) -> str | None:
    """As `load` takes it."""
    return None if text == "none" else text


# Those that commands share.

ModelName = Annotated[str, option("MODEL", "A model folder, a hub id, or demo.", "--model", "-m")]
DrafterName = Annotated[
    str | None, typer.Option(parser=drafter_name, metavar="MODEL", help="A drafter's folder or hub id, auto, or none.")
]
DraftLength = Annotated[str, option("N", "Tokens drafted a round, or auto; 0: none.")]
DType = Annotated[str | None, option("NAME", "Compute in bfloat16, float16 or float32; else the checkpoint's.")]
KvBits = Annotated[int | None, whole("Keep full layers' keys and values in 8 or 4 bits; else as computed.")]
Split = Annotated[str | None, option("NAME", "How several machines share the model: by tensors or layers.")]
Adapter = Annotated[Path | None, option("FOLDER", "Of mlx_gemma4.tune, mlx-lm or PEFT: LoRA or DoRA.")]
Adapters = Annotated[
    list[str],
    option("[NAME=]FOLDER", "One for all; or by name, repeatable: a request's model, or /adapter in a chat, chooses."),
]
StoreFolder = Annotated[Path | None, option("FOLDER", "Keep what has been read of prompts in a folder too.")]
MaxBatch = Annotated[int, above_0("Replies that are written at once, at most.")]
System = Annotated[str | None, option("TEXT", "Instructions for the whole conversation.")]
Thinking = Annotated[bool, switch("Let the model think before it answers.", "--thinking")]
ImageBudget = Annotated[int | None, whole("Tokens an image: 70, 140, 280, 560 or 1120.")]
MaxTokens = Annotated[int, above_0("The longest reply, in tokens.")]
Temperature = Annotated[float | None, number("Temperature; 0 is greedy.")]
TopP = Annotated[float | None, number("Sample from the most likely tokens of this mass.")]
TopK = Annotated[int | None, whole("Sample from this many tokens; 0: all.")]
MinP = Annotated[float | None, number("Leave out tokens below this part of the likeliest.")]
RepetitionPenalty = Annotated[float | None, number("Above 1, repeat less.")]
Seed = Annotated[int | None, whole("For the same reply again.")]
Version = Annotated[
    bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
]
Debug = Annotated[bool, switch("Show tracebacks.", "--debug")]


def adapters_of(given: list[str]) -> str | dict[str, str] | None:
    """What `--adapter` asks for: one folder, or several by name."""
    if not given or (len(given) == 1 and ("=" not in given[0] or Path(given[0]).is_dir())):
        return given[0] if given else None
    named: dict[str, str] = {}
    for own in given:
        name, _, folder = own.partition("=")
        if not name or not folder or name in named:
            raise ValueError(f"--adapter is {shown(own)}; expected NAME=FOLDER, each with a name of its own")
        named[name] = folder
    return named


def check_name(path: Path, name: str) -> None:
    """ValueError for a path to write to that no disk takes, or that is not UTF-8. name: the option it is of."""
    try:
        size = len(str(path).encode())
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is not UTF-8; expected a name that is, for {name}") from None
    longest, most = os.pathconf("/", "PC_NAME_MAX"), os.pathconf("/", "PC_PATH_MAX")
    if size >= most or any(len(part.encode()) > longest for part in path.parts):
        raise ValueError(f"{str(path)[:80]!r}… has {size} bytes; expected names of at most {longest}, for {name}")
