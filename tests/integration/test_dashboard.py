"""The live page in a real browser, with real services behind it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import aiohttp
import pytest
from PIL import Image

from tests.integration.fleet import Fleet, ServiceProcess, start_fleet
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
REPOSITORY = Path(__file__).parents[2]
PICTURE = REPOSITORY / "docs/pictures/shapes.png"
QUESTION = "How many shapes are there?"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)
T = TypeVar("T")


@pytest.fixture(scope="module")
def tiny_fleet() -> Iterator[Fleet]:
    with start_fleet(MODEL_FOLDER, transports=["shm"]) as fleet:
        yield fleet


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield chrome
    chrome.quit()


def url(worker: ServiceProcess, path: str = "") -> str:
    return f"http://{worker.addresses['http']}/dashboard{path}"


def until(browser: webdriver.Chrome, condition: Callable[[], T]) -> T:
    return WebDriverWait(browser, 30).until(lambda driver: condition())


def test_a_picture_is_asked_about_and_the_fleet_is_shown(tiny_fleet: Fleet, browser: webdriver.Chrome) -> None:
    worker = tiny_fleet.worker_processes["shm"]

    def text(selector: str) -> str:
        return browser.find_element(By.CSS_SELECTOR, selector).text

    browser.get(url(worker))
    until(browser, lambda: text("#ready") == "ready")
    assert text("#model") == MODEL_FOLDER.name
    row = text("#encoders tr")
    assert "ready" in row and "shm" in row
    assert text("#recent") == "None yet."

    browser.find_element(By.ID, "picture").send_keys(str(PICTURE))
    question = browser.find_element(By.ID, "question")
    question.clear()
    question.send_keys(QUESTION)
    browser.find_element(By.CSS_SELECTOR, "#ask button").click()
    until(browser, lambda: "first token" in text("#answer-note"))
    assert text("#answer").isdecimal()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#recent .request"))
    bars = browser.find_elements(By.CSS_SELECTOR, ".lanes .bar")
    shown = {(bar.get_attribute("class") or "").split("-")[-1] for bar in bars}
    assert shown == {"load", "preprocess", "queue", "forward", "ship", "land", "prefill", "decode"}
    assert "1 media" in text("#recent .what")

    screenshot = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
    colors = screenshot.convert("RGB").getcolors(screenshot.width * screenshot.height)
    assert colors is not None and len(colors) > 100, "the page is blank"
    assert browser.get_log("browser") == []


def test_an_error_is_shown_where_the_answer_would_be(
    tiny_fleet: Fleet, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    no_picture = tmp_path / "no.png"
    no_picture.write_bytes(b"no picture")
    browser.get(url(tiny_fleet.worker_processes["shm"]))
    until(browser, lambda: browser.find_element(By.ID, "ready").text == "ready")
    browser.find_element(By.ID, "picture").send_keys(str(no_picture))
    until(browser, lambda: browser.find_element(By.ID, "preview").is_displayed())
    browser.find_element(By.CSS_SELECTOR, "#ask button").click()
    answer = browser.find_element(By.ID, "answer")
    until(browser, lambda: answer.get_attribute("class") == "failed")
    assert "image" in answer.text


async def test_the_page_loads_nothing_from_elsewhere_and_can_be_turned_off(
    tiny_fleet: Fleet, small_fleet: Fleet
) -> None:
    worker = tiny_fleet.worker_processes["shm"]
    async with aiohttp.ClientSession() as session:
        for path in ("", "/dashboard.css", "/dashboard.js", "/data"):
            async with session.get(url(worker, path)) as answer:
                assert answer.status == 200
                assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
                assert "http://" not in await answer.text() and "https://" not in await answer.text()
        async with session.get(url(small_fleet.worker_processes["shm"])) as answer:
            assert answer.status == 404
