"""The command mlx_gemma4.generate: on real files in a subprocess, and every bad input in one line."""

import json
import os
import pty
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from conftest import Run
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from mlx_gemma4 import Sampling, generate, load, stream_generate
from mlx_gemma4.commands.generate import main
from mlx_gemma4.config import SUPPORTED
from mlx_gemma4.model.model import Model
from mlx_gemma4.planner import predict
from mlx_gemma4.prompt.messages import request_messages
from mlx_gemma4.prompt.processor import OLD_TEMPLATE_BYTES, Processor
from mlx_gemma4.weights.load import open_checkpoint
from mlx_gemma4.weights.tensors import INDEX

Loaded = tuple[Model, Processor]

GREEDY = ("--temp", "0", "--draft-length", "0")


def command(*args: object, stdin: str | bytes = b"") -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    words = [sys.executable, "-m", "mlx_gemma4.generate", *map(str, args)]
    done = subprocess.run(words, input=data, capture_output=True, timeout=60)
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def run(in_process: Callable[..., Run]) -> Run:
    return in_process("mlx_gemma4.generate", main)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None takes one away."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


# --- files -------------------------------------------------------------------------------------


def picture(seed: int = 0) -> Image.Image:
    """Smooth, so that JPEG keeps it, and of no symmetry."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((140, 100), Image.Resampling.BICUBIC)


def tone(rate: int = 16000, seconds: float = 0.5) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one real file of each kind."""
    folder = tmp_path_factory.mktemp("media")
    image = picture()
    image.save(folder / "a.png")
    picture(1).save(folder / "b.png")
    orientation = Image.Exif()
    orientation[0x0112] = 6  # turn by 90° clockwise to see it upright
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "phone.jpg", exif=orientation, quality=95)
    with Image.open(folder / "phone.jpg") as phone:
        ImageOps.exif_transpose(phone).save(folder / "upright.png")
        sideways = Image.fromarray(np.asarray(phone))
        sideways.save(folder / "sideways.png")
    soundfile.write(folder / "a.wav", tone(44100), 44100)
    soundfile.write(folder / "a.mp3", np.stack([tone(22050), tone(22050)], 1), 22050, format="MP3")
    soundfile.write(folder / "long.wav", np.zeros(16000 * 31, np.int16), 16000)
    write_video(folder / "a.mp4")
    return folder


