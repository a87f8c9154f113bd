"""What a tuned model says, beside what it was to say."""

from collections.abc import Iterator, Sequence

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.engine.generation import generate
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt, SoftTokens
from mlx_gemma4.tune.data import Example
from mlx_gemma4.tune.rows import branches

SLACK = 16  # tokens that an answer may be longer than it was to be


def answers(
    model: Model, processor: Processor, examples: Sequence[Example], image_budget: int | None
) -> Iterator[bool]:
    """Of each reply of the examples, whether the likeliest one is the same, thoughts and calls and all."""
    budget = processor.image_budget(image_budget)
    for example in examples:
        found, media = branches(processor, example, image_budget)
        loaded = [processor.read(part, budget) for part in media]
        for branch in found if example.text is None else ():
            said = branch.ids[branch.start : -1]
            values = [loaded[run.part][run.number] for run in branch.runs]
            runs = tuple(
                SoftTokens(run.kind, run.start, own.values, own.positions)
                for run, own in zip(branch.runs, values, strict=True)
            )
            prompt = Prompt(branch.ids[: branch.start], runs)
            reply = generate(
                model, processor, prompt, max_tokens=len(said) + SLACK, sampling=Sampling(temperature=0),
                repetition_detection="off",
            )  # fmt: skip
            yield reply.token_ids == said and reply.finish_reason == "stop"
