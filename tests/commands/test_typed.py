"""Files that are dropped into a terminal are taken for media, as every terminal writes them, and nothing else is."""

import shlex
from pathlib import Path
from urllib.parse import quote

import pytest

from mlx_gemma4.commands.typed import file_of, read_argument, read_typed

NAMES = [
    "photo.png", "my photo.jpg", "it's.webp", 'a "b".gif', "back\\slash.PNG", "(1) [2] {3}.heic", "Größe №5.jpeg",
    "Screenshot at 10.00.00\u202fPM.png", "100%.bmp", "a&b;c|d$e`f.tiff", "日本.mp3", "film.MOV", "tab\tbed.wav",
]  # fmt: skip


def escaped(path: Path) -> str:
    """As Terminal.app writes it."""
    return "".join(f"\\{char}" if char in " \t'\"\\()[]{}&;|$`%№" else char for char in str(path))


WAYS = {
    "shell": lambda path: shlex.quote(str(path)),
    "single": lambda path: "'" + str(path).replace("'", "'\\''") + "'",
    "double": lambda path: '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"',
    "backslashes": escaped,
    "URL": lambda path: "file://" + quote(str(path)),
    "host": lambda path: "file://localhost" + quote(str(path)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_file_is_taken(tmp_path: Path, name: str, way: str) -> None:
    file = tmp_path / name
    file.touch()
    word = WAYS[way](file)
    kind = {".mp3": "audio", ".wav": "audio", ".MOV": "video"}.get(file.suffix, "image")
    for line, text in (
        (word, ""),
        (f"{word} ", ""),
        (f"What is {word}?", "What is"),
        (f"{word}\nAnd this?", "And this?"),
    ):
        typed = read_typed(line)
        assert (typed.text, typed.media) == (text, ((kind, str(file)),)), line
    source, text = read_argument(f"{word} and this")
    assert (file_of(source), text) == (file, "and this")


def test_several_files_are_taken_in_their_order(tmp_path: Path) -> None:
    for name in ("a.png", "b c.mp3", "d.mp4"):
        (tmp_path / name).touch()
    line = f"Compare {tmp_path}/a.png with '{tmp_path}/b c.mp3'\n{tmp_path}/d.mp4 please"
    typed = read_typed(line)
    assert [kind for kind, _ in typed.media] == ["image", "audio", "video"]
    assert typed.text.split() == ["Compare", "with", "please"]


def test_a_home_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").touch()
    assert read_typed("~/a\\ b.png").media == (("image", str(tmp_path / "a b.png")),)
    assert read_argument("~/a b.png") == ("~/a b.png", "")


@pytest.mark.parametrize(
    "line",
    [
        "don't look at /etc/passwd, it's private",
        "/no/such/photo.png",
        "compare 3/4 and /dev/null",
        "a 'quoted' word and an open ' quote",
        "file:///no/such.png file://other.host/a.png file://[",
        "~nobody/x.png ~/",
        "/" + "x" * 5000 + ".png",
        "  two  spaces stay\n\n\tand lines",
        "'/",
        "\0/x.png /\0.png",
        "photo.png",
    ],
)
def test_everything_else_stays_as_it_is(line: str) -> None:
    assert read_typed(line).text == line and not read_typed(line).media


def test_text_files_stay_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert not read_typed(f"read {tmp_path}/notes.txt").media


@pytest.mark.parametrize(
    ("rest", "path", "text"),
    [
        ("photo.jpg What is this?", "photo.jpg", "What is this?"),
        ("my\\ photo.jpg What is this?", "my photo.jpg", "What is this?"),
        ("'my photo.jpg'", "my photo.jpg", ""),
        ('"my photo.jpg" What?', "my photo.jpg", "What?"),
        ("https://example.org/a.png?x=1 What?", "https://example.org/a.png?x=1", "What?"),
        ("'open", "'open", ""),
        ("", "", ""),
    ],
)
def test_a_command_takes_one_file_and_a_message(rest: str, path: str, text: str) -> None:
    assert read_argument(rest) == (path, text)


def test_a_command_takes_a_name_with_spaces_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photo.jpg").touch()
    assert read_argument("my photo.jpg") == ("my photo.jpg", "")
