"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="pip install 'gptdist[serve]'")
pytest.importorskip("playwright.sync_api", reason="pip install 'gptdist[test]'")

from playwright import sync_api

from gptdist.serve.app import PAGE_FILE, Served
from gptdist.serve.engine import Limits
from gptdist.serve.guard import Rules
from tests.serving import CONTEXT, running, tiny_served, wait_for

CHROMIUM = Path("/usr/bin/chromium")
SCRIPT = "<script>document.title='forged'</script><img src=x onerror=\"document.title='forged'\">"
expect = sync_api.expect
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def page(browser):
    """A page whose script may make no error, and that asks nobody but its own server."""
    context = browser.new_context(viewport={"width": 900, "height": 700}, color_scheme="light")
    context.set_default_timeout(60_000)
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: "Content Security" in message.text and faults.append(message.text))
    own = re.compile(r"http://127\.0\.0\.1:|data:")
    page.on("request", lambda request: own.match(request.url) or faults.append(request.url))
    yield page
    context.close()
    assert not faults


def says(server, text: str) -> None:
    """The model says this, and then goes on for ever with dots."""
    script = server.engine.tokenizer.encode(text)
    server.engine._choose = lambda row, logits, sampling: (
        script[len(row.tokens) - row.n_prompt] if len(row.tokens) - row.n_prompt < len(script) else ord("."))


def open_settings(page, **values) -> None:
    page.click("#show-settings")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.click("#show-settings")


def test_a_chat(page):
    """Streams, renders text as text, stops, regenerates, keeps to the settings, survives a restart of the server."""
    with running(tiny_served(), slow_s=0.02) as server:
        port = int(server.address.rpartition(":")[2])
        page.goto(server.address)
        expect(page.locator("#state")).to_contain_text("chat model, context 96")
        expect(page.locator("#say")).to_be_focused()
        says(server, "<b>ok</b>")
        open_settings(page, max_tokens=9, system="S", temperature=0)
        page.keyboard.press("Tab")
        page.fill("#say", SCRIPT[:20])
        page.press("#say", "Enter")
        answer = page.locator(".turn.assistant .said")
        expect(answer).to_have_text("<b>ok</b>")
        expect(page.locator(".turn.user .said")).to_have_text(SCRIPT[:20])
        assert page.locator(".turn b, .turn script, .turn img").count() == 0
        assert page.title() == "tiny"

        open_settings(page, max_tokens=500)
        page.click("#again")
        expect(answer).to_contain_text("ok</b>...")
        page.keyboard.press("Escape")
        expect(page.locator(".turn .note")).to_have_text("Stopped.")
        wait_for(lambda: not server.engine.rows)
        stopped = answer.text_content()
        assert len(stopped) < CONTEXT - 30
        open_settings(page, max_tokens=3)
        page.click("#again")
        expect(answer).to_have_text("<b>")
    page.fill("#say", "Hello?")
    page.press("#say", "Enter")
    expect(page.locator("#chat-error")).to_contain_text("The server cannot be reached")
    expect(page.locator("#state")).to_have_text("not connected")
    with running(tiny_served(), port=port) as server:
        says(server, "back")
        open_settings(page, max_tokens=4)
        page.click("#again")
        expect(page.locator(".turn.assistant .said").last).to_have_text("back")
        expect(page.locator("#chat-error")).to_be_hidden()
        page.reload()
        expect(page.locator(".turn")).to_have_count(4)  # a reload loses nothing
        page.click("#new")
        expect(page.locator(".turn")).to_have_count(0)


def test_markup_stays_text(page):
    with running(tiny_served(), limits=Limits()) as server:
        page.goto(server.address)
        expect(page.locator("#state")).to_contain_text("chat model")
        says(server, SCRIPT[:30])
        open_settings(page, max_tokens=30)
        page.fill("#say", "<img src=x onerror=alert(1)>")
        page.press("#say", "Enter")
        expect(page.locator(".turn.assistant .said")).to_have_text(SCRIPT[:30])
        page.click("#tab-complete")
        page.fill("#prompt", "x")
        page.click("#continue")
        expect(page.locator("#tokens")).to_have_text(SCRIPT[:30])
        assert page.locator("main script, main img").count() == 0
        assert page.title() == "tiny"


