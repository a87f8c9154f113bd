"""What lies in a store's folder is found by any process, whole or not at all, and bounded."""

import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import pytest
from conversing import PAGED, Loaded, difference, stored_logits, words
from toy_checkpoint import write_checkpoint

from mlx_gemma4 import Engine, Prompt, collect, load
from mlx_gemma4.decoding.disk import Disk
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.weights import writing

IDS = words(0, 300)
FREE_DISK = namedtuple("FREE_DISK", "total used free")(10**15, 0, 10**15)


@pytest.fixture(autouse=True)
def free_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: FREE_DISK)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("paged"), PAGED, seed=3)


@pytest.fixture(scope="module")
def paged(model_folder: Path) -> Loaded:
    return load(model_folder)


@pytest.fixture(scope="module")
def expected(paged: Loaded) -> mx.array:
    return paged[0].logits(Prompt(IDS))[0, -1]


@pytest.fixture
def kept(paged: Loaded, tmp_path: Path) -> Path:
    """A folder in which IDS are kept."""
    store = PromptStore(folder=tmp_path / "kept")
    stored_logits(paged, store, Prompt(IDS))
    store.save()
    return tmp_path / "kept"


def test_another_store_on_the_folder_goes_on_from_it(paged: Loaded, kept: Path, expected: mx.array) -> None:
    logits, cached = stored_logits(paged, PromptStore(folder=kept), Prompt(IDS))
    assert cached == 299 and difference(logits, expected) < 1e-4
    prompt = Prompt(IDS[:200] + words(1, 100))
    logits, cached = stored_logits(paged, PromptStore(folder=kept), prompt)
    assert cached == 200 and difference(logits, paged[0].logits(prompt)[0, -1]) < 1e-4


def test_a_new_store_has_only_what_the_folder_has(paged: Loaded, kept: Path) -> None:
    assert stored_logits(paged, PromptStore(folder=kept), Prompt(words(7, 300)))[1] == 0
    shutil.rmtree(kept)
    store = PromptStore(folder=kept)
    assert stored_logits(paged, store, Prompt(IDS))[1] == 0


def test_a_folder_that_is_deleted_is_made_anew(paged: Loaded, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PromptStore(folder=kept)
    shutil.rmtree(kept)  # at any time
    assert stored_logits(paged, store, Prompt(IDS))[1] == 0
    store.save()
    assert stored_logits(paged, PromptStore(folder=kept), Prompt(IDS))[1] == 299
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700 and not caplog.records


def test_nobody_else_may_read_it(kept: Path) -> None:
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in kept.iterdir()} == {0o600}


def test_it_is_written_at_the_second_use_and_at_the_end_but_not_at_every_turn(paged: Loaded, tmp_path: Path) -> None:
    store = PromptStore(folder=tmp_path)
    stored_logits(paged, store, Prompt(IDS))
    assert not list(tmp_path.iterdir())
    stored_logits(paged, store, Prompt([*IDS, *words(1, 5)]))
    second = set(tmp_path.iterdir())
    assert second
    for turn in range(3):
        stored_logits(paged, store, Prompt([*IDS, *words(1, 5), *words(2, 40 * (turn + 1))]))
    assert set(tmp_path.iterdir()) == second
    del store
    assert set(tmp_path.iterdir()) > second


def test_what_an_engine_has_read_is_written_at_the_end(paged: Loaded, tmp_path: Path) -> None:
    store = PromptStore(folder=tmp_path)
    with Engine(*paged, store=store) as engine:
        collect(engine.submit(Prompt(IDS), max_tokens=4))
    assert store.lines and not list(tmp_path.iterdir())
    del engine, store
    assert stored_logits(paged, PromptStore(folder=tmp_path), Prompt(IDS))[1] == 299


def test_what_is_evicted_is_kept_there(paged: Loaded, tmp_path: Path) -> None:
    store = PromptStore(folder=tmp_path)
    stored_logits(paged, store, Prompt(IDS))
    store.leave(0)
    assert not store.lines and stored_logits(paged, store, Prompt(IDS))[1] == 299


