"""Reports of one model side by side: machines, or versions on one machine.

python benchmarks/compare_reports.py A/report.json B/report.json
"""

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from checks import CHECKS
from decode import run_script
from report import SECTIONS, VERDICT, Section, read_report, table


def main(reports: Annotated[list[Path], typer.Argument(help="The report.json of each.")]) -> None:
    """One column a report."""
    found = [read_report(file) for file in reports]
    for file, own in zip(reports[1:], found[1:], strict=True):
        if own["files"] != found[0]["files"]:
            raise ValueError(
                f"{file} is of another model, {own['model']}; expected {found[0]['model']}, as {reports[0]} has it"
            )
    print("\n".join(compared(found)))


def compared(found: list[dict[str, Any]]) -> list[str]:
    columns = [f"{own['machine']['chip']}, mlx {own['machine']['mlx']}" for own in found]
    lines = [f"# {found[0]['model']}", ""]
    rights = [
        [title, *(VERDICT[own["right"][name]["right"]] if name in own["right"] else "–" for own in found)]
        for name, (title, _) in CHECKS.items()
    ]
    lines += table(["check", *columns], rights)
    for name, section in SECTIONS.items():
        lines += [
            f"## {section.title}",
            "",
            *table(["", *columns], rows(section, [own["fast"].get(name, []) for own in found])),
        ]
    return lines


def rows(section: Section, found: list[list[dict[str, Any]]]) -> list[list[str]]:
    """A line for each figure of each row that any report has."""
    first, *others = section.columns
    by_name = [{row[first.key]: row for row in own} for own in found]
    return [
        [
            f"{first.heading} {first.shown(name)}: {column.heading}".strip(),
            *(column.shown(own[name][column.key]) if column.key in own.get(name, {}) else "–" for own in by_name),
        ]
        for name in dict.fromkeys(chain.from_iterable(by_name))
        for column in others
    ]


if __name__ == "__main__":
    run_script(main)
