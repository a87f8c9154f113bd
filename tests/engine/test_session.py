"""A conversation goes on without being read again, is the same as a fresh one, and survives in a folder."""

import json
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversing import Loaded
from PIL import Image
from rounds import GREEDY

from mlx_gemma4 import PromptStore, Session, generate, load
from mlx_gemma4.engine.reading import fingerprint_of
from mlx_gemma4.engine.session import ABOUT, MESSAGES, STORE_FOLDER, is_session
from mlx_gemma4.weights.writing import part_of

TOOL = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}


def say(session: Session, text: str | None = None, **given: Any) -> Any:
    return session.send(text, max_tokens=5, sampling=GREEDY, **given)


def fresh(session: Session) -> list[int]:
    """What a fresh reading replies to the messages before the last."""
    own = session.settings
    return generate(
        session.model, session.processor, session.messages[:-1], tools=own.tools, thinking=own.thinking,
        image_budget=own.image_budget, max_tokens=5, sampling=GREEDY,
    ).token_ids  # fmt: skip


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_each_turn_reads_the_new_message_and_the_last_reply(
    tiny: Loaded, thinking: bool, tools: list[dict[str, Any]] | None
) -> None:
    session = Session(*tiny, system="be brief", tools=tools, thinking=thinking)
    total = 0
    for turn in range(5):
        text = "tell me more about number " + "one two three " * (turn % 3)
        reply = say(session, text)
        assert reply.token_ids == fresh(session)
        stats = reply.stats
        if turn:
            new = stats.prompt_tokens - total
            assert stats.prompt_tokens - stats.cached_tokens <= new + stats.generation_tokens + 32
        total = stats.prompt_tokens


def test_messages_may_be_edited(tiny: Loaded) -> None:
    session = Session(*tiny, system="be brief")
    for text in ("one", "two", "three"):
        say(session, text)
    session.messages[3] = {"role": "user", "content": "another two"}
    assert say(session, "four").token_ids == fresh(session)
    del session.messages[1:3]
    assert say(session, "five").token_ids == fresh(session)
    session.messages.append({"role": "nobody"})
    before = list(session.messages)
    with pytest.raises(ValueError, match="expected system, developer, user"):
        say(session, "six")
    assert session.messages == before


@pytest.mark.parametrize("messages", [None, 5, {}, ({"role": "user", "content": "one"},)])
def test_messages_that_nothing_can_be_added_to_are_refused_before_the_reply(tiny: Loaded, messages: Any) -> None:
    session = Session(*tiny)
    session.messages = messages
    with pytest.raises(ValueError, match=r"^messages is (None|an int|a dict|a tuple); expected a list of messages$"):
        say(session, "two")
    assert session.messages is messages


def test_a_fork_leaves_the_first_as_it_was(tiny: Loaded) -> None:
    session = Session(*tiny)
    say(session, "one " * 30)
    other = session.fork()
    first, second = say(session, "two"), say(other, "three")
    assert first.token_ids == fresh(session) and second.token_ids == fresh(other)
    assert second.stats.cached_tokens > 30 and len(session.messages) == len(other.messages) == 4


def test_an_edit_of_a_fork_is_none_of_the_first(tiny: Loaded) -> None:
    picture = Image.new("RGB", (48, 48))
    session = Session(*tiny)
    say(session, "one", images=[picture])
    other = session.fork()
    other.messages[0]["content"][1]["text"] = "two"
    session.messages[1]["content"] = "…"
    assert session.messages[0]["content"][1]["text"] == "one" and other.messages[1]["content"] != "…"
    assert other.messages[0]["content"][0]["image"] is picture  # found again as what has been read


def test_a_stream_that_is_left_changes_nothing_but_what_has_been_read(tiny: Loaded) -> None:
    session = Session(*tiny)
    stream = session.stream("one " * 40, max_tokens=20, sampling=GREEDY)
    next(stream)
    del stream
    assert session.messages == []
    reply = say(session, "one " * 40)
    assert reply.stats.cached_tokens == reply.stats.prompt_tokens - 1 and reply.token_ids == fresh(session)


