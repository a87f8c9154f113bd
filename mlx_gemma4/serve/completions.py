"""OpenAI's text completions: prompts gone on with as they stand."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from mlx_gemma4.engine.completion import usage
from mlx_gemma4.errors import shown
from mlx_gemma4.reply.reply import Piece, Reply
from mlx_gemma4.serve.ask import Ask, Refused, checked
from mlx_gemma4.serve.chat import MOST_CHOICES, Drawn, OpenAI, OpenAIWriter

DEFAULT_TOKENS = 16  # as OpenAI has it


class Request(Drawn):
    prompt: Any
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


def prompts_of(prompt: Any) -> tuple[str | list[int], ...]:
    """One text or list of token ids, or a list of these."""
    alone = isinstance(prompt, str) or is_ids(prompt)
    found = [prompt] if alone else prompt
    if not isinstance(found, list) or not found or not all(isinstance(own, str) or is_ids(own) for own in found):
        raise Refused(f"prompt is {shown(prompt)}; expected a text, token ids, or a list of these")
    return tuple(found)


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int and 0 <= entry < 2**31 for entry in value)


class Completions(OpenAI):
    def parse(self, body: dict[str, Any], scope: str) -> tuple[Ask, "CompletionWriter"]:
        request = checked(Request, body)
        for field, value in (("suffix", request.suffix), ("best_of", request.best_of)):
            if value not in (None, "", request.n or 1):
                raise Refused(f"{field} is {shown(value)}; expected none: this server has no such thing")
        prompts, replies = prompts_of(request.prompt), request.n or 1
        if len(prompts) * replies > MOST_CHOICES and len(prompts) > 1:
            raise Refused(f"prompt has {len(prompts)} entries; expected at most {MOST_CHOICES // replies}")
        ask = Ask(
            prompts=prompts,
            max_tokens=DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens,
            sampling=request.sampling,
            stop=tuple(request.stop or ()),
            logprobs=request.logprobs,
            logit_bias=request.bias,
            n=replies,
            stream=bool(request.stream),
            echo=bool(request.echo),
        )
        return ask, CompletionWriter(self, request)


class CompletionWriter(OpenAIWriter):
    def __init__(self, dialect: OpenAI, request: Request):
        super().__init__(dialect, request, "cmpl-", "text_completion")
        self.has_logprobs = request.logprobs is not None
        self.offsets: dict[int, int] = {}  # characters of each choice so far

    def begin(self, prompt_tokens: int) -> Iterator[str]:
        yield from ()

    def piece(self, piece: Piece, choice: int) -> Iterator[str]:
        if piece.stats is not None:
            self.stats.append(piece.stats)
        if piece.text or piece.logprobs or piece.stats is not None:
            yield self.chunk([self.choice(choice, piece)])

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        choices = [self.choice(index, reply) for index, reply in enumerate(replies)]
        told = usage([reply.stats for reply in replies])
        return self.head | {"object": self.kind, "choices": choices, "usage": told}

    def choice(self, index: int, said: Piece | Reply) -> dict[str, Any]:
        reason = None if said.finish_reason is None else "stop" if said.finish_reason == "stop" else "length"
        logprobs = self.logprobs(index, said.logprobs or []) if self.has_logprobs else None
        return {"index": index, "text": said.text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, choice: int, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        tokens, offsets = [], []
        for entry in entries:
            tokens.append(self.token_text(entry["token_id"]))
            offsets.append(self.offsets.get(choice, 0))
            self.offsets[choice] = offsets[-1] + len(tokens[-1])
        tops = [self.likeliest(entry) for entry in entries]
        values = [entry["logprob"] for entry in entries]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def likeliest(self, entry: dict[str, Any]) -> dict[str, float]:
        """By text, the token's own with them as OpenAI has it. Of tokens that are one text, as bytes are that make no
        character alone, the likeliest."""
        if entry["logprob"] is None:
            return {}
        found = [*entry["top"].items(), (entry["token_id"], entry["logprob"])]
        told: dict[str, float] = {}
        for index, value in sorted(found, key=lambda pair: -pair[1]):
            told.setdefault(self.token_text(index), value)
        return told
