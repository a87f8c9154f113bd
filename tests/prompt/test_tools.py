import copy
import logging
import re
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma4.prompt.messages import check_tools
from mlx_gemma4.prompt.template import compile_template, render
from mlx_gemma4.prompt.tools import MAX_PARTS, argument_schemas, template_tools

TEMPLATE = compile_template(
    resources.files("mlx_gemma4").joinpath("prompt/chat_template.jinja").read_text(encoding="utf-8")
)
USER = {"role": "user", "content": "x"}
POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}
WRITTEN_POINT = 'properties:{x:{type:<|"|>NUMBER<|"|>}},required:[<|"|>x<|"|>],type:<|"|>OBJECT<|"|>'


def declared(parameters: Any, **more: Any) -> str:
    """What the template writes of a tool with these parameters."""
    tools = template_tools(check_tools([{"name": "f", "description": "d", "parameters": parameters} | more]))
    return declaration(tools)


def declaration(tools: list[dict[str, Any]]) -> str:
    text = render(TEMPLATE, [USER], tools, False, "")
    return text[text.index("<|tool>declaration:f{") + len("<|tool>declaration:f{") : text.index("}<tool|>")]


def written(schema: Any) -> str:
    """What it writes of an argument `a` with this schema."""
    whole = declared({"type": "object", "properties": {"a": schema}, "$defs": {"Point": POINT, "Node": NODE}})
    start = 'description:<|"|>d<|"|>,parameters:{properties:{a:{'
    end = '}},type:<|"|>OBJECT<|"|>}'
    assert whole.startswith(start) and whole.endswith(end), whole
    return whole[len(start) : -len(end)]


def said(text: str, kind: str) -> str:
    return f'description:<|"|>{text}<|"|>,{kind}'


NOWHERE = "which leads nowhere; expected '#/$defs/…'"
STRING, INTEGER, NULLABLE = 'type:<|"|>STRING<|"|>', 'type:<|"|>INTEGER<|"|>', "nullable:true"


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, f"{NULLABLE},{STRING}"),
        ({"oneOf": [{"type": "null"}, {"const": "x"}]}, f'enum:[<|"|>x<|"|>],{NULLABLE},{STRING}'),
        ({"type": ["string", "null"], "description": "d"}, said("d", f"{NULLABLE},{STRING}")),
        ({"type": ["integer"]}, INTEGER),
        ({"$ref": "#/$defs/Point"}, WRITTEN_POINT),
        ({"$ref": "#/$defs/Point", "description": "where"}, said("where", WRITTEN_POINT)),
        ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, f"{NULLABLE},{WRITTEN_POINT}"),
        ({"allOf": [{"$ref": "#/$defs/Point"}], "description": "where"}, said("where", WRITTEN_POINT)),
        ({"const": 3}, said("Always 3.", INTEGER)),
        ({"enum": [1, 2]}, said("One of: 1; 2.", INTEGER)),
        ({"type": "number", "enum": [1, 2.5], "description": "d."},
         said("d. One of: 1; 2.5.", 'type:<|"|>NUMBER<|"|>')),
        ({"enum": ["a", None]}, f'enum:[<|"|>a<|"|>],{NULLABLE},{STRING}'),
        ({"minLength": 1}, STRING),
        ({}, said("Any JSON value.", 'type:<|"|>ANY<|"|>')),
        ({"type": "object", "additionalProperties": {"type": "string"}},
         said("Keys of any name, each value: string.", 'properties:{},type:<|"|>OBJECT<|"|>')),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, """type:<|"|>['STRING', 'NUMBER']<|"|>"""),
        ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "array", "items": {"$ref": "#/$defs/Point"}}]},
         said("One of: object with x: number; array of object with x: number.",
              """type:<|"|>['OBJECT', 'ARRAY']<|"|>""")),
        ({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}], "minimum": 0}},
         'items:{minimum:0,nullable:true,type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>'),
        ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]},
         said("Entries in this order: string; integer.", 'type:<|"|>ARRAY<|"|>')),
        ({"$ref": "#/$defs/Node"},
         'properties:{next:{description:<|"|>Again as Node around it.<|"|>,nullable:true,properties:{},'
         'type:<|"|>OBJECT<|"|>}},type:<|"|>OBJECT<|"|>'),
        ({"allOf": [{"description": "Left.", "$ref": "#/$defs/Node"}, {"description": "A node."}],
          "properties": {"next": {"$ref": "#/$defs/Node", "description": "The next."}}},
         said("Left. A node.", 'properties:{next:{description:<|"|>The next. Again as Node around it.<|"|>,'
              'properties:{},type:<|"|>OBJECT<|"|>}},type:<|"|>OBJECT<|"|>')),
        ({"properties": {"x": {"type": "integer"}}, "oneOf": [{"required": ["x"]}, {"required": ["y", "z"]}]},
         said("One of: object with x; object with y, z.", f'properties:{{x:{{{INTEGER}}}}},type:<|"|>OBJECT<|"|>')),
    ],
)  # fmt: skip
def test_a_schema_reaches_the_model_with_its_meaning(schema: Any, text: str) -> None:
    assert written(schema) == text


