"""The live page in a real browser: chromium, headless, driven through chromedriver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

_CHROMIUM, _CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)
_TIMEOUT_S = 30.0
T = TypeVar("T")


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """Starts the browser; skips the test where there is none. profile: an empty folder."""
    if _CHROMIUM is None or _CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in (*_FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(_CHROMEDRIVER))
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """The page of one worker, freshly loaded."""

    def __init__(self, chrome: webdriver.Chrome, base_url: str) -> None:
        self.chrome = chrome
        chrome.get(f"{base_url}/dashboard")
        chrome.get_log("browser")  # what earlier pages have left

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What is visible of the element's text."""
        return self.one(selector).text

    def script(self, code: str, *arguments: object) -> Any:
        return self.chrome.execute_script(code, *arguments)

    def until(self, condition: Callable[[], T]) -> T:
        """Waits until the condition holds, and returns its value."""
        waiting = WebDriverWait(self.chrome, _TIMEOUT_S, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda driver: condition())

    def until_text(self, selector: str, part: str) -> str:
        """Waits until the element's text has the part, and returns the text."""
        self.until(lambda: part in self.text(selector))
        return self.text(selector)

    def choose(self, *files: Path) -> None:
        self.one("#files").send_keys("\n".join(map(str, files)))

    def write(self, question: str) -> None:
        self.one("#question").clear()
        self.one("#question").send_keys(question)

    def ask(self, question: str) -> None:
        """Writes the question and sends it by Enter."""
        self.write(question)
        self.one("#question").send_keys(Keys.ENTER)

    def resize(self, width: int, height: int = 900) -> None:
        """Sets the width of the page; a window cannot be as narrow as a telephone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def errors(self) -> list[str]:
        """The messages of the browser's console since the page was loaded: errors of scripts and of the policy."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]
