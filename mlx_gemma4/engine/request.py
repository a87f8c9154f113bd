"""What a caller asks for, as one value, checked: free of a model, then of one, which it does not hold."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from mlx_gemma4.decoding.controller import check_draft_length
from mlx_gemma4.decoding.sampling import TOP, Sampling, settled
from mlx_gemma4.errors import a, check_flag, shown
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.messages import request_messages
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt, check_length, is_whole
from mlx_gemma4.reply.repetition import parse_repetition_detection
from mlx_gemma4.reply.reply import Controls
from mlx_gemma4.reply.stop import check_stop
from mlx_gemma4.weights.load import BASE

if TYPE_CHECKING:
    from mlx_gemma4.decoding.constraint import Constraint  # which loads llguidance

SEEDED_LENGTH = 3  # drafts a round for "auto" when a reply is to be the same again
MOST_BIAS = 100  # as OpenAI has it: with logits within 30, such a token is certain or never said


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a reply is to be written, whatever is asked. ValueError that names the option if one is wrong."""

    max_tokens: int = 1024
    sampling: Sampling = Sampling()
    draft_length: int | str = "auto"
    repetition_detection: str | Mapping[str, int] = "auto"
    stop: str | Sequence[str] = ()  # texts before which the answer ends
    logprobs: int | None = None  # the likeliest tokens told at each place, 0 for the chosen one alone; None: nothing
    prompt_logprobs: bool = False  # they are told of the prompt's own tokens too, of which none is found in a store
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these ids
    thinking_budget: int | None = None  # tokens of a thought, until its next line ends; None: no bound
    response_format: Any = None  # what the answer is held to: forms.response
    tool_choice: str = "auto"  # "auto" | "none" | "required" | a tool's name
    parallel_tool_calls: bool = True  # a reply may have more than one
    scope: str = ""  # whose request it is: what has been read for others is not found in a store
    adapter: str | None = None  # of the model's, by name; None: none of them

    def __post_init__(self) -> None:
        if not is_whole(self.max_tokens) or not 1 <= self.max_tokens < 2**63:
            raise ValueError(f"max_tokens is {shown(self.max_tokens)}; expected a whole number, 1 or more")
        object.__setattr__(self, "max_tokens", int(self.max_tokens))  # NumPy's would overflow when it is added to
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling is {shown(self.sampling)}; expected Sampling(…)")
        check_draft_length(self.draft_length)
        parse_repetition_detection(self.repetition_detection)
        check_stop(self.stop)
        if self.logprobs is not None and not (is_whole(self.logprobs) and 0 <= self.logprobs <= TOP):
            raise ValueError(f"logprobs is {shown(self.logprobs)}; expected None, or a whole number from 0 to {TOP}")
        check_bias(self.logit_bias)
        budget = self.thinking_budget
        if budget is not None and (not is_whole(budget) or not 0 <= budget < 2**63):
            raise ValueError(f"thinking_budget is {shown(budget)}; expected None, or a whole number, 0 or more")
        if not isinstance(self.tool_choice, str):
            raise ValueError(
                f"tool_choice is {shown(self.tool_choice)}; expected auto, none, required or a tool's name"
            )
        check_flag(self.parallel_tool_calls, "parallel_tool_calls")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise ValueError(f"adapter is {shown(self.adapter)}; expected None, or an adapter's name")
        if self.response_format is not None:
            from mlx_gemma4.forms.response import response_grammar  # here: it loads llguidance

            response_grammar(self.response_format)

    def thinks(self, thinking: bool) -> bool:
        """Whether a prompt is to ask for a thought."""
        return thinking and self.thinking_budget != 0 if isinstance(thinking, bool) else thinking

    def constraint(self, processor: Processor, prompt: Prompt, stops: Collection[int]) -> "Constraint | None":
        """What the reply to a prompt is held to, if to anything. stops: the tokens that end a reply.

        ValueError for a form that cannot be held, for a tool_choice that the prompt's tools do not have, and for a
        logit_bias beyond the vocabulary.
        """
        vocab_size = processor.config.text.vocab_size
        if self.logit_bias and max(self.logit_bias) >= vocab_size:
            raise ValueError(f"logit_bias has the token id {max(self.logit_bias)}; the vocabulary has {vocab_size}")
        no_tools = self.tool_choice == "none" or (self.tool_choice == "auto" and not prompt.tools)
        is_free = self.response_format is None and no_tools
        if is_free and self.thinking_budget is None:
            return None
        from mlx_gemma4.decoding.constraint import Constraint, vocabulary_of
        from mlx_gemma4.forms.form import form_of

        controls = Controls.from_tokenizer(processor.tokenizer)
        form = form_of(
            prompt, controls, self.response_format, self.tool_choice, self.parallel_tool_calls, self.thinking_budget
        )
        if form is None:
            return None
        constraint = Constraint(form, vocabulary_of(processor), controls, stops, prompt)
        constraint.begin(processor.control.encode(prompt.begun))
        return constraint


