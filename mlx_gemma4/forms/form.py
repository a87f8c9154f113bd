"""What a reply may be: its answer, its calls, its thought; each by which grammar."""

from dataclasses import dataclass

from mlx_gemma4.errors import shown
from mlx_gemma4.forms.calls import call_grammar
from mlx_gemma4.forms.response import response_grammar
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import Controls

CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class Form:
    """What a reply may be, behind its thought."""

    answer: str | None  # the grammar of an answer; None: any text, or none at all
    call: str | None  # the grammar of a call behind `<|tool_call>`; None: there may be none
    must_call: bool  # there is no answer
    several: bool  # calls
    budget: int | None = None  # tokens of thoughts, until the next line ends

    @property
    def any_text(self) -> bool:
        return self.answer is None and not self.must_call


def form_of(
    prompt: Prompt,
    controls: Controls,
    response_format: object,
    tool_choice: str,
    parallel_tool_calls: bool,
    thinking_budget: int | None = None,
) -> Form | None:
    """What the reply to a prompt is held to; None if to nothing. ValueError for what is wrong or cannot be held."""
    answer = response_grammar(response_format)
    names = [tool["function"]["name"] for tool in prompt.tools if tool_choice != "none"]
    named = tool_choice not in CHOICES
    if named and tool_choice not in names:
        raise ValueError(f"tool_choice is {shown(tool_choice)}; expected {' | '.join([*CHOICES, *names[:20]])}")
    if tool_choice == "required" and not names:
        raise ValueError("tool_choice is 'required' and there are no tools; expected tools, or \"auto\"")
    quote, close = controls.quote, controls.tool_call_close
    readable = controls.tool_call_open is not None and quote is not None and close is not None
    if (named or tool_choice == "required") and not readable:
        raise ValueError(f"tool_choice is {shown(tool_choice)}, and this tokenizer has no tokens for calls")
    call = None
    if names and quote is not None and close is not None and readable:
        call = call_grammar(prompt.tools, tool_choice if named else None, quote, close)
    must_call = named or tool_choice == "required"
    budget = thinking_budget if any(thought_of(prompt, controls)) and controls.channel_close is not None else None
    if answer is None and call is None and not must_call and budget is None:
        return None
    return Form(None if must_call else answer, call, must_call, parallel_tool_calls and not named, budget)


def thought_of(prompt: Prompt, controls: Controls) -> tuple[bool, bool]:
    """Whether a reply begins inside a thought that the prompt has opened, and else whether it may open one."""
    if controls.opened_thought(prompt.token_ids) is not None:
        return True, False
    return False, controls.think is not None and controls.think in prompt.token_ids
