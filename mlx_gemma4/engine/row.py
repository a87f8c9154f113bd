"""One request in work: what its tokens so far come to, and why and where they end."""

import time
from collections import Counter
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.decoding.batch import Given
from mlx_gemma4.decoding.round import NOT_FINITE
from mlx_gemma4.engine.request import Asked
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.tools import argument_schemas
from mlx_gemma4.reply.opening import CallPart
from mlx_gemma4.reply.repetition import Repetition, parse_repetition_detection
from mlx_gemma4.reply.reply import Controls, Piece, ReplyParser, Stats
from mlx_gemma4.reply.stop import check_stop


class Row:
    """Takes the tokens of a request as they come."""

    def __init__(self, processor: Processor, asked: Asked):
        """The constraint of what is asked follows the same tokens. Where a text of `stop` ends the answer, the ids are
        those up to the token that completes it."""
        prompt, options, constraint = asked.prompt, asked.options, asked.constraint
        self.prompt, self.constraint, self.prepared = prompt, constraint, asked.prepared
        self.stops, self.limit = asked.stops, asked.limit
        controls, schemas = Controls.from_tokenizer(processor.tokenizer), argument_schemas(prompt.tools)
        self.logprobs, stop = options.logprobs, check_stop(options.stop)
        calls_end_thoughts = constraint is not None and constraint.form.call is not None
        self.parser = ReplyParser(
            processor.tokenizer, controls, prompt.token_ids, schemas, prompt.notes, stop, calls_end_thoughts
        )
        self.withheld: list[CallPart] = []  # of a call that may be an earlier one again
        repetition = parse_repetition_detection(options.repetition_detection)
        self.repetition = None if repetition is None else Repetition(repetition)
        self.count = 0
        self.cached = 0  # tokens of the prompt that need not be read
        # how likely the prompt's tokens were, as far as it is read, if that is asked for; nothing foretells the first
        self.scores: list[dict[str, Any]] = [{"token_id": prompt.token_ids[0], "logprob": None, "top": {}}]
        self.finish_reason: str | None = None
        self.end: dict[str, Any] | None = None  # how likely the stop token was, if that is asked for
        # of whole rounds; drafts by their place in them
        self.rounds, self.drafted, self.accepted = 0, Counter[int](), Counter[int]()
        self.started = self.first_at = self.last_at = time.perf_counter()

    def take(self, given: Given) -> Piece:
        """What a round gave, or the reading of the prompt."""
        if given.error is not None:
            raise given.error
        tokens, told = given.tokens, given.told
        if NOT_FINITE in tokens:
            raise RuntimeError(
                f"the logits after {self.count} tokens of the reply are not finite; expected sound weights, "
                "or a wider computing type"
            )
        if given.drafted is not None:
            self.rounds += 1
            self.drafted.update(range(given.drafted))
            self.accepted.update(range(min(given.drafted, len(tokens) - 1)))
        ids, self.finish_reason = until_stop(tokens, self.stops, self.limit - self.count)
        if len(ids) == len(tokens) and self.constraint is not None and self.constraint.is_finished:
            self.finish_reason = "stop"  # nothing may follow
        repeated = None if self.repetition is None else self.repetition.feed(ids)
        if repeated is not None:
            ids, self.finish_reason = ids[:repeated], "repetition"
        self.last_at = time.perf_counter()
        if given.drafted is None:
            self.first_at = self.last_at
        text, thinking = [], []
        for place, token in enumerate(ids):
            printable = self.parser.feed([token])
            text.append(printable[0])
            thinking.append(printable[1])
            if self.parser.stopped:
                ids, self.finish_reason = ids[: place + 1], "stop"
                break
        self.count += len(ids)
        if told is not None and self.finish_reason == "stop" and not self.parser.stopped and len(ids) < len(tokens):
            self.end = self.entry(tokens[len(ids)], told[len(ids)])
        logprobs = None if told is None else [self.entry(*pair) for pair in zip(ids, told, strict=False)]
        notes, calls = self.parser.take_notes(), self.take_calls()
        return Piece("".join(text), "".join(thinking), ids, notes=notes, calls=calls, logprobs=logprobs)

    def take_calls(self) -> list[CallPart]:
        """What became known of calls, but for one that is so far an earlier one again: that would not count."""
        parts = [*self.withheld, *self.parser.take_calls()]
        repeats = self.constraint is not None and self.constraint.repeats
        self.withheld = [part for part in parts if repeats and part.index == parts[-1].index]
        return parts[: len(parts) - len(self.withheld)]

    def score(self, start: int, told: np.ndarray) -> None:
        """How likely the prompt's tokens from `start` on were: sampling.told, a row for each."""
        self.scores[start:] = map(self.entry, self.prompt.token_ids[start:], told)

    def entry(self, token: int, told: np.ndarray) -> dict[str, Any]:
        """Of `logprobs`."""
        own, (values, ids) = float(told[0]), told[1:].reshape(2, -1)[:, : self.logprobs]
        top = {int(index): float(value) for index, value in zip(ids, values, strict=True)}
        return {"token_id": token, "logprob": own, "top": top}

    def finish(self) -> Piece:
        """The last piece."""
        parser, notes = self.parser, list[str]()
        if self.finish_reason == "length" and parser.in_thought:
            notes.append(f"the {self.count} tokens ran out inside the thought; raise max_tokens")
        if self.finish_reason == "repetition" and self.repetition is not None:
            notes.append(self.repetition.note())
        rest = parser.finish("stop" if self.finish_reason == "stop" else "length")  # a call that was cut is none
        if parser.stopped:
            self.finish_reason = "stop"
        notes += parser.take_notes()
        calls = self.take_calls()
        if self.constraint is not None and self.constraint.repeated and len(parser.tool_calls) > 1:
            parser.tool_calls.pop()
            notes.append("the reply ended at a call that it had made before")
        else:
            calls += self.withheld
        return Piece(
            *rest, [], self.finish_reason, parser.tool_calls, self.stats(), notes, parser.message, calls,
            stop=parser.stopped, end=self.end,
        )  # fmt: skip

    def stats(self) -> Stats:
        length, accepted = len(self.prompt), self.accepted.total()
        return Stats(
            prompt_tokens=length,
            cached_tokens=self.cached,
            prompt_tps=(length - self.cached) / (self.first_at - self.started),
            generation_tokens=self.count,
            generation_tps=max(self.count - 1, 0) / max(self.last_at - self.first_at, 1e-9),
            time_to_first_token=self.prepared + self.first_at - self.started,
            peak_memory=mx.get_peak_memory(),
            rounds=self.rounds,
            drafted_tokens=self.drafted.total(),
            accepted_tokens=accepted,
            acceptance_by_position=[self.accepted[place] / tries for place, tries in self.drafted.items()],
            tokens_per_round=1 + accepted / max(self.rounds, 1),
            thinking_tokens=self.parser.thinking_tokens,
        )


def until_stop(ids: list[int], stops: Collection[int], room: int) -> tuple[list[int], str | None]:
    """The ids before a stop token, `room` at most, and why they end there, if they do."""
    for index, token in enumerate(ids[:room]):
        if token in stops:
            return ids[:index], "stop"
    return ids[:room], "length" if len(ids) >= room else None
