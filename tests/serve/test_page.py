"""The page in headless Chromium: against replies written here, and against the server with the demo model."""

import asyncio
import base64
import json
import re
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the page is served with the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="the page is served with the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="the page is tried with Playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the page is checked with axe")

from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, BrowserContext, Page, expect  # noqa: E402
from serving import served  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from mlx_gemma4.serve.page import page as document  # noqa: E402
from mlx_gemma4.serve.resident import Settings  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tried in Chromium, which is not installed")
PATIENCE = 120_000  # ms, on a machine that others use too
expect.set_options(timeout=PATIENCE)
SAMPLES = Path(__file__).parents[2] / "mlx_gemma4" / "demo" / "samples"

# --- servers ---------------------------------------------------------------------------------------------------------


WAIT: dict[str, Any] = {}


class Scripted:
    """Answers with the events that a test gives; at WAIT it goes on when the test says so."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.refusal: tuple[int, str] | None = None
        self.key = ""
        self.go = threading.Semaphore(0)
        self.left = threading.Event()  # a client went before the end

    def app(self) -> Starlette:
        async def index(_: Request) -> Response:
            body, headers = document()
            return Response(body, media_type="text/html", headers=headers)

        async def models(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "no such key"}}, 401)
            return JSONResponse({"data": [{"id": "scripted"}]})

        async def chat(request: Request) -> Response:
            self.bodies.append(await request.json())
            if self.refusal is not None:
                return JSONResponse({"error": {"message": self.refusal[1]}}, self.refusal[0])
            return StreamingResponse(self.stream(), media_type="text/event-stream")

        routes = [("/", index, "GET"), ("/v1/models", models, "GET"), ("/v1/chat/completions", chat, "POST")]
        return Starlette(routes=[Route(path, handler, methods=[method]) for path, handler, method in routes])

    async def stream(self) -> AsyncIterator[str]:
        try:
            for event in self.events:
                while event is WAIT and not self.go.acquire(blocking=False):
                    await asyncio.sleep(0.01)
                if event is not WAIT:
                    yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise

    def says(self, *texts: str, **more: Any) -> None:
        usage = {"prompt_tokens": 40, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 30}}
        self.events = [*(delta(content=text) for text in texts), delta("stop"), {"choices": [], "usage": usage}]
        self.refusal = None


def delta(reason: str | None = None, **content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": reason}]}


def serve(app: Any) -> Iterator[str]:
    """Its address, while it is used."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LD_PRELOAD", raising=False)  # MLX's BLAS is nothing to a browser
        with playwright.sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=CHROMIUM, args=arguments)
            yield browser
            browser.close()


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[tuple[Scripted, str]]:
    scripted = Scripted()
    for address in serve(scripted.app()):
        yield scripted, address


@pytest.fixture
def server(scripted_server: tuple[Scripted, str]) -> Scripted:
    scripted, _ = scripted_server
    scripted.__init__()  # type: ignore[misc]
    scripted.says("Hello.")
    return scripted


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1180, "height": 820}, permissions=["microphone"])
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: Scripted, scripted_server: tuple[Scripted, str]) -> Iterator[Page]:
    yield from opened(context, scripted_server[1])


def opened(context: BrowserContext, address: str) -> Iterator[Page]:
    """The page; whatever it says is wrong, and any request to elsewhere, fails the test."""
    faults: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: faults.append(request.url) if not is_own(request.url, address) else None)
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    yield page
    refused = "Failed to load resource: the server responded with a status of"  # what a refusal of ours looks like
    assert [fault for fault in faults if not fault.startswith(refused)] == []


def is_own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", f"blob:{address}"))


def say(page: Page, text: str) -> None:
    page.fill("#box", text)
    page.press("#box", "Enter")


def finished(page: Page, replies: int) -> None:
    expect(page.locator("article.assistant .acts")).to_have_count(replies)


def replies(page: Page) -> list[str]:
    return page.locator("article.assistant .said").all_inner_texts()


def drop(page: Page, name: str, kind: str, data: bytes) -> None:
    page.evaluate(
        """([name, type, data]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name, {type}));
            for (const event of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(event, {dataTransfer, bubbles: true, cancelable: true}));
        }""",
        [name, kind, base64.b64encode(data).decode()],
    )
    expect(page.locator("#pending .chip")).to_have_count(1)