def test_errors_are_shown(page):
    with running(tiny_served()) as server:
        page.goto(server.address)
        expect(page.locator("#state")).to_contain_text("chat model")
        page.fill("#say", "x" * 200)
        page.press("#say", "Enter")
        expect(page.locator("#chat-error")).to_contain_text("the model's context is 96")
        page.fill("#say", "short")
        says(server, "yes")
        open_settings(page, max_tokens=3)
        page.press("#say", "Enter")
        expect(page.locator(".turn.assistant .said")).to_have_text("yes")
        expect(page.locator("#chat-error")).to_be_hidden()


def test_a_base_model_shows_what_it_believes(page):
    with running(tiny_served(template=None)) as server:
        page.goto(server.address)
        expect(page.locator("#state")).to_contain_text("base model")
        assert not page.is_visible("#tab-chat")
        open_settings(page, max_tokens=6, temperature=0)
        page.fill("#prompt", "Hello")
        page.press("#prompt", "Control+Enter")
        expect(page.locator(".token")).to_have_count(6)
        page.locator(".token").nth(2).click()
        expect(page.locator("#likely .value")).to_have_count(10)
        page.click("#next")
        expect(page.locator("#likely-title")).to_have_text("Next, the model expects:")
        values = [float(text.rstrip("%")) for text in page.locator("#likely .value").all_text_contents()]
        asked = server.post("/v1/completions", prompt="Hello", max_tokens=1, temperature=0, logprobs=10).json()
        top = asked["choices"][0]["logprobs"]["top_logprobs"][0]
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(100 * 2.718281828 ** max(top.values()), abs=0.06)


class Labels:
    """A classifier that likes everything."""

    labels = ("no", "yes")
    config = SimpleNamespace(model=SimpleNamespace(context=48))

    def lines(self, texts):
        for text in texts:
            yield {"text": text, "label": "yes", "probability": 0.75, "probabilities": {"no": 0.25, "yes": 0.75}}

    def truncated(self, texts):
        return len(texts[0]) > 48


def test_a_classifier_labels(page):
    with running(Served(name="likes", labeller=Labels())) as server:
        page.goto(server.address)
        expect(page.locator("#state")).to_contain_text("classifier")
        assert not page.is_visible("#tab-complete")
        page.fill("#text", "<b>x</b>" * 10)
        page.press("#text", "Control+Enter")
        expect(page.locator("#verdict")).to_contain_text("yes (from the beginning of the text")
        assert page.locator("#labels .name").all_text_contents() == ["yes", "no"]
        assert page.locator("#labels .value").all_text_contents() == ["75.0%", "25.0%"]


def test_a_key_is_asked_for(page):
    with running(tiny_served(), rules=Rules(api_key="s3cret")) as server:
        page.goto(server.address)
        expect(page.locator("#state")).to_have_text("needs an API key: see Settings")
        page.click("#show-settings")
        page.fill("#key", "s3cret")
        page.press("#key", "Enter")
        expect(page.locator("#state")).to_contain_text("chat model")


def test_it_fits_a_phone_and_the_dark(page):
    with running(tiny_served()) as server:
        page.set_viewport_size({"width": 360, "height": 640})
        page.goto(server.address)
        expect(page.locator("#state")).to_contain_text("chat model")
        says(server, "word " * 10)
        page.fill("#say", "w" * 40)
        page.press("#say", "Enter")
        expect(page.locator(".turn.assistant .said")).to_contain_text("word word")
        page.click("#show-settings")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_it_is_one_file():
    """Nothing is fetched but from the server itself."""
    text = PAGE_FILE.read_text()
    assert not re.findall(r"(?:src|href)=(?!\"data:,)\S+", text)
    assert "innerHTML" not in text
    assert "http://" not in text
