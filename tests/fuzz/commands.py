"""Command lines: an exit status of ours, on standard error only lines of ours, and no traceback."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from .judge import Fault, check_line, plain
from .judge import check as must
from .limits import MOST_BYTES
from .surface import DEMO, SAMPLES, run_command

SHARE = 5
STATUSES = (0, 1, 2)
LINES = re.compile(r"(error|warning|tool call): .|prompt \d+ tokens|drafter: |.* (of|parts?|blocks?|matrices) |not ")
CHAT = '{"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]}\n'


def prepare() -> None:
    """Nothing: a command is a process of its own."""


VALUES = (
    "", "0", "-1", "1", "2", "3", "4", "8", "70", "1.5", "-0.5", "1e-320", "1e308", "nan", "inf", "-inf",
    "2147483648", "9223372036854775808",
    "9" * 400, "9" * 5000, "0x10", "1_000", "١٢", "1e3", " 1 ", "auto", "none", "off", "true", "a", "é", "<|turn>",
    "a\nb", "x" * 300, "x" * 5000, "-",
    "--", "-h", "--help", ".", "..", "/", "~", "~nobody", "*", "demo", "model", "copy", "empty", "folder", "text.txt",
    "photo.png", "digit.mp3",
    "film.mp4", "missing.png", "owner/name", "a/b/c", "/dev/null", "/dev/full", "http://127.0.0.1:9/x",
    "file:///etc/passwd", "data:,", "data:image/png;base64,AA",
    "ftp://x/y", "16GB", "1B", "0GB", "99999999TB", "1.5.5GB", "4bit", "8bit", "mixed", "qat", "affine", "mxfp4",
    "nvfp4", "bfloat16", "float16", "float32",
    "data.jsonl", "new/deep/er", "out", "\udcff\udcfe", "a\udc80b", "tab\tbed", "%s%n", "$(id)", "'", '"', "\\",
    "\x1b[31m", "\u202e",
)  # fmt: skip
values = st.sampled_from(VALUES)
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {  # usual values; () for a flag
    "generate": {
        "--prompt": ("Hi", "-"), "--model": ("model",), "--image": ("photo.png",), "--audio": ("digit.mp3",),
        "--video": ("film.mp4",),
        "--system": ("Be brief.",), "--thinking": (), "--max-tokens": ("1",), "--temp": ("0", "1"),
        "--top-p": ("0.9",), "--top-k": ("5",),
        "--min-p": ("0.1",), "--repetition-penalty": ("1.1",), "--seed": ("1",), "--image-budget": ("70",),
        "--drafter": ("none", "auto"),
        "--draft-length": ("0", "3", "auto"), "--debug": (), "--help": (), "--dtype": ("float16",),
    },
    "convert": {
        "--hf-path": ("copy",), "--mlx-path": ("out",), "--recipe": ("4bit", "qat"), "--q-bits": ("4",),
        "--q-group-size": ("64",), "--q-mode": ("affine",),
        "--dtype": ("bfloat16",), "--scales": ("float32",), "--dequantize": (), "--drafter": ("none", "auto"),
        "--no-drafter": (), "--drafter-bits": ("4",),
        "--media-from": ("model",), "--debug": (),
    },
    "fit": {"MODEL": ("model",), "--context": ("100",), "--memory": ("16GB",), "--drafter": ("none", "auto"),
    "--debug": (), "--help": ()},
    "evaluate": {"MODEL": ("model",), "--data": ("data.jsonl",), "--save-logits": ("out.npz",), "--write-card": (),
    "--debug": ()},
}  # fmt: skip
REQUIRED = {
    "generate": ["--prompt", "--model", "--max-tokens"], "convert": ["--hf-path", "--mlx-path"], "fit": ["MODEL"],
    "evaluate": ["MODEL", "--data"],
}  # fmt: skip


def line(command: str) -> st.SearchStrategy[Any]:
    options = OPTIONS[command]

    def usual(name: str) -> st.SearchStrategy[list[str]]:
        if not options[name]:
            return st.just([name])
        value = st.sampled_from(options[name])
        return value.map(lambda value: [value] if name == "MODEL" else [name, value])

    def odd(name: str) -> st.SearchStrategy[list[str]]:
        return values.map(lambda value: [value] if name == "MODEL" else [name, value])

    whole = st.tuples(*map(usual, REQUIRED[command]))
    some = st.sampled_from(sorted(options))
    more = st.lists(
        st.one_of(some.flatmap(odd), some.flatmap(usual), some.flatmap(odd), values.map(lambda v: [v])), max_size=4
    )
    words = st.builds(lambda first, rest: [word for part in (*first, *rest) for word in part], whole, more)
    stdin = st.sampled_from([b"", b"Hi", b"\xff", b"\xef\xbb\xbfHi\r\n", b"a" * 100_000, b"\x00"])
    return st.fixed_dictionaries({"command": st.just(command), "words": words, "stdin": stdin})


def strategy() -> st.SearchStrategy[Any]:
    return st.sampled_from(["generate", "generate", "generate", "convert", "fit", "evaluate"]).flatmap(line)


def furnish(folder: Path) -> None:
    """What the usual values name."""
    (folder / "model").symlink_to(DEMO)
    (folder / "copy").mkdir()
    for file in DEMO.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder / "copy")
        elif file.name != "samples":
            (folder / "copy" / file.name).symlink_to(file)
    for name, sample in (("photo.png", "shapes.png"), ("digit.mp3", "digit.mp3"), ("film.mp4", "film.mp4")):
        shutil.copy(SAMPLES / sample, folder / name)
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "text.txt").write_text("hello\n")
    (folder / "data.jsonl").write_text(CHAT)


def check(value: Any) -> str | None:
    words = [word.encode(errors="surrogateescape") for word in value["words"]]
    if any(b"\x00" in word for word in words):
        return "refused"  # no command line can hold it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        furnish(folder)
        before = sorted(path.name for path in folder.iterdir())
        ran = run_command(value["command"], words, name, value["stdin"])
        left = sorted(path.name for path in folder.iterdir() if path.name not in before)
    err = ran.err.decode(errors="replace")
    told = f"{value['words']}\nstatus {ran.status}\n{err[-2000:]}"
    if "Traceback (most recent call last)" in err and "--debug" not in value["words"]:
        last = re.findall(r'mlx_gemma4/(\S+)", line (\d+)', err)
        raise Fault(f"a traceback, at {':'.join(last[-1]) if last else '?'}", told)
    if ran.status not in STATUSES:
        raise Fault(f"{value['command']} ended with status {ran.status}", told)
    must(ran.peak * 1024 < 2 * MOST_BYTES, "a command took more than 2 GB", told)
    if ran.status == 0:
        must("error: " not in err or "--help" in value["words"], "an error, and status 0", told)
        return None
    if not (ran.out and value["command"] == "fit"):  # which says on standard output that it does not fit
        check_error(err, value["command"], value["words"])
    must(value["command"] != "convert" or not left, "files are left behind", [left, told])
    return "refused"


def check_error(err: str, command: str, words: list[str]) -> None:
    """One line that begins with error:, and beside it only lines of ours."""
    if "--debug" in words:
        return
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    must(len(errors) == 1, f"{command}: not one line that begins with error:", err[-2000:])
    for text in err.splitlines():
        check_line(text or ".", f"a line of {command}")
        must(
            bool(LINES.match(text)) or not text,
            f"a line of {command} that is not ours: {plain(text)[:50]}",
            err[-2000:],
        )