def no_faults(page: Page) -> None:
    found = axe.Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()


@pytest.fixture(scope="module")
def demo_address() -> Iterator[str]:
    with served(Settings(model="demo")) as running:
        yield f"{running.url}/"


@pytest.fixture
def demo(context: BrowserContext, demo_address: str) -> Iterator[Page]:
    yield from opened(context, demo_address)


# --- with the demo model ---------------------------------------------------------------------------------------------


def test_a_picture_is_dropped_asked_about_twice_stopped_and_edited(demo: Page) -> None:
    expect(demo.locator("#model")).to_have_text("demo")
    demo.click("#set")
    demo.fill("[name=temperature]", "0")
    demo.select_option("[name=detail]", "70")
    demo.click("#settings .main")
    drop(demo, "shapes.png", "image/png", (SAMPLES / "shapes.png").read_bytes())
    say(demo, "How many shapes are there?")
    finished(demo, 1)
    (first,) = replies(demo)
    assert re.search(r"\d", first)
    say(demo, "Describe the picture.")
    finished(demo, 2)
    expect(demo.locator(".stats").last).to_contain_text("not read again")
    demo.press("#box", "ArrowUp")
    demo.fill(".edit textarea", "How many shapes are there?")
    demo.press(".edit textarea", "Enter")
    finished(demo, 2)
    expect(demo.locator("article.assistant .said").last).to_have_text(first)
    demo.reload()
    expect(demo.locator("article")).to_have_count(4)
    assert replies(demo)[0] == first
    demo.click("#new")  # behind a picture it tells no stories, and is done before it can be stopped
    demo.evaluate(  # at its first words, sooner than any click from here
        """() => new MutationObserver((changes, observer) => {
            if (!document.querySelector("article.assistant .said")?.textContent) return;
            observer.disconnect();
            document.querySelector("#stop").click();
        }).observe(document.querySelector("#thread"), {childList: true, subtree: true})"""
    )
    say(demo, "Tell me a story about a fox and a ball.")
    finished(demo, 1)
    expect(demo.locator(".state").last).to_have_text("Stopped")
    assert not replies(demo)[0].endswith("The end.")


def test_films_papers_and_sounds_are_answered_and_what_is_none_is_refused(demo: Page, tmp_path: Path) -> None:
    Image.open(SAMPLES / "shapes.png").convert("RGB").save(tmp_path / "paper.pdf")
    asked = {
        SAMPLES / "film.mp4": ("video/mp4", "Which way does it move?"),
        SAMPLES / "digit.mp3": ("audio/mpeg", "Which digit do you hear?"),
        tmp_path / "paper.pdf": ("application/pdf", "How many shapes are there?"),
    }
    for path, (kind, question) in asked.items():
        demo.click("#new")
        drop(demo, path.name, kind, path.read_bytes())
        say(demo, question)
        finished(demo, 1)
        assert replies(demo)[0]
    demo.click("#new")
    drop(demo, "wrong.png", "image/png", b"nonsense")
    demo.press("#box", "Enter")
    expect(demo.locator(".state.failed")).to_contain_text("is no image known here")


