"""Replies of a random model with Gemma's own vocabulary, held to many schemas: what is finished fits.

    python -m tests.schemas google/gemma-4-12B-it JSON-Schema-Test-Suite

The first is a folder with the published tokenizer, template and configs, weights or not; the second a checkout of
https://github.com/json-schema-org/JSON-Schema-Test-Suite, of which every schema of drafts 2020-12 to 4 is asked for
that is not refused. Beside them stand the schemas of thirty tools, as forms of the answer and as calls. Eight rows are
drawn at once, at temperature 1, half of them with drafts. What closes a value is made likely, or no string would end,
and so is what the schema's own examples say, right or wrong. Then it is told what a mask costs. The exit status is 1
if a finished reply does not fit, or if a reply fails.
"""

import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import numpy as np
import typer

from mlx_gemma4 import Engine, Prompt, Sampling, collect, load
from mlx_gemma4.forms.response import response_grammar
from mlx_gemma4.prompt.messages import check_tools
from mlx_gemma4.reply.reply import Reply

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_planted
from mcp_tools import TOOLS, openapi
from toy_checkpoint import Shape
from walks import STOPS, Walker

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
MARKS = ('"', '"}', "}", "]", '"]', ",", ":", '":', "{", "[", '{"', '["', '<|"|>', "<tool_call|>")
LIKELY = 12.0  # added to the logits of a few tokens: half as likely as all the others together
VALIDATORS = {  # of the suite's folders, the newest first: what stands in several is asked for once
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft6": jsonschema.Draft6Validator,
    "draft4": jsonschema.Draft4Validator,
}
ROWS = 8
ROUND = 30_000  # µs of a round of the 12B, of which masks are to cost 5 %


@dataclass(frozen=True)
class Case:
    name: str
    schema: Any
    examples: str  # of what could be said
    tools: tuple[Any, ...] = ()  # asked for as a call in place of an answer
    draft: str = "draft2020-12"

    @property
    def asked(self) -> dict[str, Any]:
        """Keywords of `Engine.submit`."""
        wrapped = {"type": "json_schema", "json_schema": {"name": "case", "schema": self.schema}}
        return {"tool_choice": "required"} if self.tools else {"response_format": wrapped}

    @property
    def prompt(self) -> Prompt:
        return Prompt([2, 105, 2364, 107, 9259, 106, 107, 105, 4368, 107], tools=self.tools)

    def fault(self, reply: Reply) -> str:
        """What is wrong with a finished reply."""
        try:
            if not self.tools:
                values = [json.loads(reply.text)]
            elif reply.tool_calls:
                values = [call["arguments"] for call in reply.tool_calls]
            else:
                return "no call"
            for value in values:
                VALIDATORS[self.draft](self.schema).validate(value)
        except (ValueError, jsonschema.ValidationError) as error:
            return str(error).splitlines()[0]
        return ""