def test_any_changed_byte_is_a_miss_and_one_line(
    paged: Loaded, kept: Path, expected: mx.array, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    rng = random.Random(0)
    for trial in range(24):
        folder = tmp_path / str(trial)
        shutil.copytree(kept, folder)
        file = rng.choice(sorted(folder.iterdir()))
        damage(rng, file)
        caplog.clear()
        logits, cached = stored_logits(paged, PromptStore(folder=folder), Prompt(IDS))
        assert difference(logits, expected) < 1e-4
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1
        assert cached < 299
        shutil.rmtree(folder)


def damage(rng: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    what = rng.choice(["bit", "bit", "bytes", "cut", "longer", "empty", "head"])
    if what == "bit":
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
    elif what == "bytes":
        place = rng.randrange(len(data))
        data[place : place + 8] = rng.randbytes(8) + b"\xff"
    elif what == "cut":
        del data[rng.randrange(len(data)) :]
    elif what == "longer":
        data += rng.randbytes(rng.randint(1, 100))
    elif what == "empty":
        data.clear()
    else:
        place = rng.randrange(60)
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def test_files_under_each_others_names_are_misses(paged: Loaded, kept: Path, expected: mx.array) -> None:
    files = sorted(kept.iterdir())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    logits, _ = stored_logits(paged, PromptStore(folder=kept), Prompt(IDS))
    assert difference(logits, expected) < 1e-4


def test_one_bound_holds_for_all_that_lies_there(paged: Loaded, kept: Path) -> None:
    foreign = kept / f"full-{'0' * 32}-{'0' * 16}.page"
    foreign.write_bytes(b"of another version" * 1000)
    os.utime(foreign, (0, 0))
    most = sum(file.stat().st_size for file in kept.iterdir())
    for seed in range(4):
        store = PromptStore(folder=kept, disk_bytes=most)
        stored_logits(paged, store, Prompt(words(seed + 1, 300)))
        store.save()
        assert sum(file.stat().st_size for file in kept.iterdir()) <= most
        assert stored_logits(paged, PromptStore(folder=kept), Prompt(words(seed + 1, 300)))[1] == 299
    assert not foreign.exists()


def test_the_beginning_of_a_line_is_deleted_last(paged: Loaded, kept: Path) -> None:
    assert stored_logits(paged, PromptStore(folder=kept), Prompt(IDS))[1] == 299
    disk = Disk(kept, sum(file.stat().st_size for file in kept.iterdir()) * 2 // 3)
    assert disk.make_room(0)
    assert stored_logits(paged, PromptStore(folder=kept), Prompt(IDS))[1] >= 128


def test_a_tenth_of_the_disk_stays_free(
    paged: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: FREE_DISK._replace(free=10**14))
    store = PromptStore(folder=tmp_path)
    stored_logits(paged, store, Prompt(IDS))
    store.save()
    assert not list(tmp_path.iterdir())
    assert len(caplog.records) == 1 and "no room" in caplog.text


def test_a_disk_that_is_full_is_one_line(
    paged: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PromptStore(folder=tmp_path)
    stored_logits(paged, store, Prompt(IDS))

    def full(fd: int, mode: str) -> object:
        os.close(fd)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "open", full, raising=False)
    store.save()
    assert not list(tmp_path.iterdir())
    assert len(caplog.records) == 1 and "No space left" in caplog.text


@pytest.mark.parametrize("what", ["file", "below a file"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, what: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="expected a folder to write to"):
        PromptStore(folder=file if what == "file" else file / "folder")


def test_a_bound_of_a_folder_that_is_not_given_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^disk_bytes is 5 without a folder; expected a folder too, or no disk_bytes$"
    ):
        PromptStore(disk_bytes=5)


@pytest.mark.parametrize("name", ["max_bytes", "disk_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_bounds_are_whole_numbers_above_0(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; expected a whole number of bytes above 0"):
        PromptStore(**{name: value})  # type: ignore[arg-type]


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from conversing import stored_logits, words
from mlx_gemma4 import Prompt, load
from mlx_gemma4.decoding.store import PromptStore

loaded = load({model!r})
for seed in range(100):
    store = PromptStore(folder={folder!r})
    stored_logits(loaded, store, Prompt(words(seed, 300)))
    print(seed, flush=True)
    store.save()
"""


def test_a_process_killed_while_it_saves_leaves_whole_files(
    paged: Loaded, model_folder: Path, tmp_path: Path, expected: mx.array, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    code = textwrap.dedent(WRITER).format(paths=sys.path, model=str(model_folder), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    logits, _ = stored_logits(paged, PromptStore(folder=folder), Prompt(IDS))
    assert difference(logits, expected) < 1e-4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
