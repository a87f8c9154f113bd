"""README's Python runs as it is written, on the model in the package."""

import re
from pathlib import Path

import pytest

from mlx_gemma4.weights.load import DEMO

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_its_python_runs(
    block: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo in place of what would be downloaded, its samples in place of the reader's files."""
    monkeypatch.chdir(tmp_path)  # for what it saves
    block = re.sub(r'load\("[^"]*/[^"]*"\)', 'load("demo")', block)
    block = block.replace('"photo.jpg"', repr(str(DEMO / "samples" / "shapes.png")))
    block = block.replace('"question.wav"', repr(str(next((DEMO / "samples").glob("*.wav")))))
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    expected = re.findall(r"^print\(.*\)  # (.+)$", block, re.MULTILINE)
    printed = capsys.readouterr().out
    assert printed.strip()
    assert all(line in printed.splitlines() for line in expected)
