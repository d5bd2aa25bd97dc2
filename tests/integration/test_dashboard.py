"""The live page in a real browser, with real services behind it."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from PIL import Image

from tests.integration.fleet import Fleet, ServiceProcess, start_fleet
from tests.integration.media import clip
from tests.llm_worker.dashboard.browser import Page, chromium
from vitrine_vlm.llm_worker.dashboard import routes
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver

PICTURE = Path(__file__).parents[2] / "docs/pictures/shapes.png"
QUESTION = "How many shapes are there?"
STAGES = {"waiting", "load", "preprocess", "tower", "transport", "land", "prefill", "decode"}


@pytest.fixture(scope="module")
def tiny_fleet() -> Iterator[Fleet]:
    with start_fleet(MODEL_FOLDER, transports=["shm"]) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture
def page(tiny_fleet: Fleet, browser: webdriver.Chrome) -> Page:
    page = Page(browser, base_url(tiny_fleet.worker_processes["shm"]))
    page.resize(1280)
    page.until(lambda: page.text("#ready") == "ready")
    return page


def base_url(worker: ServiceProcess) -> str:
    return f"http://{worker.addresses['http']}"


def test_a_picture_is_asked_about_and_the_fleet_is_shown(page: Page) -> None:
    page.until(lambda: page.text("#model") == MODEL_FOLDER.name)
    row = page.text("#encoders tr")
    assert "ready" in row and "shm" in row
    assert "No request has finished yet" in page.text("#recent-card")

    page.choose(PICTURE)
    page.ask(QUESTION)
    assert "1 picture" in page.until_text("#answer-note", "token")
    page.until(lambda: page.all(".request"))
    assert page.text("#answer").isdecimal()
    shown = {(bar.get_attribute("class") or "").split("-")[-1] for bar in page.all(".lanes .bar") if bar.is_displayed()}
    assert shown == STAGES
    figures = dict(zip(page.text("#legend").split("\n")[::2], page.text("#legend").split("\n")[1::2], strict=True))
    assert figures.keys() == STAGES and all("ms" in figure for figure in figures.values())
    assert "1 item" in page.text(".request .what")

    screenshot = Image.open(io.BytesIO(page.chrome.get_screenshot_as_png()))
    colors = screenshot.convert("RGB").getcolors(screenshot.width * screenshot.height)
    assert colors is not None and len(colors) > 100, "the page is blank"
    assert page.errors() == []


def test_an_error_is_shown_until_a_video_is_answered(page: Page, tmp_path: Path) -> None:
    no_picture, video = tmp_path / "no.png", tmp_path / "clip.mp4"
    no_picture.write_bytes(b"no picture")
    video.write_bytes(clip(1, 128, 96, 8).data)
    page.choose(no_picture)
    page.ask(QUESTION)
    page.until_text("#problem", "image")
    page.one('[aria-label="Remove no.png"]').click()
    page.choose(video)
    page.ask(QUESTION)
    assert "1 video" in page.until_text("#answer-note", "token")
    assert not page.one("#problem").is_displayed()


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_everything_stays_inside_its_card(page: Page, width: int) -> None:
    page.ask("Hello")
    page.until(lambda: page.all(".request"))
    page.resize(width)
    page.until(lambda: len(page.all(".tick")) >= 3)
    outside = page.script(
        """
        return [...document.querySelectorAll("section *:not(.unseen, thead, thead *)")].filter((node) => {
          const card = node.closest("section").getBoundingClientRect();
          const { left, right, width, top, bottom } = node.getBoundingClientRect();
          return width && (left < card.left || right > card.right || top < card.top || bottom > card.bottom + 1);
        }).map((node) => node.outerHTML.slice(0, 80));
        """
    )
    assert outside == []
    assert page.script("return document.documentElement.scrollWidth") <= width
    cut = "return [...document.querySelectorAll('.what, .tick')].filter((node) => node.scrollWidth > node.clientWidth)"
    assert page.script(f"{cut}.map((node) => node.textContent)") == []


def test_the_keyboard_selects_requests_and_the_time_axis(page: Page) -> None:
    for question in ("Hello", "Hello again"):
        page.ask(question)
        page.until_text("#answer-note", "token")
    page.until(lambda: len(page.all(".request")) >= 2)
    last = page.all("#recent li")[-1]
    page.script("arguments[0].firstElementChild.focus()", last)
    page.until(lambda: last.get_attribute("class") == "selected")
    assert "waiting" in str(page.script("return arguments[0].textContent", last))
    before = page.one("#chart").get_attribute("data-scale")
    page.script("document.querySelector('#scale [value=first_token_ms]').click()")
    assert page.one("#scale :checked").get_attribute("value") == "first_token_ms"
    assert before and page.one("#chart").get_attribute("data-scale")


def test_requests_with_one_id_are_all_shown(tiny_fleet: Fleet, page: Page) -> None:
    url = f"{base_url(tiny_fleet.worker_processes['shm'])}/v1/chat/completions"
    body = {"model": MODEL_FOLDER.name, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"Content-Type": "application/json", "x-request-id": "one-id"}
    for _ in range(3):
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=30).close()

    def caption(number: int) -> str:
        page.script("document.querySelectorAll('.request')[arguments[0]]?.focus()", number)
        return page.text("#selected")

    page.until(lambda: len(page.all(".request")) >= 3 and all("one-id" in caption(number) for number in range(3)))


async def test_the_page_loads_nothing_from_elsewhere_and_can_be_turned_off(
    tiny_fleet: Fleet, small_fleet: Fleet
) -> None:
    base = base_url(tiny_fleet.worker_processes["shm"])
    scripts = [f"/{file.name}" for file in Path(routes.__file__).parent.glob("*.js")]
    assert len(scripts) > 1
    async with aiohttp.ClientSession() as session:
        for path in ("", "/dashboard.css", *scripts, "/data"):
            async with session.get(f"{base}/dashboard{path}") as answer:
                assert answer.status == 200
                assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
                assert "http://" not in await answer.text() and "https://" not in await answer.text()
        async with session.get(f"{base_url(small_fleet.worker_processes['shm'])}/dashboard") as answer:
            assert answer.status == 404
