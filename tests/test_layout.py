"""Rooms and files stand in the order in which data flows through them, and README's tree lists them in it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_gemma4"
SHIMS = {"generate", "fit", "batch", "fuse", "chat"}  # for python -m


def tree_of_readme() -> list[str]:
    """The package's modules as dotted names, in the order of README's tree."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("\nmlx_gemma4/ ") :].split("\n```")[0].split("\nconvert.py")[0]
    room, found = "", []
    for line in tree.splitlines():
        if folder := re.match(r"  (\w+)/ ", line):
            room = folder[1]
        elif file := re.match(r"( {2}| {4})(\w+)\.py ", line):
            found.append(file[2] if len(file[1]) == 2 else f"{room}.{file[2]}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith(("__init__", "__main__")) and name not in SHIMS:
            yield name, file


def imports(file: Path) -> set[str]:
    """The package's modules that a file imports, those inside functions too."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    own = {name for name, _ in modules()}
    found = set()
    for node in nodes:
        if node.module is not None and node.module.startswith("mlx_gemma4"):
            base = node.module.removeprefix("mlx_gemma4").removeprefix(".")
            names = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {base} if base in own else names & own
    return found


def test_readme_lists_every_file() -> None:
    assert sorted(tree_of_readme()) == sorted(name for name, _ in modules())


def test_a_file_imports_only_files_before_it() -> None:
    order = tree_of_readme()
    files = dict(modules())
    for place, name in enumerate(order):
        later = imports(files[name]) - set(order[:place])
        assert not later, f"{name} imports {sorted(later)}, which come after it"


def test_the_files_of_a_room_stand_together() -> None:
    rooms = [name.rpartition(".")[0] for name in tree_of_readme() if "." in name]
    assert len(set(rooms)) == sum(room != before for before, room in zip(["", *rooms], rooms, strict=False))


def test_importing_the_package_loads_no_optional_room() -> None:
    import subprocess
    import sys

    code = "import sys, mlx_gemma4; print([name for name in sys.modules if name.startswith('mlx_gemma4.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for room in ("convert", "evaluate", "tune", "agent", "serve", "commands", "terminal"):
        assert f"mlx_gemma4.{room}" not in loaded
