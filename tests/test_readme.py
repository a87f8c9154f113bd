"""The Python of README and docs runs as it is written, on the model in the package; what they link to is there."""

import re
from pathlib import Path

import pytest

from mlx_gemma4.weights.load import DEMO

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{page.name}-{number}": block
    for page in PAGES
    if page.name != "clients.md"  # whose programs are tested with the server
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    )
}
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text("utf-8")):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), (path, anchor)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_its_python_runs(
    block: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo in place of what would be downloaded, its samples in place of the reader's files."""
    monkeypatch.chdir(tmp_path)  # for what it saves
    block = re.sub(r'load\("[^"]*/[^"]*"\)', 'load("demo")', block)
    block = block.replace('"photo.jpg"', repr(str(DEMO / "samples" / "shapes.png")))
    block = block.replace('"question.wav"', repr(str(next((DEMO / "samples").glob("*.wav")))))
    exec(compile(block, "the page", "exec"), {"__name__": "readme"})
    expected = re.findall(r"^print\(.*\)  # (.+)$", block, re.MULTILINE)
    printed = capsys.readouterr().out
    assert printed.strip()
    assert all(line in printed.splitlines() for line in expected)
