"""An agent's conversation, step by step, through each protocol: each step reads what is new in it."""

from collections.abc import Iterator
from typing import Any

import pytest

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")

from loops import (  # noqa: E402
    BROKEN_OFF,
    CITIES,
    PROTOCOLS,
    QUESTION,
    READ_AGAIN,
    SHARE,
    Errand,
    Protocol,
    broken_off,
    chat_step,
    company,
    conversation,
    rules,
    stretched_demo,
    title,
    tools,
)
from serving import Running, served  # noqa: E402

from mlx_gemma4.serve.resident import Settings  # noqa: E402

ERRAND = Errand(rules(60), tools(2))
STEPS = 4
TITLES = 10  # between two steps
MODES = [pytest.param(own, thinks, id=f"{own.__name__}-{thinks}") for own in PROTOCOLS for thinks in (False, True)]


@pytest.fixture(autouse=True)
def compiled_rounds() -> None:
    """As people have it: here it is plain rounds that save the seconds in which kernels are built."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(stretched_demo(tmp_path_factory.mktemp("stretched") / "model"))


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Running]:
    with served(Settings(model=model)) as running:
        yield running


def port_of(running: Running) -> int:
    return int(running.url.rpartition(":")[2])


@pytest.mark.parametrize(("protocol", "thinks"), MODES)
def test_each_step_after_the_first_reads_at_most_a_twentieth(server: Running, protocol: Protocol, thinks: bool) -> None:
    shares = []
    for step in conversation(port_of(server), protocol, ERRAND, thinks, STEPS):
        assert step.calls and step.calls[0]["city"] in CITIES
        shares.append(round(step.cached / step.prompt, 3))
    assert min(shares[1:]) >= SHARE, shares


def test_others_change_nothing_of_what_is_said(server: Running) -> None:
    def said() -> list[Any]:
        return [step.content for step in conversation(port_of(server), chat_step, ERRAND, True, STEPS)]

    alone = said()
    with company(port_of(server), ERRAND) as others:
        assert said() == alone
    assert not others.failed and others.titles and others.long


def test_titles_do_not_put_a_conversation_out_of_a_store_that_they_fill(model: str) -> None:
    def shares(running: Running, titles: int) -> list[float]:
        port, found = port_of(running), []
        for step in conversation(port, chat_step, ERRAND, False, STEPS):
            found.append(round(step.cached / step.prompt, 3))
            for _ in range(titles):
                title(port, next(numbers))
        return found[1:]

    numbers = iter(range(1000))
    with served(Settings(model=model)) as running:
        shares(running, 0)
        needed = running.resident.store.nbytes
        for _ in range(TITLES):
            title(port_of(running), next(numbers))
        others = running.resident.store.nbytes - needed
    with served(Settings(model=model, store_bytes=needed + others // 2)) as running:
        assert min(shares(running, TITLES)) >= SHARE
        assert len(running.resident.store.lines) < TITLES * (STEPS - 1)  # titles have been given up


def test_what_was_read_before_a_client_left_is_not_read_again(server: Running) -> None:
    errand = Errand(f"Once more. {rules(120)}", tools(2))
    broken_off(port_of(server), errand, BROKEN_OFF)
    again = chat_step(port_of(server), errand, [{"role": "user", "content": QUESTION}], False, 0)
    assert again.cached / again.prompt > 0.5 and 1 - again.cached / again.prompt <= READ_AGAIN