def adapter_named(model: Any, adapters: Sequence[str], base: str) -> str | None:
    """The adapter that a request's `model` is; None: none of them. Where there are none, any name is the model's.

    ValueError for a name that is none of theirs: the base model's answer would look right.
    """
    if not adapters or model in (None, BASE, base):
        return None
    if model not in adapters:
        raise ValueError(f"model is {shown(model)}; expected {base}, or an adapter's name: {', '.join(adapters)}")
    return str(model)


def check_bias(bias: Any) -> None:
    if bias is not None and not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias is {a(bias)}; expected a dict of token ids and numbers")
    for token, value in (bias or {}).items():
        if not is_whole(token) or not 0 <= token < 2**31:
            raise ValueError(f"logit_bias has the key {shown(token)}; expected a token id")
        numeric = isinstance(value, Real) and not isinstance(value, bool)
        if not numeric or not -MOST_BIAS <= value <= MOST_BIAS:
            raise ValueError(
                f"logit_bias[{token}] is {shown(value)}; expected a number from -{MOST_BIAS} to {MOST_BIAS}"
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked: a string (one user turn, the media placed before it), chat messages, or a `Prompt`."""

    content: str | list[dict[str, Any]] | Prompt
    images: Sequence[Any] = ()
    audios: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    image_budget: int | None = None
    preserve_thinking: bool = False
    continue_final_message: bool = False

    def timed_prompt(self, processor: Processor) -> tuple[Prompt, float]:
        """The prompt, and the seconds that making it took."""
        started = time.perf_counter()
        return self.prompt(processor), time.perf_counter() - started

    def prompt(self, processor: Processor) -> Prompt:
        """ValueError if any of it is wrong."""
        content, media = self.content, (self.images, self.audios, self.videos)
        if isinstance(content, str):
            content = request_messages(content, self.images, self.audios, self.videos, self.system)
        elif not isinstance(content, (list, tuple, Prompt)):
            raise ValueError(f"request is {a(content)}; expected a string, a list of messages or a Prompt")
        elif self.system is not None or not all(isinstance(given, (list, tuple)) and not given for given in media):
            raise ValueError(
                "images, audios, videos and system go with a request that is a string; put them in the messages"
            )
        if isinstance(content, Prompt):
            flags = (self.thinking, self.preserve_thinking, self.continue_final_message)
            no_tools = self.tools is None or (isinstance(self.tools, (list, tuple)) and not self.tools)
            if not no_tools or any(flag is not False for flag in flags) or self.image_budget is not None:
                raise ValueError(
                    "tools, thinking, preserve_thinking, continue_final_message and image_budget go with messages; a "
                    "Prompt is taken as it stands"
                )
            return content
        return processor(
            content,
            tools=self.tools,
            thinking=self.thinking,
            image_budget=self.image_budget,
            preserve_thinking=self.preserve_thinking,
            continue_final_message=self.continue_final_message,
        )


class Asked:
    """A prompt and options for a model. ValueError if the model cannot do what is asked."""

    def __init__(self, model: Model, processor: Processor, prompt: Prompt, options: Options, prepared: float):
        """prepared: seconds that making the prompt took, which count for the time to first token."""
        check_length(prompt, model.config)
        self.prompt, self.options, self.prepared = prompt, options, prepared
        self.stops = model.config.generation.eos_token_ids  # the tokens that end the reply
        # tokens of the reply at most
        self.limit = min(options.max_tokens, model.config.text.max_position_embeddings - len(prompt))
        self.adapter = adapter_of(model, options.adapter)
        self.constraint = options.constraint(processor, prompt, self.stops)
        self.drafts = drafts_of(model, options)


def adapter_of(model: Model, name: str | None) -> int:
    """Which of the model's adapters it is, from 1 on; 0: none. ValueError for a name that none of them has."""
    names = model.config.adapters
    if name is None:
        return 0
    if not isinstance(name, str) or name not in names:
        there = f"None, or one of {', '.join(names)}" if names else "None: no adapter was loaded by name"
        raise ValueError(f"adapter is {shown(name)}; expected {there}")
    return names.index(name) + 1


def drafts_of(model: Model, options: Options) -> int | None:
    """Drafts of every round; None: as many as pay. With a seed "auto" is one length: which random number decides on
    which token must not hang on measured times."""
    length, sampling = options.draft_length, options.sampling
    if model.drafter is None and length not in ("auto", 0):
        raise ValueError(f"draft_length is {length} and the model has no drafter; expected 0, or load one")
    if length != "auto":
        return int(length)
    if model.drafter is None:
        return 0
    is_greedy = settled(sampling, model.config.generation).temperature == 0
    return None if sampling.seed is None or is_greedy else SEEDED_LENGTH
