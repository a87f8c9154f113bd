"""Public functions with odd arguments: a result of the right kind, or one line that says which argument is wrong."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from .judge import check as must
from .judge import check_refusal
from .mutate import weighted
from .surface import SAMPLES, context, demo

SHARE = 25

prepare = demo

VALUES = (
    "None", "True", "False", "0", "-1", "1", "2", "3", "7", "8", "70", "280", "70.0", "1.5", "-0.5", "0.0", "1e-320",
    "1e308", "float('nan')",
    "float('inf')", "2**31", "2**31 - 1", "2**63", "2**64", "2**64 - 1", "10**400", "10**5000", "-10**400", "'a'",
    "''", "'False'", "'auto'",
    "'none'", "'1'", "b'a'", "b''", "[]", "[1]", "(1,)", "()", "{}", "{1: 2}", "set()", "np.int64(3)",
    "np.float32(1)", "np.bool_(True)",
    "np.zeros(3)", "np.array(2)", "np.array([70])", "np.zeros((2, 2, 2))", "mx.array(1)", "mx.zeros((2,))",
    "object()", "...", "print", "int",
    "Path('x')", "Path('/')", "Path('')", "1 + 2j", "'\\ud800'", "'a\\x00b'", "'x' * 10000", "'a\\nb'", "range(3)",
    "iter([1])", "memoryview(b'a')",
    "bytearray(b'a')", "type('I', (int,), {})(3)", "type('S', (str,), {})('a')", "Fraction(1, 2)", "Decimal(1)",
    "[None]", "['a']", "[[]]", "[{}]",
    "{'role': 'user', 'content': 'a'}", "[{'role': 'user', 'content': 'a'}]", "[{'name': 'f'}]",
    "Image.new('RGB', (4, 4))", "SAMPLES / 'shapes.png'",
    "Sampling()", "Prompt([2, 3])", "model", "processor", "[2] * 9000", "[10**6]", "[-1]", "[2**63]", "[2.0]",
    "np.array([2, 3])", "[True]",
    "frozenset([2])", "'/dev/null'", "'~nobody/x'", "'http://127.0.0.1:9/x'", "'data:,'", "'file://host/x'", "'x://y'",
)  # fmt: skip
values = st.sampled_from(VALUES)
REQUESTS = ("'Hi'", "[{'role': 'user', 'content': 'Hi'}]", "Prompt([2, 3, 4])")
ARRAYS = (
    "np.zeros(({n}, 6912), np.uint8)", "np.zeros(({n}, 6911), np.uint8)", "np.zeros(({n}, 6912))",
    "np.zeros(({n}, 640), np.float32)", "np.zeros(({n}, 640))",
    "np.full(({n}, 640), np.nan, np.float32)", "np.zeros(({n}, 48, 144), np.uint8)", "np.zeros(({n},), np.uint8)",
    "np.zeros(({n}, 6912), object)",
)  # fmt: skip
POSITIONS = (
    "None", "np.zeros(({n}, 2), np.int32)", "np.full(({n}, 2), 10**6)", "np.full(({n}, 2), -1)", "np.zeros(({n}, 2))",
    "np.zeros(({n}, 3), np.int32)",
    "np.full(({n}, 2), 1119)", "np.full(({n}, 2), 1120)", "np.zeros(({n} + 1, 2), np.int32)",
    "np.full(({n}, 2), 2**40)", "np.full(({n}, 2), np.nan)",
)  # fmt: skip


@cache
def names() -> dict[str, Any]:
    from decimal import Decimal
    from fractions import Fraction

    image = demo()[1]([{"role": "user", "content": [{"type": "image", "image": str(SAMPLES / "shapes.png")}]}])
    return context(Fraction=Fraction, Decimal=Decimal, SoftTokens=type(image.media[0]), image=image)


def call(
    function: str, first: st.SearchStrategy[str], options: dict[str, str], most: int = 2
) -> st.SearchStrategy[str]:
    """A call with some of its options odd; `options` has the value of those that are not left out."""
    some = st.dictionaries(st.sampled_from(sorted(options)), values, max_size=most)
    return st.builds(
        lambda start,
        odd: f"{function}({', '.join([start, *(f'{k}={v}' for k, v in (fixed(options) | odd).items())])})",
        first, some,
    )  # fmt: skip


def fixed(options: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in options.items() if value}


def strategy() -> st.SearchStrategy[str]:
    filters = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    sampling = call("Sampling", st.just("None"), dict.fromkeys(filters[1:], ""), 3)
    generating = {
        "images": "", "audios": "", "videos": "", "system": "", "tools": "", "thinking": "", "image_budget": "",
        "max_tokens": "1",
        "sampling": "Sampling(temperature=0)", "draft_length": "",
    }  # fmt: skip
    requests = weighted((3, st.sampled_from(REQUESTS)), (1, values))
    calling = st.builds("model, processor, {}".format, requests)
    media = st.builds(
        lambda count, kind, at, array, positions: (
            f"Prompt([2] + [{{'image': 1851, 'audio': 1852, 'video': 1855}}.get({kind}, 5)] * {count} + [3], "
            f"[SoftTokens({kind}, {at}, {array.format(n=count)}, {positions.format(n=count)})])"
        ),
        st.integers(0, 4), st.sampled_from(["'image'", "'audio'", "'video'", "'x'", "None"]),
        st.sampled_from(["1", "0", "-1", "2", "10**6", "1.0"]),
        st.sampled_from(ARRAYS), st.sampled_from(POSITIONS),
    )  # fmt: skip
    prompts = st.one_of(
        st.just("Prompt([2, 3, 4])"), st.just("image"), media, st.builds("Prompt({})".format, values),
        st.builds("Prompt([2, 3], media={})".format, values), st.builds("Prompt([2, {}])".format, values),
        st.just("Prompt([2] * 9000)"), values,
    )  # fmt: skip
    part = st.builds(
        "processor([{{'role': 'user', 'content': [{{'type': '{0}', '{0}': {1}, 'fps': {2}}}]}}])".format,
        st.sampled_from(["image", "audio", "video"]),
        st.one_of(
            values,
            st.builds("({}, {})".format, values, values),
            st.builds(
                "(np.{}, {})".format,
                st.sampled_from(["zeros(1600)", "zeros((2, 1600))", "zeros((1600, 2), np.int16)",
                "full(1600, np.nan)", "full(1600, 1e308)", "zeros(0)",
                                 "zeros((0, 2))", "zeros(9, complex)", "zeros(9, bool)", "zeros(9, object)",
                                 "full(9, 3e38, np.float32)", "ones((3, 16, 9))"]),
                st.one_of(st.sampled_from(["16000", "8000", "16000.5"]), values),
            ),
            st.builds("[{}]".format, values),
            st.builds("[Image.new('{}', {})] * {}".format,
            st.sampled_from(["RGB", "1", "F", "I;16", "LAB", "HSV", "PA", "La"]),
                      st.sampled_from(["(4, 4)", "(0, 4)", "(1, 3000)", "(5000, 1)"]),
                      st.sampled_from(["1", "2", "40"])),
            st.builds("Image.new('{}', {})".format,
            st.sampled_from(["RGB", "1", "F", "I;16", "LAB", "HSV", "PA", "RGBa", "YCbCr", "I"]),
                      st.sampled_from(["(4, 4)", "(0, 4)", "(1, 3000)", "(5000, 1)"])),
        ),
        values,
    )  # fmt: skip
    return st.one_of(
        sampling,
        st.builds("generate(model, processor, 'Hi', max_tokens=1, sampling={})".format, sampling),
        call("generate", calling, generating),
        st.builds("list({})".format, call("stream_generate", calling, generating)),
        call("processor", st.one_of(st.just(REQUESTS[1]), values),
        dict.fromkeys(("tools", "thinking", "image_budget"), "")),
        prompts,
        st.builds("model.logits({})".format, prompts),
        st.builds("model.draft({}, {})".format, prompts, st.one_of(st.integers(-1, 9).map(str), values)),
        st.builds("generate(model, processor, {}, max_tokens=1)".format, prompts),
        st.builds("load({})".format, values),
        st.builds("load(DEMO, drafter={})".format, values),
        part,
    )  # fmt: skip


def check(expression: str) -> str | None:
    try:
        result = eval(expression, names().copy())
    except Exception as error:  # any: it is judged
        check_refusal(error, (ValueError, TypeError, ConnectionError))
        return "refused"
    if isinstance(result, Iterator):
        result = list(result)
    if isinstance(result, mx.array):
        must(bool(np.isfinite(np.array(result)).all()), "numbers that are not finite")
    if expression.startswith("model.draft"):
        must(
            isinstance(result, list) and all(isinstance(token, int) for token in result),
            "a draft of another form",
            result,
        )
    if expression.startswith("load"):
        must(isinstance(result, tuple) and len(result) == 2, "load gave another thing")
    return None