def test_a_picture_is_read_once(tiny: Loaded) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 144, 3)).astype(np.uint8))
    session = Session(*tiny)
    say(session, "what", images=[picture])
    reply = say(session, "and now")
    assert reply.stats.cached_tokens > 70 and reply.token_ids == fresh(session)


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture
def spoken(tiny: Loaded, tmp_path: Path) -> Session:
    """A session with each kind of medium, saved in tmp_path / "saved"."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (96, 144, 3)).astype(np.uint8)
    file = tmp_path / "photo.png"
    Image.fromarray(pixels).save(file)
    session = Session(*tiny, system="be brief", thinking=True)
    say(session, "what", images=[file, Image.fromarray(255 - pixels)])
    say(session, "and this", audios=[(rng.standard_normal(3000).astype(np.float32) * 0.1, 16000)])
    url = {"type": "image_url", "image_url": {"url": str(file)}}
    session.messages.append({"role": "user", "content": [url, {"type": "text", "text": "again"}]})
    say(session)
    session.save(tmp_path / "saved")
    file.unlink()
    return session


def test_what_was_saved_goes_on_anywhere(tiny: Loaded, spoken: Session, tmp_path: Path) -> None:
    (tmp_path / "saved").rename(tmp_path / "moved")
    loaded = Session.load(tmp_path / "moved", *tiny)
    assert loaded.settings == spoken.settings
    reply = say(loaded, "and now")
    assert reply.stats.cached_tokens > reply.stats.prompt_tokens - 60
    assert reply.token_ids == fresh(loaded)
    texts = json.loads((tmp_path / "moved" / MESSAGES).read_text())
    assert texts[-1]["role"] == "assistant" and "photo.png" not in str(texts)


def test_only_its_owner_may_read_a_session(spoken: Session, tmp_path: Path) -> None:
    for path in [tmp_path / "saved", *(tmp_path / "saved").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_of_a_shared_store_only_its_own_conversation_is_saved(tiny: Loaded, tmp_path: Path) -> None:
    store = PromptStore()
    one, other = Session(*tiny, store=store), Session(*tiny, store=store)
    say(one, "my secret is one two three " * 20)
    say(other, "what is this " * 20)
    other.save(tmp_path / "saved")
    one.save(tmp_path / "one")
    Session(*tiny, store=store).save(tmp_path / "empty")  # which has said nothing
    assert not [*tmp_path.glob("empty/**/*.page")]
    reply = generate(*tiny, one.messages[:1], max_tokens=1, store=PromptStore(folder=tmp_path / "saved" / STORE_FOLDER))
    assert reply.stats.cached_tokens < 16


def test_what_cannot_be_saved_leaves_what_was(tiny: Loaded, tmp_path: Path) -> None:
    session = Session(*tiny)
    say(session, "one")
    session.save(tmp_path)
    before = (tmp_path / MESSAGES).read_bytes()
    for wrong in (
        {"role": "user", "content": [{"type": "image", "image": tmp_path / "missing.png"}]},
        {"role": "user", "content": 5},
        {"role": "user", "content": "half of a \ud83d"},
    ):
        session.messages.append(wrong)
        with pytest.raises((ValueError, OSError)):
            session.save(tmp_path)
        session.messages.pop()
        assert (tmp_path / MESSAGES).read_bytes() == before
    assert Session.load(tmp_path, *tiny).messages == session.messages


def test_a_conversation_that_fills_the_context_is_saved(tiny: Loaded, tmp_path: Path) -> None:
    session = Session(*tiny)
    say(session, "one")
    session.messages[-1]["content"] = "word " * 4096
    session.save(tmp_path)
    assert Session.load(tmp_path, *tiny).messages == session.messages


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (ABOUT, None), (MESSAGES, None), (ABOUT, "{"), (MESSAGES, "["), (MESSAGES, "{}"), (ABOUT, "[]"),
        (ABOUT, '{"format": 2}'), (ABOUT, '{"format": 1}'), (MESSAGES, '[{"role": "nobody"}]'), (MESSAGES, "[5]"),
        (MESSAGES, '[{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]'),
        (MESSAGES, '[{"role": "user", "content": [{"type": "image", "image": "media/../session.json"}]}]'),
        (MESSAGES, '[{"role": "user", "content": [{"type": "image", "image": "media/lost.png"}]}]'),
        (MESSAGES, "[" * 100_000),
        (ABOUT, '{"format": 1, "settings": {"tools": null, "thinking": false, "image_budget": null, "adapter": null}}'),
    ],
)  # fmt: skip
def test_a_torn_session_is_one_line(tiny: Loaded, tmp_path: Path, name: str, content: str | None) -> None:
    session = Session(*tiny)
    say(session, "one")
    session.save(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        Session.load(tmp_path, *tiny)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_a_system_hides_in_a_folder_does_not_make_it_another(tmp_path: Path) -> None:
    """Or what a kill has left of the first saving."""
    for name in (".DS_Store", part_of(tmp_path / ABOUT).name):
        (tmp_path / name).touch()
        assert not is_session(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="which holds other files; expected a session, or a new folder"):
        is_session(tmp_path)


@pytest.mark.parametrize("settings", [{"thinking": 5}, {"tools": 5}, {"image_budget": "x"}, {"other": 1}])
def test_settings_are_checked(tiny: Loaded, tmp_path: Path, settings: dict[str, Any]) -> None:
    Session(*tiny).save(tmp_path)
    about = json.loads((tmp_path / ABOUT).read_text())
    (tmp_path / ABOUT).write_text(json.dumps(about | {"settings": about["settings"] | settings}))
    with pytest.raises(ValueError, match="expected"):
        Session.load(tmp_path, *tiny)


def test_a_session_of_another_model_is_refused(tiny: Loaded, other: Loaded, tmp_path: Path) -> None:
    session = Session(*tiny)
    say(session, "one")
    session.save(tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        Session.load(tmp_path, *other)
    assert fingerprint_of(tiny[0]) != fingerprint_of(other[0])


def test_a_session_goes_on_in_another_computing_type(tiny: Loaded, tiny_folder: Path, tmp_path: Path) -> None:
    """Read anew once: what was read in one type is not found in another."""
    session = Session(*tiny)
    say(session, "one")
    session.save(tmp_path)
    loaded = Session.load(tmp_path, *load(tiny_folder, dtype="bfloat16"))
    assert loaded.messages == session.messages
    assert [say(loaded, text).stats.cached_tokens > 0 for text in ("two", "three")] == [False, True]


SAVER = """
import sys
from mlx_gemma4 import Sampling, Session, load
session = Session(*load({model!r}))
for turn in range(100):
    session.send("one " * 40, max_tokens=2, sampling=Sampling(temperature=0))
    print(turn, flush=True)
    session.save({folder!r})
