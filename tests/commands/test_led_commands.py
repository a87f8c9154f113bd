"""Commands on machines that share a model: the first one reads, writes and listens, the others follow."""

import json
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from conversing import logprobs_of
from machines import PATIENCE, SPLIT, Machine, patience, run_on
from toy_checkpoint import tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, load
from mlx_gemma4.model.split import SPLITS

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX was built without its ring")

PICTURE = Path(__file__).parents[1] / "demo" / "01-image.png"
Ends = list[tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ends]:
    """A command on so many machines: exit status, standard output and standard error of each."""

    def command(name: str, count: int, *arguments: object, typed: str = "") -> Ends:
        machines = run_on(["-m", f"mlx_gemma4.{name}", *map(str, arguments)], count, tmp_path / "hosts.json")
        with patience(machines):
            outputs = [machine.communicate(typed) for machine in machines]
        return [(machine.returncode, *output) for machine, output in zip(machines, outputs, strict=True)]

    return command


def test_a_batch_is_answered_as_on_one_machine(run: Callable[..., Ends], split_folder: Path, tmp_path: Path) -> None:
    asked = tmp_path / "in.jsonl"
    bodies = [{"messages": [{"role": "user", "content": f"Say {n}"}], "max_tokens": 6 + n} for n in range(4)]
    seen = [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": "What is this?"}]
    bodies += [{"messages": [{"role": "user", "content": seen}], "max_tokens": 9, "image_budget": 70}]
    bodies = [body | {"temperature": 0} for body in bodies] + [{"messages": []}]
    line = {"method": "POST", "url": "/v1/chat/completions"}
    asked.write_text(
        "".join(json.dumps(line | {"custom_id": f"{n}", "body": own}) + "\n" for n, own in enumerate(bodies))
    )
    found = []
    for count in (1, 2):
        target = tmp_path / f"{count}.jsonl"
        for again in (False, True):  # the second time there is nothing to do
            ends = run("batch", count, asked, target, "--model", split_folder)
            assert ends[0][0] == 0, ends
            assert ("0 lines answered" in ends[0][2]) == again and ends[1:] == [(0, "", "")] * (count - 1)
        answers = [json.loads(text)["response"]["body"] for text in sorted(target.read_text().splitlines())]
        found.append([body.get("choices", body.get("error")) for body in answers])
    assert found[0] == found[1]


def test_what_is_wrong_on_the_first_machine_ends_the_others_without_a_word(
    run: Callable[..., Ends], split_folder: Path, tmp_path: Path
) -> None:
    first, second = run("batch", 2, tmp_path / "none.jsonl", tmp_path / "out.jsonl", "--model", split_folder)
    assert first[0] == 2 and "none.jsonl' cannot be read" in first[2]
    assert second == (1, "", "")


def test_a_conversation_is_the_same_as_on_one_machine(
    run: Callable[..., Ends], split_folder: Path, tmp_path: Path
) -> None:
    options = ["--model", split_folder, "--max-tokens", 8, "--temp", 0]
    alone, first, second = (
        end
        for count in (1, 2)
        for end in run(
            "chat", count, *options, "--session", tmp_path / f"{count}" / "talk", typed="Hello\nAnd then?\n/quit\n"
        )
    )
    assert first[:2] == alone[:2] and len(first[1].splitlines()) > 1
    assert second == (0, "", "")
    again = run("chat", 2, *options, "--session", tmp_path / "2" / "talk", typed="Go on\n")
    assert [status for status, _, _ in again] == [0, 0]
    assert len(json.loads((tmp_path / "2" / "talk" / "messages.json").read_text())) == 6


def test_a_request_and_its_session_are_the_first_machines(
    run: Callable[..., Ends], split_folder: Path, tmp_path: Path
) -> None:
    options = ["--model", split_folder, "--max-tokens", 8, "--temp", 0, "--image", PICTURE, "--image-budget", 70]
    for number, text in enumerate(("What is this?", "And this?")):
        alone, first, second = (
            end
            for count in (1, 2)
            for end in run("generate", count, *options, "--session", tmp_path / f"{count}", "-p", "-", typed=text)
        )
        assert first[:2] == alone[:2] and first[1].strip()
        assert ("of them not read again" in first[2]) == (number == 1)
        assert second == (0, "", "")


def test_figures_are_those_of_one_machine(run: Callable[..., Ends], split_folder: Path, tmp_path: Path) -> None:
    data, other = tmp_path / "data.jsonl", write_checkpoint(tmp_path / "other", SPLIT, seed=1)
    write_drafter(other / "drafter", SPLIT, planted=True, target_weights=tensors(SPLIT, 1))
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning to all of you."}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    alone, first, second = (
        end for count in (1, 2) for end in run("evaluate", count, split_folder, other, "--data", data)
    )
    found, expected = (json.loads(end[1].splitlines()[-1])["results"][0] for end in (first, alone))
    assert found.pop("model") == expected.pop("model") and found["acceptance"] is not None
    assert found == pytest.approx(expected, rel=1e-4)
    assert second == (0, "", "")


