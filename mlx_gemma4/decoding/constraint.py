"""What a reply is held to: which tokens may come next, as bits over the vocabulary.

A reply is a thought, or none, and then an answer or calls, as its `Form` says; a `Constraint` follows one through it.
"""

import weakref
from collections.abc import Collection, Sequence
from copy import copy
from enum import Enum, auto
from threading import Lock, Thread

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from mlx_gemma4.errors import unbroken
from mlx_gemma4.forms.form import Form, thought_of
from mlx_gemma4.model.cache import ROUND
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import BYTE_TOKEN, Controls

Mask = NDArray[np.uint32]  # [V / 32], rounded up: a bit for each token, the lowest first

GRACE = 64  # tokens in which a thought's last line may end, or as many as it had
# A mask is a matter of microseconds, but a rare one takes more steps than llguidance allows by itself.
LIMITS = LLParserLimits(max_items_in_row=20_000, step_lexer_fuel=4_000_000, step_max_items=1_000_000)
NO_GRAMMAR = LLMatcher.grammar_from_regex("")


# --- the vocabulary ----------------------------------------------------------------------------


class Pieces:
    """What llguidance asks of a tokenizer: the bytes of every token, and how it would write a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, processor: Processor):
        tokenizer, size = processor.tokenizer, processor.config.text.vocab_size
        special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.control = processor.control
        self.tokens: list[bytes] = []
        letters = set[bytes]()
        for index in range(size):
            piece = tokenizer.id_to_token(index)
            if piece is None:  # the model has more ids than the tokenizer
                special.add(index)
            self.tokens.append(bytes_of(piece, index in special))
            if len(self.tokens[-1]) == 1 and not is_byte(piece):
                letters.add(self.tokens[-1])
        # a byte that is a piece too is spelled as that one: of two with the same bytes llguidance knows one
        for index in range(size):
            if self.tokens[index] in letters and is_byte(tokenizer.id_to_token(index)):
                self.tokens[index] = b""
        self.special_token_ids = sorted(index for index in special if index < size)
        # llguidance allows it where a text may end; which token ends a reply is not decided there
        self.eos_token_id = self.special_token_ids[0] if self.special_token_ids else 0

    def __call__(self, text: str) -> list[int]:
        return self.control.encode(text)


def bytes_of(piece: str | None, special: bool) -> bytes:
    if piece is None or special:
        return (piece or "").encode()
    byte = BYTE_TOKEN.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def is_byte(piece: str | None) -> bool:
    return piece is not None and BYTE_TOKEN.fullmatch(piece) is not None


class Vocabulary:
    """The pieces of a tokenizer as llguidance wants them, read in a thread of its own: 262,144 take a second."""

    def __init__(self, processor: Processor):
        self.size, self.words = processor.config.text.vocab_size, processor.tokenizer
        self.line_break: int | None = self.words.token_to_id("\n")
        self.end = 0
        self.read: LLTokenizer | None = None
        self.error: BaseException | None = None
        self.thread = Thread(target=self.run, args=(processor,), name="mlx_gemma4.Vocabulary", daemon=True)
        self.thread.start()

    def run(self, processor: Processor) -> None:
        try:
            pieces = Pieces(processor)
            self.end = pieces.eos_token_id
            self.read = LLTokenizer(pieces, n_vocab=self.size)  # type: ignore[arg-type]
        except BaseException as error:  # whatever it is, who waits for the vocabulary must learn it
            self.error = error

    def ends_line(self, token: int) -> bool:
        return bytes_of(self.words.id_to_token(token), special=False).endswith(b"\n")

    def tokenizer(self) -> LLTokenizer:
        self.thread.join()
        if self.read is None:
            raise RuntimeError(f"the tokenizer's pieces cannot be read: {unbroken(self.error)}")
        return self.read


vocabularies: "weakref.WeakKeyDictionary[Processor, Vocabulary]" = weakref.WeakKeyDictionary()
vocabularies_lock = Lock()


def vocabulary_of(processor: Processor) -> Vocabulary:
    """Of a processor, read once; the first time this only begins to read it."""
    with vocabularies_lock:
        if processor not in vocabularies:
            vocabularies[processor] = Vocabulary(processor)
        return vocabularies[processor]


# --- one reply ---------------------------------------------------------------------------------


class Phase(Enum):
    START = auto()  # before anything but a thought
    ANSWER = auto()
    CALL = auto()
    CALLED = auto()  # behind a call
    DONE = auto()  # nothing follows


class DeadEndError(RuntimeError):
    """A reply that its form lets neither go on nor end."""


class Constraint:
    """Follows one reply. `advance` with its tokens; `mask` says which may come next.

    Raises DeadEndError where none may. It `binds` only where some token is barred: with tools and no form of the answer
    not before a call begins.
    """

    def __init__(self, form: Form, vocabulary: Vocabulary, controls: Controls, stops: Collection[int], prompt: Prompt):
        """stops: the tokens that end a reply."""
        self.form, self.vocabulary, self.controls = form, vocabulary, controls
        self.stops = frozenset(stops)
        self.phase = Phase.START
        self.matcher: LLMatcher | None = None  # of the answer or the call that has begun
        self.thinking, self.may_think = thought_of(prompt, controls)
        self.thought = 0  # tokens of thoughts
        self.line_ended = self.thinking  # with the last of them; the prompt ends its line
        self.in_thought = False  # the call was begun in a thought, which it ended
        self.text: tuple[int, ...] = ()  # of the call
        self.calls: tuple[tuple[int, ...], ...] = ()
        self.repeated = False  # the last call was an earlier one again
        self.count = 0  # tokens so far

    def begin(self, tokens: Sequence[int]) -> None:
        """Follow what the prompt holds of the reply. ValueError if that does not fit the form."""
        self.may_think = self.may_think and not tokens
        if self.form.answer is None:
            return
        try:
            fits = self.advance(tokens) == len(tokens)
        except DeadEndError:
            fits = False
        if not fits:
            raise ValueError(
                "the last message does not begin as its response_format wants; expected that, or no "
                "continue_final_message"
            )
        self.count = 0

    @property
    def pauses(self) -> tuple[int, int]:
        """The tokens behind which a round ends, for what follows is held; -1 for none."""
        form, controls = self.form, self.controls
        call = controls.tool_call_open if form.any_text and form.call is not None else None
        thought = controls.channel_open if form.budget is not None else None
        return -1 if call is None else call, -1 if thought is None else thought

    # what may come

    @property
    def binds(self) -> bool:
        """Whether some token is barred here."""
        form = self.form
        free = form.any_text and self.phase is Phase.START
        is_near = self.thinking and form.budget is not None and self.thought + ROUND > form.budget
        return is_near or not free

    @property
    def is_finished(self) -> bool:
        """Whether the reply can only end here."""
        return self.phase is Phase.DONE

    @property
    def repeats(self) -> bool:
        """Whether the call that is open, or was the last one, is so far an earlier one again."""
        is_open = self.phase is Phase.CALL
        return self.repeated or (is_open and any(own[: len(self.text)] == self.text for own in self.calls))

    def mask(self) -> Mask:
        """[V / 32]: the tokens that may come next."""
        found = self.bits()
        if not found.any():
            raise self.dead_end("no token may follow")
        return found

    def masks_for(self, drafts: Sequence[int]) -> Mask:
        """[k + 1, V / 32]: the tokens that may come next, and behind each of k drafts; of places that the drafts before
        them cannot lead to, all."""
        own, masks = self.copy(), [self.mask()]
        try:
            for draft in drafts:
                if own.is_finished or not has_bit(masks[-1], draft):
                    break
                own.advance([draft])
                masks.append(self.all_tokens() if own.is_finished else own.mask())
        except DeadEndError:
            pass  # if the drafts so far are accepted, the reply ends with this error when it gets there
        return np.stack([*masks, *[self.all_tokens()] * (len(drafts) + 1 - len(masks))])

    def forced(self, most: int) -> list[int]:
        """The next tokens, if they need no choice, at most so many: those that alone may come, and the way in which the
        tokenizer writes what must come. As drafts they are right or nearly always so."""
        own, found = self.copy(), list[int]()
        try:
            while len(found) < most and not own.is_finished and own.binds:
                following = own.next_forced()[: most - len(found)]
                if not following:
                    break
                own.advance(following)
                found += following
        except RuntimeError:
            pass  # the reply ends with this error when it gets there: a dead end, a vocabulary that cannot be read
        return found

    def advance(self, tokens: Sequence[int]) -> int:
        """Follow the reply over these tokens, up to its end: how many of them are its own."""
        for place, token in enumerate(tokens):
            if self.phase is Phase.DONE:
                return place
            self.step(token)
            self.count += 1
        return len(tokens)

    # inside

    def copy(self) -> "Constraint":
        own = copy(self)
        own.matcher = None if self.matcher is None else self.matcher.deep_copy()
        return own

    def all_tokens(self) -> Mask:
        bits = np.full(-(-self.vocabulary.size // 32), 0xFFFFFFFF, np.uint32)
        if self.vocabulary.size % 32:
            bits[-1] = (1 << self.vocabulary.size % 32) - 1
        return bits

    def bits(self) -> Mask:
        form, controls = self.form, self.controls
        if self.phase is Phase.DONE:
            return self.only(self.stops)
        if self.phase in (Phase.CALL, Phase.ANSWER):
            return self.matched()
        if self.phase is Phase.CALLED:
            return self.only([*self.stops, controls.tool_call_open if form.several else None])
        if self.thinking and (ends := self.thought_ends()) is not None:
            return self.only([ends])
        if form.any_text:
            return self.all_tokens()
        if self.thinking:
            barred = [controls.channel_open, None if form.call else controls.tool_call_open, *self.stops]
            return self.all_tokens() & ~self.only(barred)
        found = self.only([]) if form.answer is None else self.matched()
        call, thought = controls.tool_call_open, controls.channel_open
        return found | self.only([call if form.call else None, thought if self.may_think else None])

    def thought_ends(self) -> int | None:
        """What must come where thoughts have had their tokens: behind a line, or soon, their end."""
        budget = self.form.budget
        if budget is None or self.thought < budget:
            return None
        line_break = self.vocabulary.line_break
        if self.line_ended or line_break is None:
            return self.controls.channel_close
        return line_break if self.thought >= budget + min(budget, GRACE) else None

    def only(self, tokens: Collection[int | None]) -> Mask:
        bits = np.zeros(-(-self.vocabulary.size // 32), np.uint32)
        for token in tokens:
            if token is not None and token < self.vocabulary.size:
                bits[token // 32] |= np.uint32(1 << token % 32)
        return bits

    def matched(self) -> Mask:
        """What a grammar allows, and the end of the reply where an answer may end."""
        matcher = self.matching()
        bits = self.only([])
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self.check(matcher)
        bits &= ~self.only([self.vocabulary.end])
        if self.phase is not Phase.CALL and matcher.is_accepting():
            bits |= self.only(self.answer_ends())
        return bits

    def answer_ends(self) -> frozenset[int]:
        """The tokens that end an answer: not the one behind calls, if there is another."""
        return self.stops - {self.controls.tool_response_open} or self.stops

    def matching(self) -> LLMatcher:
        if self.matcher is None:
            grammar = self.form.call if self.phase is Phase.CALL else self.form.answer
            self.matcher = LLMatcher(self.vocabulary.tokenizer(), grammar or NO_GRAMMAR, log_level=0, limits=LIMITS)
            self.check(self.matcher)
        return self.matcher

    def next_forced(self) -> list[int]:
        bits = self.bits()
        places = bits.nonzero()[0]
        word = int(bits[places[0]]) if len(places) == 1 else 0
        if word and not word & (word - 1):
            return [32 * int(places[0]) + word.bit_length() - 1]
        form = self.form
        begins = self.phase is Phase.START and form.answer is not None and form.call is None and not self.may_think
        if self.phase in (Phase.CALL, Phase.ANSWER) or (begins and not self.thinking):
            matcher = self.matching()
            following = matcher.compute_ff_tokens()
            return following[: matcher.validate_tokens(following)]
        return []

    def step(self, token: int) -> None:
        controls, form = self.controls, self.form
        if self.phase is Phase.CALL:
            self.consume(token)
            self.text += (token,)
            if token == controls.tool_call_close:
                self.end_call()
        elif token == controls.tool_call_open and form.call is not None and self.phase is not Phase.ANSWER:
            self.in_thought |= self.thinking
            self.phase, self.matcher, self.text, self.thinking = Phase.CALL, None, (), False
        elif self.thinking:
            if token in self.stops:
                self.phase = Phase.DONE
            elif token == controls.channel_close:
                self.thinking = False
            else:
                self.thought, self.line_ended = self.thought + 1, self.vocabulary.ends_line(token)
        elif self.phase is Phase.START and token == controls.channel_open and (form.any_text or self.may_think):
            self.thinking, self.may_think, self.matcher, self.line_ended = True, False, None, False
        elif self.phase is Phase.CALLED or form.any_text:
            if token in self.stops:
                self.phase = Phase.DONE
        elif token in self.stops and self.matching().is_accepting():
            self.phase = Phase.DONE
        else:
            self.consume(token)
            self.phase = Phase.ANSWER
            if self.matching().is_stopped():
                self.phase = Phase.DONE

    def end_call(self) -> None:
        self.repeated = self.text in self.calls
        self.calls += (self.text,)
        self.matcher = None
        if self.repeated or not self.form.several:
            self.phase = Phase.DONE
        elif self.form.any_text and not self.in_thought:
            self.phase = Phase.START
        else:
            self.phase = Phase.CALLED

    def consume(self, token: int) -> None:
        matcher = self.matching()
        matcher.consume_token(token)
        self.check(matcher)

    def check(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            raise self.dead_end(unbroken(matcher.get_error().splitlines()[0])[:120])

    def dead_end(self, reason: str) -> DeadEndError:
        kind = "call" if self.phase is Phase.CALL else "response_format"
        return DeadEndError(f"the reply cannot be held to its {kind} after {self.count} tokens: {reason}")


def has_bit(mask: Mask, token: int) -> bool:
    return bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))
