"""What people use, at its everyday work against the server: the clients as they are, nothing patched."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

for library in ("starlette", "uvicorn", "prometheus_client", "pypdfium2", "python_multipart"):
    pytest.importorskip(library, reason="needs the extra serve")

from serving import served  # noqa: E402

from mlx_gemma4.serve.resident import Settings  # noqa: E402
from mlx_gemma4.weights.load import DEMO  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1", "LANGSMITH_TRACING": "false",
    "ANONYMIZED_TELEMETRY": "false", "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "local", "ANTHROPIC_API_KEY": "local",
}  # fmt: skip
SHAPES = (DEMO / "samples" / "shapes.png").read_bytes()
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ABOUT = "Get the current weather in a city."
PARIS = "What is the weather in Paris?"


@pytest.fixture(autouse=True)
def compiled_rounds() -> None:
    """As people have it: here it is plain rounds that save the seconds in which kernels are built."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in QUIET.items():
            patch.setenv(key, value)
        with served(Settings(model="demo")) as running:
            yield running.url


def weather(city: str) -> str:
    return json.dumps({"temperature": 21, "weather": "sunny"})


# --- anthropic


@pytest.fixture
def claude(server: str) -> Any:
    return pytest.importorskip("anthropic").Anthropic(base_url=server, max_retries=0)


GREEDY = {"extra_body": {"temperature": 0}}  # which newer versions have no argument for
TOOL = {"name": "get_weather", "description": ABOUT, "input_schema": CITY}


def base64_source(kind: str, data: bytes) -> dict[str, Any]:
    return {"type": "base64", "media_type": kind, "data": base64.b64encode(data).decode()}


def test_anthropic_answers_and_counts(claude: Any) -> None:
    question: dict[str, Any] = {
        "model": "claude-x",
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": "Spell the word cat."}],
    }
    message = claude.messages.create(max_tokens=50, **GREEDY, **question)
    assert (message.content[0].text, message.stop_reason, message.model) == ("c-a-t", "end_turn", "demo")
    told = message.usage
    counted = claude.messages.count_tokens(**question).input_tokens
    assert counted == told.input_tokens + told.cache_read_input_tokens > 0
    stopped = claude.messages.create(max_tokens=50, stop_sequences=["a-", "x"], **GREEDY, **question)
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("c-", "stop_sequence", "a-")
    cut = claude.messages.create(max_tokens=2, **GREEDY, **question)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)


