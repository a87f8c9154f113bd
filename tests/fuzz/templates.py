"""A chat template, damaged or somebody's own: it renders, or one line says where it fails.

A template is code, and nothing bounds what code computes: none here takes memory or time on purpose.
"""

from typing import Any

from hypothesis import strategies as st

from .folders import model_folder
from .judge import check_refusal
from .mutate import damaged
from .surface import DEMO, CheckpointError, demo_processor, load_processor

SHARE = 15
SNIPPETS = (
    "{% generation %}", "{% endgeneration %}", "{{ messages }}", "{{ messages[0]['content'] }}",
    "{% for m in messages %}", "{% endfor %}", "{% if tools %}",
    "{% endif %}", "{{ 1 / 0 }}", "{{ undefined.attribute }}", "{{ raise_exception('a\nb') }}",
    "{{ strftime_now('%Y') }}", "{{ strftime_now(1) }}",
    "{% break %}", "{% macro f(a) %}{{ f(a) }}{% endmacro %}{{ f(1) }}",
    "{{ range(10**9) | list }}", "{{ messages | tojson }}",
    "{{ tools | tojson(indent=2) }}", "{{ ''.__class__.__mro__ }}", "{% set x = namespace(a=1) %}", "{{ x.a }}",
    "{% include 'a' %}", "{% extends 'b' %}",
    "{% import 'c' as d %}", "{{ bos_token }}", "{{ add_generation_prompt }}", "{{ messages[10**6] }}",
    "{% raw %}", "{{ '\\ud800' }}", "\x00",
    "{{ messages.append(1) }}", "{{ (1, 2) < 'a' }}", "<|turn>model\n", "<|image|>", "{#", "{{", "%}",
    "{{ cycler() }}", "{{ lipsum(n=100000) }}", "{% filter upper %}",
    "{{ '%s' | format }}", "{{ messages | map('x') | list }}",
    "{{ messages | sort }}",
    "{{ ('a' * 99999) | wordwrap(1) }}", "{{ 1 | int(base=99) }}",
)  # fmt: skip
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|turn>"}]
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}]

prepare = demo_processor


def strategy() -> st.SearchStrategy[Any]:
    original = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    lines = original.splitlines(keepends=True)

    def spliced(edits: list[tuple[str, int, str]]) -> bytes:
        new = lines.copy()
        for name, number, snippet in edits:
            at = number % len(new) if new else 0
            if name == "drop":
                del new[at : at + 1]
            elif name == "again":
                new[at:at] = new[at : at + 3]
            else:
                new.insert(at, snippet)
        return "".join(new).encode("utf-8", "surrogatepass")

    edit = st.tuples(
        st.sampled_from(["drop", "again", "insert", "insert"]), st.integers(0, 500), st.sampled_from(SNIPPETS)
    )
    own = st.lists(st.sampled_from(SNIPPETS), max_size=4).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
    )
    data = st.one_of(
        st.lists(edit, max_size=3).map(spliced),
        st.lists(edit, max_size=3).map(spliced),
        own,
        damaged([original.encode()], 3),
    )
    return data.map(lambda data: {"data": data})


def check(value: Any) -> str | None:
    with model_folder({"chat_template.jinja": value["data"]}) as folder:
        try:
            processor = load_processor(folder, demo_processor().config)
        except Exception as error:  # any: it is judged
            check_refusal(error, (CheckpointError,))
            return "refused"
    refused = None
    for tools in (None, TOOLS):
        try:
            processor(MESSAGES, tools=tools)
        except Exception as error:  # any: it is judged
            check_refusal(error, (ValueError,))
            refused = "refused"
    return refused
