"""Folders with a SKILL.md: what each is for stands in the prompt, the rest is read when the model asks for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_gemma4.agent.tools import Part, Tool, ToolError, text_part
from mlx_gemma4.config import expanded, read_given
from mlx_gemma4.errors import one_line, shown

FILE = "SKILL.md"
READ = "read_skill"


@dataclass(frozen=True)
class Skill:
    name: str
    description: str
    folder: Path


def read_skills(folder: Path) -> list[Skill]:
    """The skills in a folder, or in its folders. ValueError if there are none, or one is not whole."""
    folder = expanded(folder)
    files = [folder / FILE, *sorted(folder.glob(f"*/{FILE}"))]
    skills = [read_skill(file) for file in files if file.is_file()]
    if not skills:
        raise ValueError(f"skills is {str(folder)!r}, which has no folders with a {FILE}; expected some")
    names = [skill.name for skill in skills]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"skills is {str(folder)!r}, where two are named {twice!r}; expected each name once")
    return skills


def read_skill(file: Path) -> Skill:
    front, _ = split(file)
    try:
        about = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise ValueError(f"{str(file)!r} begins with what is no YAML: {one_line(error)}") from None
    for key in ("name", "description"):
        value = about.get(key) if isinstance(about, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{str(file)!r} has the {key} {shown(value)}; expected a text between two lines ---")
    return Skill(about["name"].strip(), " ".join(about["description"].split()), file.parent)


def split(file: Path) -> tuple[str, str]:
    """The front matter and the rest."""
    data = read_given(file, repr(str(file)))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {one_line(error)}") from None
    before, *rest = text.split("---\n", 2)
    return (rest[0], rest[1].strip()) if len(rest) == 2 and not before.strip() else ("", text.strip())


def skill_tool(skills: list[Skill]) -> Tool:
    """The tool that reads skills; its description says what there are."""
    by_name = {skill.name: skill for skill in skills}
    listed = "\n".join(f"- {skill.name}: {skill.description}" for skill in skills)

    def run(arguments: dict[str, Any]) -> list[Part]:
        name, file = arguments.get("name"), arguments.get("file", FILE)
        if name not in by_name or not isinstance(file, str):
            raise ToolError(f"no skill is named {shown(name)}; expected {' or '.join(by_name)}")
        folder = by_name[name].folder.resolve()
        path = (folder / file).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise ToolError(f"the skill {name} has no file {shown(file)}; expected one of {', '.join(files(folder))}")
        _, text = split(path)
        others = [other for other in files(folder) if other != FILE] if path == folder / FILE else []
        more = f"\n\nMore files of this skill: {', '.join(others)}" if others else ""
        return [text_part(text + more)]

    parameters = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": list(by_name), "description": "Which skill."},
            "file": {"type": "string", "description": f"Another file of it than {FILE}."},
        },
        "required": ["name"],
    }
    description = f"Read how something is done, before you do it. There are these skills:\n{listed}"
    return Tool(READ, description, parameters, run, is_own=True)


def files(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
