"""The files stand in the order in which data flows through them, and README's tree lists them in it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_gemma4"


def tree_of_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^  (\w+)\.py ", text, re.MULTILINE)


def imports(file: Path) -> set[str]:
    """The package's modules that a file imports, those inside functions too."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    whole = {name.name for node in nodes if node.module == "mlx_gemma4" for name in node.names}
    parts = {node.module.removeprefix("mlx_gemma4.") for node in nodes if (node.module or "").startswith("mlx_gemma4.")}
    return parts | whole


def test_readme_lists_every_file() -> None:
    shims = {"__init__", "generate"}
    assert sorted(tree_of_readme()) == sorted({file.stem for file in PACKAGE.glob("*.py")} - shims)


def test_a_file_imports_only_files_before_it() -> None:
    order = tree_of_readme()
    for place, name in enumerate(order):
        later = imports(PACKAGE / f"{name}.py") - set(order[:place])
        assert not later, f"{name}.py imports {sorted(later)}, which come after it"
