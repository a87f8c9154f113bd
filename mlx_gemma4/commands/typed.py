"""What a person types -> the text, and the media whose paths or URLs stand in it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mlx_gemma4.media.source import file_url_path, url_scheme

SUFFIXES = {
    "image": "png jpg jpeg webp avif gif tif tiff bmp ppm pgm jp2 ico qoi heic heif",
    "audio": "wav flac ogg oga opus mp3 m4a aac aif aiff",
    "video": "mp4 m4v mov mkv webm avi mpg mpeg",
}
KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
# A word as terminals write the name of a file that is dropped there: absolute, in quotes or with backslashes. Names of
# screenshots on macOS have a narrow space in them, so that only these three characters end one.
WORD = r"(?:'[^']*'|\"(?:\\.|[^\"\\])*\"|\\.|[^ \t\n'\"\\])+"
DROPPED = re.compile(rf"(?<![^ \t\n])(?=['\"]?(?:/|~/|file://)){WORD}(?![^ \t\n])", re.DOTALL)
FIRST = re.compile(WORD, re.DOTALL)
PUNCTUATION = ",.;:!?)"

Medium = tuple[str, str]  # kind and source


@dataclass(frozen=True)
class Typed:
    text: str
    media: tuple[Medium, ...] = ()


def read_typed(line: str) -> Typed:
    """A message without the media files that are named in it; what names none stays as it is."""
    media: list[Medium] = []

    def take(word: re.Match[str]) -> str:
        for written in (word[0], word[0].rstrip(PUNCTUATION)):
            path = file_of(unquoted(written))
            if path is not None and (kind := KIND_OF_SUFFIX.get(path.suffix[1:].lower())) is not None:
                media.append((kind, str(path)))
                return ""
        return word[0]

    text = DROPPED.sub(take, line)
    return Typed(re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text).strip() if media else line, tuple(media))


def read_argument(rest: str) -> tuple[str, str]:
    """What follows /image: the path or the URL, as it is, in quotes or with backslashes, and a message behind it."""
    if file_of(rest) is not None:
        return rest, ""
    word = FIRST.match(rest)
    return (unquoted(word[0]), rest[word.end() :].strip()) if word is not None else (rest, "")


def unquoted(word: str) -> str:
    """As a shell reads it."""
    try:
        return "".join(shlex.split(word)) or word
    except ValueError:  # a quote that is left open
        return word


def file_of(name: str) -> Path | None:
    """The file that a path or a file:// URL names, if it is there."""
    try:
        path = Path(file_url_path(name) if url_scheme(name) == "file" else name).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, of another host, of a user who does not exist
        return None