def test_thoughts_and_calls_of_the_demo_are_shown(demo: Page) -> None:
    weather = {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    demo.click("#set")
    demo.fill("[name=temperature]", "0")
    demo.fill("[name=tools]", json.dumps([{"type": "function", "function": weather}]))
    demo.click("#settings .main")
    demo.click("#think")
    say(demo, "What is the weather in Paris?")
    finished(demo, 1)
    expect(demo.locator(".call pre")).to_contain_text("Paris")
    expect(demo.locator("article.assistant details.thought")).to_be_visible()
    demo.fill(".call textarea", '{"temperature": 21, "condition": "sunny"}')
    demo.click(".call .main")
    finished(demo, 2)
    assert replies(demo)[-1]


# --- what is said ----------------------------------------------------------------------------------------------------


def test_a_reply_streams_and_its_figures_are_shown(page: Page, server: Scripted) -> None:
    server.says("Two ", "words.")
    say(page, "Say two words")
    finished(page, 1)
    assert replies(page) == ["Two words."]
    expect(page.locator(".stats")).to_contain_text("30 of 40 not read again")
    body = server.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "Say two words"}]
    assert body["stream_options"] == {"include_usage": True}
    say(page, "More")
    finished(page, 2)
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_waiting_reading_thinking_and_writing_are_told_apart(page: Page, server: Scripted) -> None:
    state = page.locator("article.assistant .state")
    progress = {"total": 8000, "cache": 2000, "processed": 4000}
    server.events = [
        WAIT, {"choices": [], "prompt_progress": progress}, WAIT, delta(reasoning_content="Hm. "), WAIT,
        delta(content="So "), WAIT, delta(content="it is."), delta("stop"),
    ]  # fmt: skip
    say(page, "Is it?")
    expect(state).to_have_text("Waiting")
    server.go.release()
    expect(state).to_contain_text("Reading: 4,000 of 8,000 tokens")
    server.go.release()
    expect(state).to_have_text("Thinking")
    server.go.release()
    expect(page.locator("article.assistant .said")).to_have_text("So")
    expect(state).to_be_hidden()
    server.go.release()
    finished(page, 1)
    thought = page.locator("article.assistant details.thought")
    assert thought.get_attribute("open") is None
    thought.locator("summary").click()
    expect(thought.locator(".flow")).to_have_text("Hm.")


def test_stopping_ends_the_request_and_keeps_what_was_written(page: Page, server: Scripted) -> None:
    server.events = [delta(content="Once "), delta(content="upon "), WAIT, delta(content="never")]
    say(page, "A story")
    expect(page.locator("article.assistant .said")).to_have_text("Once upon")
    page.press("#box", "Escape")
    finished(page, 1)
    expect(page.locator("article.assistant .state")).to_have_text("Stopped")
    assert server.left.wait(5)
    page.reload()
    expect(page.locator("article.assistant .said")).to_have_text("Once upon")


def test_an_error_is_shown_and_can_be_tried_again(page: Page, server: Scripted) -> None:
    server.refusal = (400, "prompt is too long: 9 tokens > 8 maximum")
    say(page, "Hello")
    expect(page.locator("article.assistant .state")).to_have_text("prompt is too long: 9 tokens > 8 maximum")
    server.events, server.refusal = [delta(content="Well"), {"error": {"message": "out of memory"}}], None
    page.click("[aria-label='Try again']")
    expect(page.locator("article.assistant .state")).to_have_text("out of memory")
    assert replies(page) == ["Well"]
    server.says("Now.")
    page.click("[aria-label='Try again']")
    expect(page.locator("article.assistant .said")).to_have_text("Now.")
    expect(page.locator("article.assistant .tools")).to_contain_text("3 / 3")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_an_edit_and_a_second_try_leave_the_versions_before(page: Page, server: Scripted) -> None:
    say(page, "What is a mutex?")
    finished(page, 1)
    page.press("#box", "ArrowUp")
    page.fill(".edit textarea", "What is a semaphore?")
    server.says("It counts.")
    page.press(".edit textarea", "Enter")
    expect(page.locator("article.assistant .said")).to_have_text("It counts.")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "What is a semaphore?"}]
    page.hover("article.user")
    page.click("article.user [aria-label='The version before']")
    expect(page.locator("article.assistant .said")).to_have_text("Hello.")
    page.reload()
    expect(page.locator("article.user .said")).to_have_text("What is a mutex?")


def test_a_fork_goes_its_own_way(page: Page, server: Scripted) -> None:
    say(page, "One")
    finished(page, 1)
    say(page, "Two")
    finished(page, 2)
    page.locator("article.assistant").first.hover()
    page.locator("article.assistant [aria-label='Fork from here']").first.click()
    expect(page.locator("article")).to_have_count(2)
    say(page, "Three")
    finished(page, 2)
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["One", "Hello.", "Three"]
    expect(page.locator("#list button")).to_have_count(2)
    page.locator("#list button", has_text="One").last.click()
    expect(page.locator("article.user .said").last).to_have_text("Two")