"""


KILLED = """
import os
import signal
from pathlib import Path
from mlx_gemma4 import Session, load
session = Session(*load({model!r}), system="be brief")
renamed = []

def replace(self, target):
    if len(renamed) == {renames}:
        os.kill(os.getpid(), signal.SIGKILL)
    renamed.append(os.replace(self, target))

Path.replace = replace
session.save({folder!r})
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_what_a_kill_has_left_of_a_first_saving_is_found(
    tiny: Loaded, tiny_folder: Path, tmp_path: Path, renames: int
) -> None:
    """Of the two files neither or one has its name."""
    folder = tmp_path / "saved"
    code = KILLED.format(model=str(tiny_folder), folder=str(folder), renames=renames)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len([name for name in (ABOUT, MESSAGES) if (folder / name).exists()]) == renames
    session = Session.load(folder, *tiny)
    assert session.messages == [{"role": "system", "content": "be brief"}]
    session.save(folder)
    assert {file.name for file in folder.iterdir()} >= {ABOUT, MESSAGES}
    assert Session.load(folder, *tiny).messages == session.messages


@pytest.mark.parametrize("turns", [1, 3])
def test_a_process_killed_while_it_saves_leaves_a_whole_session(
    tiny: Loaded, tiny_folder: Path, tmp_path: Path, turns: int
) -> None:
    code = textwrap.dedent(SAVER).format(model=str(tiny_folder), folder=str(tmp_path / "saved"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(turns):
        process.stdout.readline()
    time.sleep(0.005 * turns)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if turns == 1:  # nothing was there before
        session = Session(*tiny, store=PromptStore(folder=tmp_path / "saved" / STORE_FOLDER))
    else:
        session = Session.load(tmp_path / "saved", *tiny)
        assert len(session.messages) in (2 * turns - 2, 2 * turns)
    assert say(session, "two").token_ids == fresh(session)