# --- a server ----------------------------------------------------------------------------------


@contextmanager
def served(split_folder: Path, hosts: Path, *options: str) -> Iterator[tuple[list[Machine], str]]:
    machines = run_on(["-m", "mlx_gemma4.serve", "--model", str(split_folder), "--port", "0", *options], 2, hosts)
    with patience(machines):
        assert machines[0].stderr is not None
        for line in machines[0].stderr:
            if " serves " in line:
                url = line.split()[0]
            if " is loaded" in line:
                break
        yield machines, url
        for machine in machines:
            machine.kill()
            machine.communicate()


def asked(url: str, **body: object) -> urllib.request.Request:
    own = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0} | body
    return urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(own).encode())


def test_a_server_answers_and_when_it_is_told_to_stop_all_machines_do(split_folder: Path, tmp_path: Path) -> None:
    with served(split_folder, tmp_path / "hosts.json") as (machines, url):
        replies = []
        for _ in range(2):
            with urllib.request.urlopen(asked(url, max_tokens=12), timeout=PATIENCE) as answer:
                replies.append(json.load(answer))
        assert replies[0]["choices"] == replies[1]["choices"]
        assert replies[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        machines[0].send_signal(signal.SIGTERM)
        ends = [machine.communicate() for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], ends


@pytest.mark.parametrize("split", SPLITS)
def test_a_prompt_is_scored_as_one_machine_does(split_folder: Path, tmp_path: Path, split: str) -> None:
    model, _ = load(split_folder)
    ids = [2, *range(20, 180)]
    expected = logprobs_of(model, Prompt(ids))
    with served(split_folder, tmp_path / "hosts.json", "--split", split) as (_, url):
        body = json.dumps({"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body), timeout=PATIENCE) as answer:
            told = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
    assert told[0] is None and told[1:] == pytest.approx(expected, abs=1e-3)


def test_what_is_given_back_is_loaded_again_on_all_machines(split_folder: Path, tmp_path: Path) -> None:
    """And they end together while it is not there."""
    with served(split_folder, tmp_path / "hosts.json", "--unload-after", "0.5") as (machines, url):
        replies = []
        for _ in range(3):
            with urllib.request.urlopen(asked(url, max_tokens=12), timeout=PATIENCE) as answer:
                replies.append(json.load(answer)["choices"])
            assert machines[0].stderr is not None
            assert any("is given back" in line for line in machines[0].stderr)
        assert replies[0] == replies[1] == replies[2]
        machines[0].send_signal(signal.SIGTERM)
        ends = [machine.communicate() for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], ends


def test_a_server_that_loses_a_machine_says_so_in_its_streams(split_folder: Path, tmp_path: Path) -> None:
    with served(split_folder, tmp_path / "hosts.json") as (machines, url):
        with urllib.request.urlopen(asked(url, max_tokens=100_000, stream=True), timeout=PATIENCE) as answer:
            assert answer.readline().startswith(b"data: ")
            machines[1].kill()
            rest = answer.read()
        assert b'"error"' in rest and b"a machine that shares the model is gone" in rest
        _, error = machines[0].communicate()
        assert machines[0].returncode == 1
        assert error.strip().splitlines()[-1].startswith("error: machine 127.0.0.1 is gone")