def test_a_call_is_shown_and_its_result_is_given_back(page: Page, server: Scripted) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    page.click("#set")
    page.fill("[name=tools]", json.dumps([tool]))
    page.click("#settings .main")
    begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    parts = [{"index": 0, "function": {"arguments": text}} for text in ('{"city": ', '"Rome"}')]
    server.events = [
        delta(reasoning_content="Rome."), *(delta(tool_calls=[part]) for part in (begun, *parts)), delta("tool_calls"),
    ]  # fmt: skip
    say(page, "Weather in Rome?")
    expect(page.locator(".call pre")).to_have_text('{\n  "city": "Rome"\n}')
    server.says("Sunny.")
    page.fill(".call textarea", "21 degrees")
    page.click(".call .main")
    expect(page.locator("article.assistant .said").last).to_have_text("Sunny.")
    assert server.bodies[-1]["tools"] == [tool]
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    assert server.bodies[-1]["messages"][1:] == [
        {"role": "assistant", "content": None, "reasoning_content": "Rome.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
    ]
    assert page.locator(".call textarea").count() == 0


def test_settings_reach_the_server(page: Page, server: Scripted) -> None:
    page.click("#set")
    given = {"system": "Be brief.", "temperature": "0.3", "longest": "50", "budget": "200"}
    for name, value in given.items():
        page.fill(f"[name={name}]", value)
    for name, value in {"thinking": "on", "drafts": "0", "detail": "70"}.items():
        page.select_option(f"[name={name}]", value)
    page.click("#settings .main")
    page.reload()
    say(page, "Hello")
    finished(page, 1)
    body = server.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["draft_length"], body["image_budget"]) == (0.3, 50, 0, 70)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 200}


def test_the_key_is_asked_for_where_the_server_wants_one(context: BrowserContext, scripted_server: Any) -> None:
    scripted, address = scripted_server
    scripted.__init__()
    scripted.key = "secret"
    page = context.new_page()
    page.goto(address)
    page.fill("#question input", "wrong")
    page.press("#question input", "Enter")
    expect(page.locator("#question-text")).to_contain_text("Another one?")
    page.fill("#question input", "secret")
    page.press("#question input", "Enter")
    expect(page.locator("#model")).to_have_text("scripted")


def test_enter_of_an_input_method_sends_nothing(page: Page, server: Scripted) -> None:
    page.fill("#box", "かんじ")
    composing = (
        "(box) => box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    page.eval_on_selector("#box", composing)
    page.press("#box", "Shift+Enter")
    assert page.input_value("#box") == "かんじ\n"
    assert server.bodies == []
    page.press("#box", "Enter")
    finished(page, 1)
    assert server.bodies[0]["messages"][0]["content"] == "かんじ"


# --- what a reply may hold -------------------------------------------------------------------------------------------

ATTACKS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))", "[a](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)", "[a](vbscript:x)",
    "<javascript:alert(1)>", "![a](https://example.com/pixel.png)", '[a](https://x "\\" onmouseover=\\"alert(1)")',
    "```\"><script>alert(1)</script>\n</code></pre><script>alert(1)</script>\n```", "`<script>alert(1)</script>`",
    "$\\href{javascript:alert(1)}{x}$", "$\\text{<img src=x onerror=alert(1)>}$", "$$<script>alert(1)</script>$$",
    "$\\class{a\" onload=\"alert(1)}{x}$", "$\\includegraphics{https://example.com/x.png}$",
    "$\\style{background:url(https://example.com/x)}{y}$", "$\\url{javascript:alert(1)}$",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>", "<math><mtext><style><img src=x onerror=alert(1)>",
    "|<script>alert(1)</script>|b|\n|-|-|\n|<img src=x onerror=alert(1)>|c|", "[a]: javascript:alert(1)\n\n[a]",
    "<a href='javascript:alert(1)'>x</a>", "<form action=javascript:alert(1)><button>x</button></form>",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "# <script>alert(1)</script>", "$\\gdef\\a{\\a\\a}\\a$",
]  # fmt: skip