def write_video(path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(2))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for seed in range(3):
            frame = av.VideoFrame.from_image(picture(seed).resize((64, 48)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# --- answers -----------------------------------------------------------------------------------


def test_the_answer_and_nothing_else_goes_to_standard_output(tiny_folder: Path, tiny: Loaded) -> None:
    done = command("--model", tiny_folder, "--prompt", "hello", "--max-tokens", 12, *GREEDY)
    reply = generate(*tiny, "hello", max_tokens=12, sampling=Sampling(temperature=0), draft_length=0)
    assert (done.returncode, done.stdout) == (0, reply.text + "\n")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"prompt {reply.stats.prompt_tokens} tokens, ")
    assert "runpy" not in done.stderr


def test_the_console_script_is_the_same_command(tiny_folder: Path, run: Run) -> None:
    args = ("--model", str(tiny_folder), "--prompt", "hello", "--max-tokens", "8", "--seed", "3")
    script = Path(sys.executable).with_name("mlx_gemma4.generate")
    done = subprocess.run([str(script), *args], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == run(*args)[:2]


def test_every_kind_of_file_is_read(tiny_folder: Path, tiny: Loaded, media: Path) -> None:
    files = {"image": ["a.png", "phone.jpg"], "audio": ["a.wav", "a.mp3"], "video": ["a.mp4"]}
    options = [word for kind, names in files.items() for name in names for word in (f"--{kind}", media / name)]
    ask = ("--prompt", "what", "--system", "be short", "--image-budget", 70, "--max-tokens", 8)
    done = command("--model", tiny_folder, *options, *ask, *GREEDY)
    images, audios, videos = ([str(media / name) for name in names] for names in files.values())
    reply = generate(
        *tiny, "what", images, audios, videos, "be short", image_budget=70, max_tokens=8,
        sampling=Sampling(temperature=0), draft_length=0,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, reply.text + "\n")
    assert done.stderr.startswith(f"prompt {reply.stats.prompt_tokens} tokens")


@pytest.mark.parametrize("option", ["image", "audio", "video"])
def test_media_make_a_difference(tiny_folder: Path, media: Path, run: Run, option: str) -> None:
    file = {"image": "a.png", "audio": "a.wav", "video": "a.mp4"}[option]
    ask = ("--model", tiny_folder, "--prompt", "what", "--max-tokens", 8, *GREEDY)
    assert run(*ask, f"--{option}", media / file)[1] != run(*ask)[1]


def test_a_photo_is_seen_upright(tiny_folder: Path, media: Path, run: Run) -> None:
    ask = ("--model", tiny_folder, "--prompt", "what", "--max-tokens", 12, *GREEDY)
    names = ("phone.jpg", "upright.png", "sideways.png")
    phone, upright, sideways = (run(*ask, "--image", media / name)[1] for name in names)
    assert phone == upright
    assert phone != sideways


def test_a_heic_photo_is_read(tiny_folder: Path, tmp_path: Path, run: Run) -> None:
    heif = pytest.importorskip("pillow_heif")
    if not heif.libheif_info()["HEIF"]:
        pytest.skip("this libheif cannot write HEIC")
    heif.from_pillow(picture()).save(str(tmp_path / "a.heic"))
    assert run("--model", tiny_folder, "--prompt", "what", "--image", tmp_path / "a.heic", "--max-tokens", 2)[0] == 0


def test_media_keep_the_order_they_are_given_in(tiny_folder: Path, media: Path, run: Run) -> None:
    ask = ("--model", tiny_folder, "--prompt", "what", "--max-tokens", 12, *GREEDY)
    first = run(*ask, "--image", media / "a.png", "--image", media / "b.png")[1]
    second = run(*ask, "--image", media / "b.png", "--image", media / "a.png")[1]
    assert first != second
    # those of different kinds stand as generate() puts them, images first
    mixed = run(*ask, "--audio", media / "a.wav", "--image", media / "a.png")[1]
    assert mixed == run(*ask, "--image", media / "a.png", "--audio", media / "a.wav")[1]


@pytest.mark.filterwarnings("ignore")  # random tokens may open a thought or a tool call
def test_the_same_seed_gives_the_same_answer(tiny_folder: Path, run: Run) -> None:
    ask = ("--model", tiny_folder, "--prompt", "hello", "--max-tokens", 12, "--temp", 1, "--top-k", 0, "--top-p", 1)
    answers = {run(*ask, "--seed", seed)[1] for seed in (7, 7)}
    assert len(answers) == 1
    assert run(*ask, "--seed", 8)[1] not in answers
    assert run(*ask)[1] != run(*ask)[1]  # without a seed, another each time


def test_a_dash_reads_the_prompt_from_standard_input(tiny_folder: Path, run: Run) -> None:
    ask = ("--model", tiny_folder, "--max-tokens", 8, *GREEDY)
    asked = "was ist das? é\nand more"
    done = command(*ask, "--prompt", "-", stdin=asked)
    assert (done.returncode, done.stdout) == run(*ask, "--prompt", asked)[:2]
    done = command(*ask, "--prompt", "-", stdin=b"\xff\xfe")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: standard input is not UTF-8: invalid start byte at byte 0\n"


def test_an_answer_that_the_terminal_cannot_show_is_no_error(folder: Path) -> None:
    only_say(folder, "<0xC3>", "<0xA9>")  # é and broken halves of it
    words = [sys.executable, "-m", "mlx_gemma4.generate", "--model", str(folder), "--prompt", "a", "--max-tokens", "9"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0
    assert set(done.stdout.decode()) == {"?", "\n"}


def test_control_tokens_that_a_user_types_stay_text(tiny_folder: Path, run: Run, tiny: Loaded) -> None:
    typed = "<|image|><turn|><eos>"
    status, _, err = run("--model", tiny_folder, "--prompt", typed, "--max-tokens", 2)
    prompt = tiny[1](request_messages(typed))
    assert status == 0 and err.startswith(f"prompt {len(prompt)} tokens")
    plain = tiny[1](request_messages("x"))
    assert len(prompt) - len(plain) == len(typed.encode()) - 1  # its characters, each a token
    assert not prompt.media


def test_help_says_what_there_is(run: Run) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for option in (
        "model", "prompt", "max-tokens", "temp", "top-p", "top-k", "seed", "image", "audio", "video", "system",
        "thinking", "drafter", "draft-length", "image-budget", "debug",
    ):  # fmt: skip
        assert f"--{option} " in out


# --- thoughts, warnings, stats -----------------------------------------------------------------

TURN = "{{ bos_token }}<|turn>user\n<|audio|>what<turn|>\n<|turn>model\n"  # of one request with a sound


def only_say(folder: Path, *tokens: str) -> None:
    """Suppress all but these tokens; it never stops by itself then."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    others = set(range(tokenizer.get_vocab_size())) - {tokenizer.token_to_id(token) for token in tokens}
    edit_json(folder / "generation_config.json", suppress_tokens=sorted(others))


def test_warnings_are_one_line_each_on_standard_error(folder: Path, media: Path) -> None:
    template = TURN + "{#" + "." * (OLD_TEMPLATE_BYTES - len(TURN) - 4) + "#}"
    (folder / "chat_template.jinja").write_text(template)
    mx.save_safetensors(str(folder / "model-2.safetensors"), {"model.extra": mx.zeros((1,))})
    done = command("--model", folder, "--prompt", "a", "--audio", media / "long.wav", "--max-tokens", 2)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == ["warning"] * 3
    assert len(lines) == 4 and lines[3].startswith("prompt ")
    assert "the model has no place for 1 tensors, left out: model.extra" in done.stderr
    assert "holds the old chat template, which leaks thoughts" in done.stderr
    assert "is 31.0 s long; the model was trained on clips of at most 30 s" in done.stderr


@pytest.mark.filterwarnings("default")
def test_a_thought_goes_to_standard_error_and_says_when_it_does_not_end(folder: Path, media: Path, run: Run) -> None:
    (folder / "chat_template.jinja").write_text(TURN + "<|channel>thought\n")
    ask = ("--model", folder, "--prompt", "a", "--audio", media / "a.wav", "--max-tokens", 6, *GREEDY)
    only_say(folder, *"abcd")
    status, out, err = run(*ask)
    lines = err.splitlines()
    assert (status, out) == (0, "")
    assert len(lines[0]) == 6
    assert lines[1] == "warning: the 6 tokens ran out inside the thought; raise max_tokens"
    assert len(lines) == 3 and lines[2].startswith("prompt ")


def test_answer_and_thought_are_kept_apart(folder: Path, media: Path, run: Run) -> None:
    (folder / "chat_template.jinja").write_text(TURN + "<|channel>thought\n")
    only_say(folder, *"abcd", "<channel|>")
    ask = ("--model", folder, "--prompt", "a", "--audio", media / "a.wav", "--max-tokens", 30, "--temp", 50)
    for seed in range(20):
        status, out, err = run(*ask, "--seed", seed, "--top-k", 0, "--top-p", 1)
        thought, stats = err.splitlines() if err.count("\n") == 2 else ("", "")
        if thought and out:
            break
    assert status == 0
    assert out[-1] == "\n" and stats.startswith("prompt ")
    assert set(thought) | set(out[:-1]) <= set("abcd")
    assert len(thought) + len(out[:-1]) < 30


def test_standard_output_closed_early_is_no_error(tiny_folder: Path) -> None:
    words = [sys.executable, "-m", "mlx_gemma4.generate", "--model", str(tiny_folder), "--prompt", "a", "--seed", "1"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None and running.stderr is not None
    assert len(running.stdout.read(1)) == 1
    running.stdout.close()
    errors = running.stderr.read().decode()
    running.stderr.close()
    assert running.wait(30) == 141
    assert errors == ""


# --- Ctrl-C and the terminal -------------------------------------------------------------------


def test_ctrl_c_prints_what_there_is(folder: Path) -> None:
    only_say(folder, *"abcdefgh")
    words = [sys.executable, "-m", "mlx_gemma4.generate", "--model", str(folder), "--prompt", "a", "--seed", "1"]
    words += ["--max-tokens", "4000"]
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    first = running.stdout.read(20)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err == b""
    answer = (first + out).decode()
    assert answer.endswith("\n") and 20 <= len(answer) < 4000
    whole = ""
    # the same max_tokens, for the size of the cache changes how sums are rounded
    for piece in stream_generate(*load(folder), "a", max_tokens=4000, sampling=Sampling(seed=1)):
        whole += piece.text
        if len(whole) >= len(answer):
            break
    assert whole.startswith(answer[:-1])


def read_terminal(master: int, until: float) -> bytes:
    """What a process writes to a terminal before it ends."""
    seen = b""
    while time.monotonic() < until:
        if not select.select([master], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not data:
            break
        seen += data
    return seen


def test_bars_show_on_a_terminal_only(tiny_folder: Path) -> None:
    ask = ["--model", str(tiny_folder), "--prompt", "a" * 1100, "--max-tokens", "2", "--seed", "1"]
    piped = command(*ask)
    assert piped.returncode == 0 and len(piped.stderr.splitlines()) == 1
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "mlx_gemma4.generate", *ask]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=slave, env=environment)
    os.close(slave)
    seen = read_terminal(master, time.monotonic() + 30).decode()
    out, _ = running.communicate(timeout=30)
    os.close(master)
    assert running.returncode == 0
    assert "Loading" in seen and "Reading" in seen and "%" in seen
    assert out.decode() == piped.stdout


# --- the package -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ["import mlx_gemma4.generate", "from mlx_gemma4 import generate"],
        ["from mlx_gemma4 import generate", "import mlx_gemma4.generate"],
        ["from mlx_gemma4.generate import generate"],
        [
            "from mlx_gemma4 import generate",
            "from mlx_gemma4.commands.generate import main",
            "import mlx_gemma4.generate",
        ],
    ],
)
def test_importing_the_submodule_does_not_hide_the_function(tiny_folder: Path, lines: list[str]) -> None:
    use = [
        "import mlx_gemma4",
        "assert mlx_gemma4.generate is generate",
        f"model, processor = mlx_gemma4.load({str(tiny_folder)!r})",
        "assert generate(model, processor, 'a', max_tokens=1).stats.prompt_tokens",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines + use)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- bad input ---------------------------------------------------------------------------------


def check_refused(result: tuple[int, str, str], status: int, *parts: str) -> None:
    """One line on standard error that holds these parts, and nothing else anywhere."""
    got, out, err = result
    assert (got, out) == (status, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert "Traceback" not in err and len(err) < 1000


OPTIONS: list[tuple[list[str], str]] = [
    (["--max-tokens", "0"], "'--max-tokens': '0'; expected a whole number above 0"),
    (["--max-tokens", "many"], "'--max-tokens': 'many'; expected a whole number"),
    (["--temp", "-1"], "temperature is -1.0; expected 0 or more"),
    (["--temp", "hot"], "'--temp': 'hot'; expected a number"),
    (["--temp", "nan"], "temperature is nan; expected 0 or more"),
    (["--top-p", "0"], "top_p is 0.0; expected above 0 and at most 1"),
    (["--top-p", "2"], "top_p is 2.0; expected above 0 and at most 1"),
    (["--top-k", "-1"], "top_k is -1; expected a whole number, 0 or more"),
    (["--top-k", "1.5"], "'--top-k': '1.5'; expected a whole number"),
    (["--min-p", "2"], "min_p is 2.0; expected from 0 to 1"),
    (["--repetition-penalty", "0"], "repetition_penalty is 0.0; expected above 0"),
    (["--seed", "-1"], "seed is -1; expected a whole number, from 0 to"),
    (["--image-budget", "300"], "image_budget is 300; expected one of 70, 140, 280, 560, 1120"),
    (["--draft-length", "x"], "draft_length is 'x'; expected "),
    (["--drafter", "/no/such/drafter"], "/no/such/drafter"),
    (["--prompt", ""], "the prompt is empty; expected a text, an image, an audio or a video"),
    (["--prompt", " \n"], "the prompt is empty"),
    (["--prompt"], "'--prompt' requires an argument"),
    (["--image"], "'--image' requires an argument"),
    (["--colour", "red"], "No such option: --colour"),
    (["more"], "unexpected extra argument"),
    (["9" * 5000], "unexpected extra argument(s) (9999"),
    (["--thinking=yes"], "'--thinking' does not take a value"),
    (["--prompt", "\udcff"], "half of a surrogate pair"),  # as Python reads a byte that is no UTF-8
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=[" ".join(words)[:30] for words, _ in OPTIONS])
def test_a_wrong_option_is_refused(tiny_folder: Path, run: Run, words: list[str], message: str) -> None:
    check_refused(run("--model", tiny_folder, "--prompt", "a", *words), 2, message)


def test_a_prompt_is_needed(run: Run) -> None:
    check_refused(run(), 2, "--prompt")


def test_a_wrong_request_is_refused_before_anything_is_loaded(
    tiny_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the weights are loaded for a request that is wrong")

    monkeypatch.setattr("mlx_gemma4.commands.generate.load_values", never)
    ask = ("--model", tiny_folder, "--prompt", "a")
    check_refused(run(*ask, "--image", __file__), 2, "is no image known here")
    check_refused(run("--model", tiny_folder, "--prompt", "a" * 5000), 2, "the context holds 4096")
    monkeypatch.setattr("mlx_gemma4.weights.load.find_folder", never)  # nor downloaded
    check_refused(run(*ask, "--image", "/no/such.png"), 2, "image '/no/such.png' does not exist")
    check_refused(run(*ask, "--image-budget", 1), 2, "image_budget is 1; expected one of")
    check_refused(run(*ask, "--max-tokens", 0), 2)
    check_refused(run(*ask, "--temp", -1), 2)


def test_an_answer_is_held_to_a_schema(tiny_folder: Path, tmp_path: Path, run: Run) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    status, out, _ = run("--model", tiny_folder, "--prompt", "hello", "--schema", schema, "--seed", 1)
    assert status == 0 and out.strip() in ('"yes"', '"no"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"uniqueItems": true}', "the keyword uniqueItems cannot be held"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_schema_is_refused(tmp_path: Path, run: Run, text: str | None, message: str) -> None:
    schema = tmp_path / "schema.json"
    if text is not None:
        schema.write_text(text)
    status, out, error = run("--model", tmp_path, "--prompt", "hello", "--schema", schema)
    assert status == 2 and out == "" and message in error and error.count("\n") == 1


def test_a_prompt_that_fills_the_context_is_refused(tiny_folder: Path, run: Run) -> None:
    result = run("--model", tiny_folder, "--prompt", "a" * 5000)
    check_refused(result, 2, "the prompt has 50", " tokens; the context holds 4096, the reply included")


# media


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty (0 bytes)"),
        (b"\0" * 3000, ""),
        (b"plain text, and no media at all\n" * 50, ""),
        ("half", ""),
    ],
    ids=["missing", "empty", "zeros", "text", "truncated"],
)
def test_a_media_file_that_cannot_be_read_is_refused(
    tiny_folder: Path, media: Path, tmp_path: Path, run: Run, kind: str, content: bytes | str | None, message: str
) -> None:
    file = tmp_path / f"file.{kind}"
    if content == "half":
        whole = (media / {"image": "a.png", "audio": "a.mp3", "video": "a.mp4"}[kind]).read_bytes()
        content = whole[: len(whole) // 2] if kind != "audio" else whole[:20]
    if isinstance(content, bytes):
        file.write_bytes(content)
    check_refused(run("--model", tiny_folder, "--prompt", "a", f"--{kind}", file), 2, f"{kind} '{file}' ", message)


def test_media_without_content_are_refused(tiny_folder: Path, tmp_path: Path, run: Run) -> None:
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    ask = ("--model", tiny_folder, "--prompt", "a")
    check_refused(run(*ask, "--audio", tmp_path / "none.wav"), 2, "none.wav' has no samples")
    (tmp_path / "none.bmp").write_bytes(bitmap(0, 0))
    check_refused(run(*ask, "--image", tmp_path / "none.bmp"), 2, "none.bmp' ")
    check_refused(run(*ask, "--image", tmp_path), 2, "is a folder; expected a file")


def bitmap(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 2835, 2835, 0, 0)


def test_a_file_of_another_kind_is_refused(tiny_folder: Path, media: Path, run: Run) -> None:
    ask = ("--model", tiny_folder, "--prompt", "a")
    check_refused(run(*ask, "--image", media / "a.wav"), 2, "a.wav' is no image known here; expected PNG")
    check_refused(run(*ask, "--audio", media / "a.png"), 2, "a.png' ")
    check_refused(run(*ask, "--video", media / "a.wav"), 2, "a.wav' has no video track")


def test_a_url_tells_a_wrong_request_from_a_failing_network(tiny_folder: Path, run: Run) -> None:
    ask = ("--model", tiny_folder, "--prompt", "a")
    check_refused(run(*ask, "--image", "http://127.0.0.1:1/a.png"), 1, "cannot be fetched: ", "refused")
    check_refused(run(*ask, "--image", "ftp://127.0.0.1/a.png"), 2, "has the scheme 'ftp'; expected a path or ")
    check_refused(run(*ask, "--image", "http://"), 2, "cannot be fetched: ")


def without(folder: Path, *words: str) -> None:
    """Take the tensors away whose name holds one of the words."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {name: value for name, value in weights.items() if not any(word in name for word in words)}
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), kept)


def test_media_for_a_checkpoint_without_their_modality_are_refused(folder: Path, media: Path, run: Run) -> None:
    ask = ("--model", folder, "--prompt", "a", "--max-tokens", "1")
    without(folder, "audio")
    check_refused(run(*ask, "--audio", media / "a.wav"), 2, "takes no audio; it takes text, image, video")
    assert run(*ask, "--image", media / "a.png")[0] == 0
    without(folder, "vision")
    for kind, name in (("image", "a.png"), ("video", "a.mp4"), ("audio", "a.wav")):
        check_refused(run(*ask, f"--{kind}", media / name), 2, f"this checkpoint takes no {kind}; it takes text")
    edit_json(folder / "config.json", vision_config=None, audio_config=None)
    check_refused(run(*ask, "--image", media / "a.png"), 2, "this checkpoint takes no image; it takes text")
    assert run(*ask)[0] == 0


# model folders


def test_a_model_that_is_not_there_is_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(run("--model", tmp_path / "none", "--prompt", "a"), 2, f"{tmp_path}/none", "expected a model folder")
    check_refused(run("--model", __file__, "--prompt", "a"), 2, "is a file; expected a model folder or a hub id")
    check_refused(run("--model", tmp_path, "--prompt", "a"), 2, "config.json is missing; expected a model folder")
    check_refused(run("--model", "", "--prompt", "a"), 2, "expected a model folder")


def damage(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "weights missing":
        weights.unlink()
    elif what == "weights empty":
        weights.write_bytes(b"")
    elif what == "weights cut in the header":
        weights.write_bytes(weights.read_bytes()[:500])
    elif what == "weights cut in the data":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "weights of another format":
        weights.write_bytes(b"PK\3\4" + b"pickle" * 1000)
    elif what == "a pointer of git-lfs":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif what == "shard missing":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    elif what == "index without map":
        (folder / INDEX).write_text("{}")
    elif what == "index of another type":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": 5}}))
    elif what == "index no JSON":
        (folder / INDEX).write_text("{")
    elif what == "tensor missing":
        without(folder, "layers.3.mlp.up_proj")
    elif what == "tensor of another shape":
        edit_json(config, text_config=json.loads(config.read_text())["text_config"] | {"intermediate_size": 100})
    elif what == "config missing":
        config.unlink()
    elif what == "config no JSON":
        config.write_text("{]")
    elif what == "config of another model":
        edit_json(config, model_type="llama")
    elif what == "config of another rope":
        text = json.loads(config.read_text())["text_config"]
        text["rope_parameters"]["full_attention"]["rope_type"] = "yarn"
        edit_json(config, text_config=text)
    elif what == "tokenizer missing":
        (folder / "tokenizer.json").unlink()
    elif what == "tokenizer no JSON":
        (folder / "tokenizer.json").write_text("{")
    elif what == "a GGUF alone":
        for file in folder.iterdir():
            file.unlink()
        (folder / "gemma.gguf").write_bytes(b"GGUF")
    elif what == "a GGUF in the place of the weights":
        (folder / "model.safetensors").rename(folder / "gemma.gguf")
    elif what == "tokenizer of another model":
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    elif what == "tokenizer a pointer of git-lfs":
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif what == "template damaged":
        (folder / "chat_template.jinja").write_text("{% if %}")
    elif what == "template failing":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('not\nthis') }}")


