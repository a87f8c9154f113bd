"""Random replies that a constraint allows, without a model: each token is drawn from what may come next."""

from collections.abc import Sequence

import numpy as np

from mlx_gemma4 import Prompt
from mlx_gemma4.decoding.constraint import Constraint, Pieces, vocabulary_of
from mlx_gemma4.forms.form import Form, form_of
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.reply.reply import Controls, ReplyParser

STOPS = (1, 106, 50)


class Walker:
    def __init__(self, processor: Processor, seed: int = 0):
        self.processor, self.rng = processor, np.random.default_rng(seed)
        self.controls = Controls.from_tokenizer(processor.tokenizer)
        pieces = Pieces(processor)
        closing = (self.controls.quote, self.controls.tool_call_close, self.controls.channel_close, *STOPS)
        self.closing = np.array([piece in (b'"', b"}", b"]") or n in closing for n, piece in enumerate(pieces.tokens)])
        special = set(pieces.special_token_ids)
        self.short = np.array([len(piece) == 1 or n in special for n, piece in enumerate(pieces.tokens)])

    def constraint(self, form: Form, prompt: Prompt) -> Constraint:
        return Constraint(form, vocabulary_of(self.processor), self.controls, STOPS, prompt)

    def form(
        self, prompt: Prompt, response_format: object = None, tool_choice: str = "auto", parallel: bool = True
    ) -> Form:
        form = form_of(prompt, self.controls, response_format, tool_choice, parallel)
        assert form is not None
        return form

    def bits(self, mask: np.ndarray) -> np.ndarray:
        """[V] bool."""
        size = self.processor.config.text.vocab_size
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)

    def allowed(self, constraint: Constraint) -> list[int]:
        """The tokens that may come next."""
        return self.bits(constraint.mask()).nonzero()[0].tolist()

    def walk(
        self, form: Form, prompt: Prompt, most: int = 300, wanted: Sequence[str] = ()
    ) -> tuple[Constraint, list[int]]:
        """A reply: more and more often what closes is taken, so that it comes to an end; wanted: what is often said."""
        constraint, tokens = self.constraint(form, prompt), list[int]()
        while not constraint.is_finished and len(tokens) < most:
            if wanted and self.rng.random() < 0.3:
                said = self.ids(wanted[self.rng.integers(len(wanted))])
                if self.follows(constraint, said):
                    constraint.advance(said)
                    tokens += said
                    continue
            allowed = self.bits(constraint.mask())
            number = self.rng.random()
            for part, chance in ((self.closing, 0.3 + len(tokens) / most), (self.short, 0.8)):
                if number < chance and (allowed & part).any():
                    allowed = allowed & part
                    break
            found = allowed.nonzero()[0]
            tokens.append(int(found[self.rng.integers(len(found))]))
            assert constraint.advance(tokens[-1:]) == 1
        return constraint, tokens

    def follows(self, constraint: Constraint, tokens: Sequence[int]) -> bool:
        own = constraint.copy()
        for token in tokens:
            if not self.bits(own.mask())[token]:
                return False
            own.advance([token])
        return not own.is_finished

    def read(self, tokens: Sequence[int], prompt: Prompt) -> ReplyParser:
        """What a reply says, without the token that ends it."""
        parser = ReplyParser(self.processor.tokenizer, self.controls, prompt.token_ids)
        parser.feed(token for token in tokens if token not in STOPS)
        parser.finish()
        return parser

    def ids(self, text: str) -> list[int]:
        """The tokens of a text with control tokens."""
        return self.processor.tokenizer.encode(text, add_special_tokens=False).ids