def test_no_message_runs_a_script_or_loads_anything(page: Page, server: Scripted) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    text = "\n\n".join(ATTACKS)
    server.events = [
        delta(reasoning_content=text),
        *(delta(content=text[at : at + 9]) for at in range(0, len(text), 9)),
    ]
    server.events.append(delta("stop"))
    say(page, text)
    finished(page, 1)
    page.click("article.assistant details.thought summary")
    assert (
        page.locator(".flow").locator("script, img, iframe, form, style, object, embed, base, meta, link").count() == 0
    )
    handlers = "(nodes) => nodes.flatMap((node) => node.getAttributeNames()).filter((name) => name.startsWith('on'))"
    assert page.eval_on_selector_all(".flow *", handlers) == []
    links = page.eval_on_selector_all(".flow a", "(links) => links.map((link) => link.protocol)")
    assert set(links) <= {"https:", "http:"}
    for link in page.locator(".flow a").all():
        assert link.get_attribute("rel") == "noopener noreferrer"
    assert dialogs == []


def test_the_policy_itself_stops_a_script_that_got_in(context: BrowserContext, scripted_server: Any) -> None:
    page = context.new_page()
    page.goto(scripted_server[1])
    ran = page.evaluate(
        """async () => {
            for (const make of [
                () => { document.body.innerHTML = "<img src=x onerror='window.ran = 1'>"; },
                () => {
                    const script = document.createElement("script");
                    script.text = "window.ran = 2";
                    document.body.append(script);
                },
                () => document.body.setAttribute("onclick", "window.ran = 3"),
            ]) try { make(); } catch { /* refused by type */ }
            document.body.click();
            await new Promise((done) => setTimeout(done, 200));
            return window.ran ?? null;
        }"""
    )
    assert ran is None


FORMULAS = {
    "It costs $0.60.": [],
    "From $0.60 to $0.80 a page": [],
    "$5/$6, or $5-$10, or $0.60–$0.80": [],
    "I paid $20 in cash, he paid 20$.": [],
    "US$5 and US$6; $HOME and $PATH; a$b$c": [],
    "It is \\$x\\$ and `$y$`": [],
    "So $x$ is $5$ and $\\alpha_1 = 2$.": ["x", "5", "\\alpha_1 = 2"],
    "Behind \\(a + b\\) comes\n\n\\[\\frac{a}{b}\\]": ["a + b", "\\frac{a}{b}"],
    "$$\nE = mc^2\n$$": ["E = mc^2"],
    "- a list with\n  $$x^2$$\n- and $y$": ["x^2", "y"],
    "$2x + 3$ and ($z$)": ["2x + 3", "z"],
}


@pytest.mark.parametrize("text", FORMULAS)
def test_prices_are_no_formulas_and_formulas_are(page: Page, server: Scripted, text: str) -> None:
    server.says(text)
    say(page, "?")
    finished(page, 1)
    sources = page.locator(".flow math annotation").all_text_contents()
    assert [source.strip() for source in sources] == FORMULAS[text]