def test_parameters_without_a_type_close_their_brace() -> None:
    expected = f'description:<|"|>d<|"|>,parameters:{{properties:{{a:{{{STRING}}}}},type:<|"|>OBJECT<|"|>}}'
    assert declared({"properties": {"a": {"type": "string"}}}) == expected
    assert declared({"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"type": "string"}}}}}) == expected


def test_a_union_of_arguments_has_the_arguments_of_all() -> None:
    either = [{"type": "object", "properties": {name: {"type": "string"}}, "required": [name]} for name in "ab"]
    text = declared({"anyOf": either})
    assert f"properties:{{a:{{{STRING}}},b:{{{STRING}}}}}" in text and "required" not in text
    assert "d\nOne of: object with a: string; object with b: string." in text


def test_a_response_closes_its_brace() -> None:
    assert declared({}, response={"type": "string", "description": "r"}) == (
        'description:<|"|>d<|"|>,response:{description:<|"|>string (r)<|"|>,type:<|"|>OBJECT<|"|>}'
    )


def test_what_the_template_can_write_stays_as_it_is() -> None:
    parameters = {
        "type": "object",
        "properties": {
            "a": {"type": "STRING", "description": "A", "enum": ["x", "y"]},
            "b": {"type": "object", "properties": {"c": {"type": "boolean"}}, "required": ["c"]},
            "l": {"type": "array", "items": {"type": "object", "properties": {"c": {"type": "integer"}}}},
            "o": {"type": "object"},
        },
        "required": ["a", "b"],
    }
    tools = check_tools([{"name": "f", "description": "d", "parameters": parameters}])
    assert declaration(template_tools(tools)) == declaration(tools)


def test_nothing_vanishes_without_a_logged_line(caplog: pytest.LogCaptureFixture) -> None:
    declared({"properties": {"a": {"type": "integer", "minimum": 1, "default": 2, "title": "A"}}, "description": "p"})
    assert caplog.messages == [
        "the chat template cannot write all of f, left out: minimum of parameters.a, default of parameters.a, "
        "the description of its parameters"
    ]
    caplog.clear()
    declared({"properties": {"a": {"type": "integer", "minimum": 1, "default": 2, "title": "A"}}, "description": "p"})
    assert caplog.messages == []  # it has been said
    declared({"broken\nkey": None})
    assert caplog.messages == ["the chat template cannot write all of f, left out: broken key of parameters"]
    caplog.clear()
    template_tools(check_tools([{"name": "g\x85h", "parameters": {"description": "p"}}]))
    assert caplog.messages == ["the chat template cannot write all of g h, left out: the description of its parameters"]
    caplog.clear()
    declared({"type": "object", "title": "T", "properties": {"a": {"type": "string"}}, "additionalProperties": False})
    assert caplog.messages == []


def test_the_schema_stays_as_given() -> None:
    tools = check_tools(
        [{"name": "f", "parameters": {"properties": {"a": {"$ref": "#/$defs/P"}}, "$defs": {"P": POINT}}}]
    )
    before = copy.deepcopy(tools)
    assert argument_schemas(tools)["f"]["properties"]["a"]["properties"] == {"x": {"type": "number"}}
    template_tools(tools)
    assert tools == before


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"$ref": "#/$defs/No"}, f"tools[0].parameters has the $ref '#/$defs/No', {NOWHERE}"),
        ({"$ref": "http://a/b.json"}, f"tools[0].parameters has the $ref 'http://a/b.json', {NOWHERE}"),
        ([1], "tools[0].parameters is of type list; expected a JSON schema, a dict"),
        ({"properties": ["a"]}, "tools[0].parameters has properties of type list; expected a dict"),
    ],
)  # fmt: skip
def test_what_is_no_schema_is_refused(parameters: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        declared(parameters)
    assert str(caught.value) == message


def test_references_that_multiply_are_refused() -> None:
    doubled = {f"d{n}": {"properties": {side: {"$ref": f"#/$defs/d{n + 1}"} for side in "lr"}} for n in range(40)}
    with pytest.raises(ValueError, match=f"too large or too deep .* at most {MAX_PARTS} parts"):
        declared({"$ref": "#/$defs/d0", "$defs": doubled | {"d40": {"type": "string"}}})
    chain = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(2000)}
    with pytest.raises(ValueError, match="too large or too deep"):
        declared({"$ref": "#/$defs/d0", "$defs": chain | {"d2000": {"type": "string"}}})


KEYWORDS = st.sampled_from(
    ["type", "properties", "anyOf", "oneOf", "allOf", "$ref", "$defs", "items", "enum", "const", "required", "nullable",
     "description", "additionalProperties", "prefixItems", "format", "a"]
)  # fmt: skip
VALUES = st.sampled_from(
    ["string", "object", "array", "null", "#/$defs/a", "#", "#/properties/a", True, False, None, 1, ["string", "null"]]
)
SCHEMAS = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=4))


@settings(deadline=None)
@given(st.dictionaries(KEYWORDS, SCHEMAS, max_size=5))
def test_any_schema_is_written_with_its_braces_closed_or_refused_in_one_line(schema: dict[str, Any]) -> None:
    logging.getLogger("mlx_gemma4").disabled = True
    try:
        text = declared(schema)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        outside = re.sub(r'<\|"\|>.*?<\|"\|>', "", text, flags=re.DOTALL)
        assert outside.count("{") == outside.count("}")
    finally:
        logging.getLogger("mlx_gemma4").disabled = False
