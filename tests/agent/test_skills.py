"""Skills: their names stand in the prompt, their texts are read through a tool, and nothing beside their folders."""

from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="comes with the extra agent")

from mlx_gemma4.agent.skills import read_skills, skill_tool
from mlx_gemma4.agent.tools import ToolError

FRONT = "---\nname: {}\ndescription: >\n  How {}\n  is done.\nlicense: MIT\n---\n\n# Do it\n\n---\nslowly\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("baking", "sewing"):
        (tmp_path / "skills" / name / "more").mkdir(parents=True)
        (tmp_path / "skills" / name / "SKILL.md").write_text(FRONT.format(name, name))
    (tmp_path / "skills" / "baking" / "more" / "bread.md").write_text("flour, water")
    (tmp_path / "skills" / "baking" / "oven.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "skills" / "notes.txt").write_text("no skill")
    (tmp_path / "secret.md").write_text("secret")
    (tmp_path / "skills" / "baking" / "link.md").symlink_to(tmp_path / "secret.md")
    return tmp_path / "skills"


def test_names_and_descriptions_are_what_the_prompt_has(folder: Path) -> None:
    tool = skill_tool(read_skills(folder))
    assert "- baking: How baking is done.\n- sewing: How sewing is done." in tool.description
    assert tool.parameters["properties"]["name"]["enum"] == ["baking", "sewing"]
    assert [skill.name for skill in read_skills(folder / "sewing")] == ["sewing"]


def test_the_rest_is_read_when_asked_for(folder: Path) -> None:
    tool = skill_tool(read_skills(folder))
    (part,) = tool.run({"name": "baking"})
    assert part["text"].startswith("# Do it\n\n---\nslowly\n\nMore files of this skill: ")
    assert "more/bread.md" in part["text"] and "license" not in part["text"]
    assert tool.run({"name": "baking", "file": "more/bread.md"}) == [{"type": "text", "text": "flour, water"}]


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "flying"},
        {},
        {"name": "baking", "file": "../../secret.md"},
        {"name": "baking", "file": "/etc/hosts"},
        {"name": "baking", "file": "link.md"},
        {"name": "baking", "file": "more"},
        {"name": "baking", "file": "a\0b"},
        {"name": "baking", "file": "x" * 5000},
        {"name": "baking", "file": ["SKILL.md"]},
        {"name": "baking", "file": "oven.png"},
    ],
)
def test_nothing_else_is_read(folder: Path, arguments: dict[str, object]) -> None:
    with pytest.raises((ToolError, ValueError, OSError)):
        skill_tool(read_skills(folder)).run(arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no front matter", "name None"),
        ("---\nname: x\n---\n", "description None"),
        ("---\nname: 3\ndescription: y\n---\n", "name 3"),
        ("---\nname: [\n---\n", "no YAML"),
        ("---\n- name\n---\n", "name None"),
        ("---\nname: sewing\ndescription: again\n---\n", "two are named 'sewing'"),
    ],
)
def test_a_skill_that_is_not_whole_is_named(folder: Path, text: str, said: str) -> None:
    (folder / "baking" / "SKILL.md").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_skills(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_folder_without_skills_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"no folders with a SKILL\.md"):
            read_skills(path)