def test_markdown_has_tables_lists_headings_and_code_that_can_be_copied(page: Page, server: Scripted) -> None:
    server.says("# A\n\n### B\n\n|a|b|\n|-|-:|\n|1|2|\n\n1. one\n2. two\n\n```python\nx = '<b>'\n```\n")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "?")
    finished(page, 1)
    said = page.locator("article.assistant .said")
    assert said.locator("td").all_inner_texts() == ["1", "2"]
    assert said.locator("ol li").all_inner_texts() == ["one", "two"]
    levels = said.locator("[role=heading]").evaluate_all("(all) => all.map((node) => node.ariaLevel)")
    assert levels == ["2", "3"]  # none left out, below the page's own
    said.locator("[data-copy]").click()
    expect(said.locator("[data-copy]")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "x = '<b>'\n"


def test_what_has_been_written_stays_while_the_rest_grows(page: Page, server: Scripted) -> None:
    server.events = [delta(content="First.\n\n"), delta(content="Se"), WAIT, delta(content="cond.\n\n"), delta("stop")]
    say(page, "?")
    page.locator(".said p").nth(1).wait_for()
    page.evaluate("window.first = document.querySelector('article.assistant .said p')")
    server.go.release()
    finished(page, 1)
    assert replies(page) == ["First.\n\nSecond."]
    assert page.evaluate("window.first === document.querySelector('article.assistant .said p')")


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_sent_as_the_protocol_has_them(page: Page, server: Scripted) -> None:
    samples = {"shapes.png": "image/png", "beeps.wav": "audio/wav", "film.mp4": "video/mp4"}
    files = [(name, kind, (SAMPLES / name).read_bytes()) for name, kind in samples.items()]
    files += [("paper.pdf", "application/pdf", b"%PDF-1.4"), ("notes.md", "", "äöü".encode())]
    for number, file in enumerate(files, 1):
        drop(page, *file)
        page.press("#box", "Enter")
        finished(page, number)
    parts = [message["content"][0] for message in server.bodies[-1]["messages"] if message["role"] == "user"]
    assert [part["type"] for part in parts] == ["image_url", "input_audio", "video_url", "file", "text"]
    picture = base64.b64encode((SAMPLES / "shapes.png").read_bytes()).decode()
    assert parts[0]["image_url"]["url"] == f"data:image/png;base64,{picture}"
    assert parts[1]["input_audio"]["format"] == "wav"
    assert parts[3]["file"] == {"filename": "paper.pdf", "file_data": "data:application/pdf;base64,JVBERi0xLjQ="}
    assert parts[4]["text"] == "notes.md:\n\näöü"
    page.reload()
    expect(page.locator("article img, article audio, article video")).to_have_count(3)
    assert page.eval_on_selector("article img", "(image) => image.decode().then(() => image.naturalWidth)") > 0


def test_what_is_no_known_file_is_refused_and_a_paste_is_taken(page: Page) -> None:
    page.evaluate(
        """() => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array([0, 1, 2])], "a.bin"));
            clipboardData.items.add(new File(["text"], "a.txt", {type: "text/plain"}));
            const event = new ClipboardEvent("paste", {clipboardData, bubbles: true, cancelable: true});
            document.querySelector("#box").dispatchEvent(event);
        }"""
    )
    expect(page.locator("#pending .chip")).to_have_text("a.txt")
    expect(page.locator("#notice")).to_contain_text("a.bin is neither")
    page.click("[aria-label='Remove a.txt']")
    expect(page.locator("#pending .chip")).to_have_count(0)


def test_a_recording_is_sent_as_16_khz_wav(page: Page, server: Scripted) -> None:
    page.click("#record")
    expect(page.locator("#record span")).to_have_text("1 s")
    page.click("#record")
    expect(page.locator("#pending .chip")).to_contain_text("recording")
    page.press("#box", "Enter")
    finished(page, 1)
    audio = server.bodies[0]["messages"][0]["content"][0]["input_audio"]
    data = base64.b64decode(audio["data"])
    assert audio["format"] == "wav"
    assert (data[:4], data[8:16], int.from_bytes(data[24:28], "little")) == (b"RIFF", b"WAVEfmt ", 16000)
    assert int.from_bytes(data[40:44], "little") == len(data) - 44 > 16000
    page.click("#record")
    expect(page.locator("#record")).to_have_class("round on")
    page.keyboard.press("Escape")
    expect(page.locator("#record")).to_have_class("round")
    expect(page.locator("#pending .chip")).to_have_count(0)


def test_a_film_that_the_browser_cannot_keep_costs_no_message(page: Page, server: Scripted) -> None:
    say(page, "Before")
    finished(page, 1)
    page.evaluate(
        """() => {
            const put = IDBObjectStore.prototype.put;
            IDBObjectStore.prototype.put = function (value) {
                if (this.name === "media") throw new DOMException("full", "QuotaExceededError");
                return put.call(this, value);
            };
        }"""
    )
    drop(page, "film.mp4", "video/mp4", (SAMPLES / "film.mp4").read_bytes())
    say(page, "What moves?")
    expect(page.locator("#notice")).to_contain_text("film.mp4 is too large to be kept")
    finished(page, 2)
    assert server.bodies[-1]["messages"][-1]["content"][0]["type"] == "video_url"
    page.reload()
    expect(page.locator("article.user .said").first).to_have_text("Before")
    expect(page.locator("article.user").last).to_contain_text("no longer here")


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_conversations_are_found_renamed_and_deleted(page: Page, server: Scripted) -> None:
    for text, answer in (("About the sea", "Salt and waves."), ("About the hills", "Grass and wind.")):
        server.says(answer)
        page.click("#new")
        say(page, text)
        finished(page, 1)
    page.keyboard.press("Control+k")
    page.keyboard.type("WAVES")
    expect(page.locator("#list button")).to_have_count(1)
    expect(page.locator("#list .found")).to_have_text("Salt and waves.")
    page.click("#list button")
    expect(page.locator("article.found")).to_contain_text("Salt and waves.")
    page.fill("#title", "The sea")
    page.press("#title", "Enter")
    page.fill("#search", "")
    expect(page.locator("#list button").first).to_have_text("The sea")
    page.click("#more")
    page.click("#delete")
    page.click("#question .main")
    expect(page.locator("#list button")).to_have_text(["About the hills"])
    kept = """async () => {
        const open = indexedDB.open("mlx_gemma4");
        await new Promise((done) => (open.onsuccess = done));
        const request = open.result.transaction("messages").objectStore("messages").count();
        return new Promise((done) => (request.onsuccess = () => done(request.result)));
    }"""
    assert page.evaluate(kept) == 2


def test_an_export_comes_back_as_it_was(page: Page, server: Scripted, tmp_path: Path) -> None:
    drop(page, "shapes.png", "image/png", (SAMPLES / "shapes.png").read_bytes())
    say(page, "What is this?")
    finished(page, 1)
    page.click("#more")
    with page.expect_download() as markdown:
        page.click("#as-markdown")
    text = Path(markdown.value.path()).read_text()
    assert text == "# What is this?\n\n**You**\n\n[shapes.png]\n\nWhat is this?\n\n**Gemma**\n\nHello.\n"
    page.click("#set")
    with page.expect_download() as download:
        page.click("#export-all")
    file = tmp_path / "all.json"
    download.value.save_as(file)
    page.click("#delete-all")
    page.click("#question .main")
    expect(page.locator("#list button")).to_have_count(0)
    page.set_input_files("#import-file", file)
    page.click("#list button")
    expect(page.locator("article img")).to_have_count(1)
    assert replies(page) == ["Hello."]


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", '{"format": "other"}', '{"format": "mlx_gemma4 conversations", "conversations": [{"title": 1}]}',
     '{"format": "mlx_gemma4 conversations", "conversations": [{"messages": [{"role": "root"}]}]}',
     '{"format": "mlx_gemma4 conversations", "conversations": [{"messages": [null]}], "media": {"a": {}}}'],
)  # fmt: skip
def test_a_file_that_is_no_export_changes_nothing(page: Page, tmp_path: Path, text: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(text)
    page.set_input_files("#import-file", file)
    expect(page.locator("#notice")).to_contain_text("wrong.json cannot be read")
    expect(page.locator("#list button")).to_have_count(0)


def test_an_imported_message_is_text_whatever_it_holds(page: Page, tmp_path: Path) -> None:
    message = {"id": "a", "role": "assistant", "text": "\n\n".join(ATTACKS), "parent": "a", "thinking": 5, "calls": [1]}
    exported = {"format": "mlx_gemma4 conversations", "conversations": [{"title": "<b>t</b>", "messages": [message]}]}
    file = tmp_path / "attack.json"
    file.write_text(json.dumps(exported))
    page.set_input_files("#import-file", file)
    page.click("#list button")
    expect(page.locator("#title")).to_have_value("<b>t</b>")
    assert page.locator(".flow").locator("script, img, iframe, form").count() == 0


def history(messages: int) -> dict[str, Any]:
    text = "## Part\n\nSome **words**, $x^{}$ and `code`.\n\n| a | b |\n|-|-|\n| 1 | 2 |\n\n```python\nprint({})\n```\n"
    made = [
        {"id": str(at), "parent": str(at - 1), "at": at, "role": "assistant" if at % 2 else "user",
         "text": text.format(at, at)} for at in range(messages)
    ]  # fmt: skip
    talk = {"title": "Long", "updated": 1, "leaf": str(messages - 1), "messages": made}
    return {"format": "mlx_gemma4 conversations", "version": 1, "conversations": [talk], "media": {}}


def test_500_messages_are_shown_in_slices_and_grow_at_their_end(page: Page, server: Scripted, tmp_path: Path) -> None:
    file = tmp_path / "long.json"
    file.write_text(json.dumps(history(500)))
    page.set_input_files("#import-file", file)
    page.evaluate(
        """() => {
            window.filled = [];
            const isArticle = (change) => change.target.nodeName === "ARTICLE";
            new MutationObserver((changes) => window.filled.push(changes.filter(isArticle).length))
                .observe(document.querySelector("#thread"), {childList: true, subtree: true});
        }"""
    )
    page.click("#list button")
    expect(page.locator("article")).to_have_count(500)
    expect(page.locator("article").last).to_be_in_viewport()
    expect(page.locator("article:empty")).to_have_count(0)
    filled = page.evaluate("window.filled")
    assert max(filled) < 100 and next(count for count in filled if count) <= 5  # never all at once, and few at first
    server.says(*(f"word{at} " for at in range(100)))
    page.evaluate(
        """() => {
            window.touched = new Set();
            new MutationObserver((changes) => changes.forEach((change) => {
                const node = change.target.nodeType === 1 ? change.target : change.target.parentElement;
                window.touched.add(node?.closest("article"));
            })).observe(document.querySelector("#thread"), {childList: true, subtree: true, characterData: true});
        }"""
    )
    say(page, "Go on")
    finished(page, 251)
    assert page.evaluate("window.touched.size") <= 6  # what is old is left alone
    expect(page.locator("#down")).to_be_hidden()  # at the end still
    page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    expect(page.locator("article").first).to_be_in_viewport()
    expect(page.locator("#down")).to_be_visible()


# --- how it is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "width"), [("light", 1180), ("dark", 375)])
def test_axe_finds_no_fault(page: Page, server: Scripted, scheme: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    no_faults(page)
    call = {"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    text = "# A\n\n## B\n\n[link](https://example.com) and `code`, $x^2$\n\n> quote\n\n|a|b|\n|-|-|\n|1|2|\n\n"
    server.events = [
        delta(reasoning_content="Hm"), delta(content=text + "```python\n" + "x" * 300 + "\n```\n"),
        delta(tool_calls=[call]), delta("stop"),
        {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 9}},
    ]  # fmt: skip
    drop(page, "film.mp4", "video/mp4", (SAMPLES / "film.mp4").read_bytes())
    say(page, "Look")
    finished(page, 1)
    page.click("article.assistant details.thought summary")
    server.refusal = (500, "It failed.")
    page.click("[aria-label='Try again']")
    expect(page.locator(".state.failed")).to_be_visible()
    no_faults(page)
    page.hover("article.assistant")
    page.click("article.assistant [aria-label='The version before']")
    no_faults(page)
    if width < 500:
        page.click("#open")
        no_faults(page)
    page.click("#set")
    no_faults(page)
    page.click("#delete-all")
    no_faults(page)


def test_a_phone_shows_all_within_its_width(page: Page, server: Scripted) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    server.says(
        "|a|b|\n|-|-|\n|" + "wide" * 60 + "|c|\n\n```\n" + "x" * 400 + "\n```\n\n$$" + "a+" * 80 + "b$$\n\n" + "y" * 300
    )
    say(page, "z" * 200)
    finished(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.querySelector('#scroll').scrollWidth <= 360")
    expect(page.locator("#send")).to_be_in_viewport()
    expect(page.locator("#search")).not_to_be_visible()
    page.click("#open")
    expect(page.locator("#list button")).to_be_in_viewport()
    page.mouse.click(350, 300)
    expect(page.locator("#list button")).to_be_hidden()


def test_light_and_dark_follow_the_system_and_can_be_chosen(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert light != dark
    page.click("#set")
    page.select_option("[name=theme]", "light")
    assert page.evaluate(paper) == light
    page.reload()
    assert page.evaluate(paper) == light


def test_a_second_tab_sees_what_the_first_wrote(page: Page, context: BrowserContext, server: Scripted) -> None:
    say(page, "Hello")
    finished(page, 1)
    other = context.new_page()
    other.goto(page.url)
    expect(other.locator("article")).to_have_count(2)
    say(page, "Again")
    finished(page, 2)
    expect(other.locator("article")).to_have_count(4)
    expect(other.locator("article.assistant .said").last).to_have_text("Hello.")