def main(
    gemma: Annotated[Path, typer.Argument(help="A folder with the published files.")],
    suite: Annotated[Path, typer.Argument(help="A checkout of JSON Schema's test suite.")],
    tries: Annotated[int, typer.Option(min=1, help="Replies to each schema.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 60,
) -> None:
    """Draw them all."""
    refused: Counter[str] = Counter()
    cases = [case for case in [*suite_cases(suite), *tool_cases()] if case.tools or is_taken(case, refused)]
    print(f"{len(cases)} schemas; {refused.total()} refused: {refused.most_common(12)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(str(checkpoint(Path(folder) / "model", gemma)))
    walker = Walker(processor)
    marks = [*STOPS, *(own for text in MARKS for own in walker.ids(text))]
    drawn: list[tuple[int, Reply]] = []
    wrong: list[str] = []
    with Engine(model, processor, ROWS) as engine, ThreadPoolExecutor(ROWS) as pool:

        def draw(number: int, again: int) -> None:
            case = cases[number]
            stream = engine.submit(
                case.prompt, max_tokens=max_tokens, draft_length=2 * ((number + again) % 2), **case.asked,
                sampling=Sampling(temperature=1, top_k=0, top_p=1, seed=number * tries + again),
                logit_bias=dict.fromkeys([*marks, *walker.ids(case.examples)], LIKELY),
            )  # fmt: skip
            try:
                reply = collect(stream)
            except (ValueError, RuntimeError) as error:
                wrong.append(f"{case.name} failed: {error}")
                print(wrong[-1], flush=True)
                return
            drawn.append((number, reply))
            fault = case.fault(reply) if reply.finish_reason == "stop" else ""
            if fault:
                said = reply.tool_calls if case.tools else reply.text
                wrong.append(f"{case.name} {json.dumps(case.schema)[:300]}: {str(said)[:300]!r}: {fault}")
                print(wrong[-1], flush=True)
            if not len(drawn) % 50:
                print(f"{len(drawn)} of {tries * len(cases)} replies, {len(wrong)} wrong", flush=True)

        for asked in [pool.submit(draw, number, again) for again in range(tries) for number in range(len(cases))]:
            asked.result()
    counts = Counter(reply.finish_reason for _, reply in drawn)
    accepted = sum(reply.stats.accepted_tokens for _, reply in drawn)
    fits = {number for number, reply in drawn if reply.finish_reason == "stop"}
    print(
        f"{dict(counts)}, {accepted} drafts accepted; {len(fits)} of {len(cases)} schemas have a finished reply; "
        f"{len(wrong)} replies are wrong"
    )
    costs = [own for number, reply in drawn for own in mask_costs(walker, cases[number], reply)]
    never = [cases[number].name for number in range(len(cases)) if number not in fits]
    print(f"never finished: {never[:40]}")
    for begins, name in ((True, "that begin a grammar"), (False, "of a round")):
        own = np.array([cost for is_first, cost in costs if is_first is begins])
        middle, most, longest = np.percentile(own, (50, 99, 100))
        print(
            f"{len(own)} masks {name}: {middle:.0f} µs at the median, {most:.0f} for 99 %, {longest:.0f} at most; "
            f"{100 * np.mean(own > 0.05 * ROUND):.2f} % over 5 % of a round of {ROUND / 1000:.0f} ms"
        )
    sys.exit(int(bool(wrong)))


def suite_cases(suite: Path) -> Iterator[Case]:
    """The schema of every group."""
    seen = set[str]()
    for draft, validator in VALIDATORS.items():
        root = suite / "tests" / draft
        for file in sorted(root.rglob("*.json")):
            for number, group in enumerate(json.loads(file.read_text(encoding="utf-8"))):
                schema, name = group["schema"], f"{draft}/{file.relative_to(root)} {number}"
                known = {key: schema[key] for key in schema if key != "$schema"} if isinstance(schema, dict) else schema
                if (text := json.dumps(known, sort_keys=True)) not in seen:
                    seen.add(text)
                    if isinstance(schema, dict):  # without a word it is the newest's
                        schema = {"$schema": validator.META_SCHEMA["$schema"]} | schema
                    examples = json.dumps([test["data"] for test in group["tests"]], ensure_ascii=False)
                    yield Case(name, schema, examples, draft=draft)


def tool_cases() -> Iterator[Case]:
    for own in TOOLS:
        name, schema = own["function"]["name"], own["function"]["parameters"]
        examples = json.dumps([*schema["properties"]], ensure_ascii=False)
        yield Case(f"arguments of {name}", openapi(schema), examples)
        yield Case(f"call of {name}", openapi(schema), examples, tuple(check_tools([own])))


def is_taken(case: Case, refused: Counter[str]) -> bool:
    try:
        response_grammar(case.asked["response_format"])
        VALIDATORS[case.draft].check_schema(case.schema)
        for value in json.loads(case.examples):
            VALIDATORS[case.draft](case.schema).is_valid(value)
    except ValueError as error:
        refused[str(error)[:100]] += 1
        return False
    except (jsonschema.SchemaError, re.error):  # patterns that Python does not read
        refused["jsonschema does not read it"] += 1
        return False
    return True


def checkpoint(folder: Path, gemma: Path) -> Path:
    """A small model and drafter of random weights, with everything that is published but the weights."""
    write_planted(folder, Shape(vocab=262144), 1, 2.2)
    for name in FILES:
        shutil.copy(gemma / name, folder / name)
    own = json.loads((folder / "config.json").read_text())
    published = json.loads((gemma / "config.json").read_text(encoding="utf-8"))
    own |= {key: value for key, value in published.items() if key.endswith(("_token_id", "_token_index"))}
    (folder / "config.json").write_text(json.dumps(own))
    return folder


def mask_costs(walker: Walker, case: Case, reply: Reply) -> Iterator[tuple[bool, float]]:
    """Of the mask of each token of a reply: whether it had to begin a grammar first, and µs of its thread."""
    asked = case.asked
    form = walker.form(case.prompt, asked.get("response_format"), asked.get("tool_choice", "auto"))
    constraint = walker.constraint(form, case.prompt)
    for token in reply.token_ids:
        begins, started = constraint.matcher is None, time.thread_time()
        constraint.mask()
        yield begins, 1e6 * (time.thread_time() - started)
        constraint.advance([token])


if __name__ == "__main__":
    typer.run(main)