DAMAGES = {
    "weights missing": "has no model*.safetensors; expected a model folder",
    "weights empty": "model.safetensors is damaged or incomplete (",
    "weights cut in the header": "model.safetensors is damaged or incomplete (",
    "weights cut in the data": "model.safetensors is damaged or incomplete (",
    "weights of another format": "model.safetensors is damaged or incomplete (",
    "a pointer of git-lfs": "model.safetensors is a pointer of Git LFS; expected the file itself",
    "tokenizer a pointer of git-lfs": "tokenizer.json is a pointer of Git LFS; expected the file itself",
    "shard missing": "lacks model-00001-of-00002.safetensors, 1 of 1 weight files missing",
    "index without map": "model.safetensors.index.json has no weight_map; expected ",
    "index of another type": "model.safetensors.index.json names 5; expected a file in its folder",
    "index no JSON": "model.safetensors.index.json is not valid JSON: ",
    "tensor missing": "the checkpoint lacks 1 of 96 tensors, first language_model.layers.3.mlp.up_proj.weight",
    "tensor of another shape": "has shape [96, 64]; expected [100, 64]",
    "a GGUF alone": "a model folder with a config.json, which mlx_gemma4.convert makes of gemma.gguf",
    "a GGUF in the place of the weights": "expected a model folder, which mlx_gemma4.convert makes of gemma.gguf",
    "config missing": "config.json is missing; expected a model folder with a config.json",
    "config no JSON": "config.json is not valid JSON: ",
    "config of another model": "config.json: model_type is 'llama'; expected 'gemma4_unified'",
    "config of another rope": "rope_type of full_attention is 'yarn'; supported is 'proportional'",
    "tokenizer missing": "tokenizer.json is missing; expected a model folder with a tokenizer.json",
    "tokenizer no JSON": "tokenizer.json is not a tokenizer: ",
    "tokenizer of another model": "tokenizer.json",
    "template damaged": "chat_template.jinja holds no valid chat template: ",
    "template failing": "the chat template fails on ",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_refused(folder: Path, run: Run, what: str) -> None:
    damage(folder, what)
    check_refused(run("--model", folder, "--prompt", "a"), 2, DAMAGES[what])


@pytest.mark.parametrize("key", SUPPORTED)
def test_an_unsupported_config_value_is_refused(folder: Path, run: Run, key: str) -> None:
    config = folder / "config.json"
    value = {bool: not SUPPORTED[key][0], int: 7, str: "another"}[type(SUPPORTED[key][0])]
    edit_json(config, text_config=json.loads(config.read_text())["text_config"] | {key: value})
    check_refused(run("--model", folder, "--prompt", "a"), 2, f"{key} is {value!r}; supported is ")


def test_quantized_tensors_without_a_quantization_are_refused(folder: Path, run: Run) -> None:
    scales = {"model.language_model.layers.0.mlp.up_proj.scales": mx.zeros((1,))}
    mx.save_safetensors(str(folder / "model-2.safetensors"), scales)
    check_refused(run("--model", folder, "--prompt", "a"), 2, "mlp.up_proj is quantized, but config.json has no ")


def test_too_little_memory_is_a_failure_of_the_machine(
    tiny_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: 1000)
    check_refused(
        run("--model", tiny_folder, "--prompt", "a"), 1, "the model needs ", "this machine lets a model hold 0.0"
    )


def test_a_prompt_too_long_for_the_memory_is_said_before_loading(
    tiny_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = predict(open_checkpoint(tiny_folder, None).footprint, 100, 1).peak
    monkeypatch.setattr("mlx_gemma4.planner.memory_limit", lambda: room)
    monkeypatch.setattr("mlx_gemma4.commands.generate.load_shown", lambda checkpoint: pytest.fail("it loads"))
    asked = run("--model", tiny_folder, "--prompt", "a " * 2000, "--max-tokens", 1)
    check_refused(asked, 1, "tokens needs 0.", "expected a prompt of at most ")


@pytest.mark.parametrize(
    ("closed", "prompt", "status", "out"), [("0<&-", "-", 2, ""), ("2>&-", "What is 3 + 4?", 0, "3 + 4 = 7.\n")]
)
def test_streams_may_be_closed(closed: str, prompt: str, status: int, out: str) -> None:
    line = f'exec "$0" -m mlx_gemma4.generate --model demo --prompt "$1" {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable, prompt], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, out)
    assert ("error: standard input is closed; expected the prompt there" in done.stderr) == (status > 0)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = command("--model", tmp_path, "--prompt", "a", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "CheckpointError" in done.stderr
    done = command("--model", tmp_path, "--prompt", "a")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


# --- a conversation ----------------------------------------------------------------------------


def test_a_session_goes_on_also_where_a_shell_leaves_the_tilde(
    tiny_folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("one", "two"):
        status, _, err = run("--model", tiny_folder, "--session=~/talk", "--prompt", text, "--max-tokens", 3, *GREEDY)
        assert status == 0, err
    messages = json.loads((tmp_path / "talk" / "messages.json").read_text())
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one", "two"]
    for path in [tmp_path / "talk", *(tmp_path / "talk").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