@pytest.mark.parametrize("word", ["cat", "dog"])
def test_anthropic_has_a_prompt_read_before_it_is_needed(claude: Any, word: str) -> None:
    messages = [{"role": "user", "content": f"Before it is needed: spell the word {word}."}]
    read = claude.messages.create(model="x", max_tokens=0, messages=messages, **GREEDY)
    assert (read.content, read.stop_reason, read.usage.output_tokens) == ([], "max_tokens", 0)
    message = claude.messages.create(model="x", max_tokens=5, messages=messages, **GREEDY)
    assert message.usage.cache_read_input_tokens > 5 * message.usage.input_tokens


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}])
def test_anthropic_calls_a_tool(claude: Any, streams: bool, thinking: dict[str, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": PARIS}]
    ask: dict[str, Any] = {"model": "x", "max_tokens": 2000, "tools": [TOOL], "thinking": thinking, **GREEDY}

    def reply() -> Any:
        if not streams:
            return claude.messages.create(messages=messages, **ask)
        with claude.messages.stream(messages=messages, **ask) as stream:
            return stream.get_final_message()

    first = reply()
    call = first.content[-1]
    assert (first.stop_reason, call.type, call.name, call.input) == (
        "tool_use",
        "tool_use",
        "get_weather",
        {"city": "Paris"},
    )
    assert ("thinking" in [block.type for block in first.content]) == (thinking["type"] == "enabled")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": weather(**call.input)}
    messages += [first.to_param(), {"role": "user", "content": [result]}]
    second = reply()
    assert second.content[-1].text == "It is sunny and 21 degrees in Paris." and second.stop_reason == "end_turn"
    assert second.usage.cache_read_input_tokens > second.usage.input_tokens


@pytest.mark.parametrize("streams", [False, True])
def test_anthropic_runs_tools_itself(claude: Any, streams: bool) -> None:
    import anthropic

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        return weather(city)

    runner = claude.beta.messages.tool_runner(
        model="x",
        max_tokens=100,
        tools=[get_weather],
        messages=[{"role": "user", "content": PARIS}],
        stream=streams,
        **GREEDY,
    )
    replies = [step.get_final_message() if streams else step for step in runner]
    assert [reply.stop_reason for reply in replies] == ["tool_use", "end_turn"]
    assert replies[-1].content[-1].text == "It is sunny and 21 degrees in Paris."


def test_anthropic_streams_text(claude: Any) -> None:
    messages = [{"role": "user", "content": "Count from 1 to 5."}]
    with claude.messages.stream(model="x", max_tokens=100, messages=messages, **GREEDY) as stream:
        parts = list(stream.text_stream)
        message = stream.get_final_message()
    assert len(parts) > 1 and "".join(parts) == message.content[0].text
    assert message.usage.output_tokens > 1


def test_anthropic_sees_images_and_pdfs(claude: Any) -> None:
    pdf = io.BytesIO()
    Image.open(io.BytesIO(SHAPES)).convert("RGB").save(pdf, "PDF")
    image = {"type": "image", "source": base64_source("image/png", SHAPES)}
    document = {"type": "document", "source": base64_source("application/pdf", pdf.getvalue())}
    question = {"type": "text", "text": "How many shapes are there?"}
    for seen in (image, document):
        messages = [{"role": "user", "content": [seen, question]}]
        message = claude.messages.create(model="x", max_tokens=50, messages=messages, **GREEDY)
        assert message.content[0].text
        assert message.usage.input_tokens + message.usage.cache_read_input_tokens > 50


def test_anthropic_is_told_what_is_wrong(claude: Any) -> None:
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        claude.messages.create(model="x", max_tokens=10, messages=[{"role": "user", "content": "word " * 9000}])
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]\.text"):
        claude.messages.create(model="x", max_tokens=10, messages=[{"role": "user", "content": [{"type": "text"}]}])


# --- openai: responses


@pytest.fixture
def gpt(server: str) -> Any:
    return pytest.importorskip("openai").OpenAI(base_url=f"{server}/v1", max_retries=0)


FUNCTION = {"type": "function", "name": "get_weather", "description": ABOUT, "parameters": CITY, "strict": True}


def test_responses_answer_and_go_on(gpt: Any) -> None:
    import openai

    first = gpt.responses.create(model="demo", input="Spell the word cat.", temperature=0)
    assert first.output_text == "c-a-t" and first.status == "completed"
    second = gpt.responses.create(
        model="demo", input="Spell it backwards.", previous_response_id=first.id, temperature=0
    )
    assert second.usage.input_tokens > first.usage.total_tokens and second.output_text
    with pytest.raises(openai.NotFoundError) as caught:
        gpt.responses.create(model="demo", input="And?", previous_response_id="resp_none")
    assert caught.value.code == "previous_response_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        gpt.responses.create(model="demo", input="word " * 9000)
    assert wrong.value.code == "context_length_exceeded"


@pytest.mark.parametrize("effort", ["none", "high"])
def test_responses_stream_a_tool_loop(gpt: Any, effort: str) -> None:
    items: list[Any] = [{"role": "user", "content": PARIS}]
    ask: dict[str, Any] = {
        "model": "demo", "tools": [FUNCTION], "reasoning": {"effort": effort}, "temperature": 0, "store": False,
        "include": ["reasoning.encrypted_content"],
    }  # fmt: skip
    with gpt.responses.stream(input=items, **ask) as stream:
        events = list(stream)
        first = stream.get_final_response()
    assert [event.sequence_number for event in events if event.type == "response.completed"] == [len(events) - 1]
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Paris"})
    assert ("reasoning" in [item.type for item in first.output]) == (effort == "high")
    items += [item.to_dict() for item in first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": weather("Paris")})
    second = gpt.responses.create(input=items, **ask)
    assert second.output_text == "It is sunny and 21 degrees in Paris."
    assert second.usage.input_tokens_details.cached_tokens > second.usage.input_tokens / 2


def test_responses_hold_the_answer_to_a_model(gpt: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    Answer = pydantic.create_model("Answer", word=(Literal["cat", "dog"], ...), letters=(Literal[3, 4], ...))
    answer = gpt.responses.parse(model="demo", input="Spell the word cat.", text_format=Answer).output_parsed
    assert isinstance(answer, Answer)
    with gpt.responses.stream(model="demo", input="Spell the word cat.", text_format=Answer) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Answer)


def test_responses_give_custom_calls_back(gpt: Any) -> None:
    tool = {"type": "custom", "name": "search", "description": "Search the web."}
    response = gpt.responses.create(
        model="demo", input="Search for cats.", tools=[tool], tool_choice="required", temperature=0
    )
    (call,) = [item for item in response.output if item.type == "custom_tool_call"]
    assert call.name == "search" and isinstance(call.input, str)


def test_responses_see_images(gpt: Any) -> None:
    image = f"data:image/png;base64,{base64.b64encode(SHAPES).decode()}"
    content = [
        {"type": "input_image", "image_url": image},
        {"type": "input_text", "text": "How many shapes are there?"},
    ]
    response = gpt.responses.create(model="demo", input=[{"role": "user", "content": content}], temperature=0)
    assert response.output_text and response.usage.input_tokens > 50


# --- others


@pytest.fixture
def event_loop() -> Iterator[None]:
    """One for this thread: litellm would make it, and leave it open for another test to be blamed."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("event_loop")
def test_litellm_speaks_both(server: str) -> None:
    litellm = pytest.importorskip("litellm")
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "Spell the word cat."}], "temperature": 0}
    for model, base in (("openai/demo", f"{server}/v1"), ("anthropic/demo", server)):
        reply = litellm.completion(model=model, api_base=base, api_key="local", max_tokens=50, **ask)
        assert reply.choices[0].message.content == "c-a-t"
        stream = litellm.completion(model=model, api_base=base, api_key="local", max_tokens=50, stream=True, **ask)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "c-a-t"


def test_llm_uses_a_model_of_its_yaml(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llm")
    cli = pytest.importorskip("click.testing").CliRunner()
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    model = f"- model_id: gemma\n  model_name: demo\n  api_base: {server}/v1\n  vision: true\n  supports_tools: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    from llm.cli import cli as llm

    told = cli.invoke(llm, ["-m", "gemma", "-o", "temperature", "0", "Spell the word cat."], catch_exceptions=False)
    assert told.output.strip() == "c-a-t"


def test_openai_agents_run_a_tool(server: str) -> None:
    agents = pytest.importorskip("agents")
    from openai import AsyncOpenAI

    asked: list[str] = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        asked.append(city)
        return weather(city)

    async def told() -> str:
        async with AsyncOpenAI(base_url=f"{server}/v1") as client:
            model = agents.OpenAIResponsesModel("demo", client)
            settings = agents.ModelSettings(temperature=0)
            agent = agents.Agent("a", model=model, tools=[get_weather], model_settings=settings)
            return str((await agents.Runner.run(agent, PARIS)).final_output)

    assert asyncio.run(told()) == "It is sunny and 21 degrees in Paris."
    assert asked == ["Paris"]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_calls_a_tool(server: str, responses: bool) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="demo", base_url=f"{server}/v1", temperature=0, use_responses_api=responses
    ).bind_tools([{"type": "function", "function": {"name": "get_weather", "description": ABOUT, "parameters": CITY}}])
    messages: list[Any] = [("user", PARIS)]
    first = model.invoke(messages)
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [("get_weather", {"city": "Paris"})]
    from langchain_core.messages import ToolMessage

    messages += [first, ToolMessage(weather("Paris"), tool_call_id=first.tool_calls[0]["id"])]
    assert "".join(chunk.text for chunk in model.stream(messages)) == "It is sunny and 21 degrees in Paris."


@pytest.mark.parametrize("protocol", ["openai-chat", "openai-responses", "anthropic"])
def test_pydantic_ai_runs_a_tool_and_fills_a_model(server: str, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ai = pytest.importorskip("pydantic_ai")
    pydantic = pytest.importorskip("pydantic")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server}/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server)
    Answer = pydantic.create_model("Answer", word=(Literal["cat", "dog"], ...), letters=(Literal[3, 4], ...))
    asked: list[str] = []

    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        asked.append(city)
        return weather(city)

    async def told() -> tuple[str, str, Any]:
        model = ai.models.infer_model(f"{protocol}:demo")
        settings = {"temperature": 0, "max_tokens": 500}
        agent = ai.Agent(model, tools=[get_weather], model_settings=settings)
        whole = await agent.run(PARIS)
        async with agent.run_stream(PARIS) as stream:
            text = "".join([part async for part in stream.stream_text(delta=True)])
        filled = await ai.Agent(model, output_type=Answer, model_settings=settings).run("Spell the word cat.")
        await model.client.close()
        return whole.output, text, filled.output

    whole, text, filled = asyncio.run(told())
    assert whole == text == "It is sunny and 21 degrees in Paris." and asked == ["Paris", "Paris"]
    assert isinstance(filled, Answer)
