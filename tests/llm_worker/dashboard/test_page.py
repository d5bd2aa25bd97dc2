"""What the form of the live page sends, and what it says of a worker that fails or is away."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.media import clip, picture
from tests.llm_worker.dashboard.browser import Page, chromium
from tests.llm_worker.dashboard.peer import Answer, Peer, serving
from vitrine_vlm.service_runtime.port_limits import MAX_BODY_BYTES

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

_FILES = """
const files = new DataTransfer();
files.items.add(new File([Uint8Array.of(1, 2, 3)], arguments[0], { type: arguments[1] }));
"""
PASTE = _FILES + "dispatchEvent(new ClipboardEvent('paste', { clipboardData: files, cancelable: true }));"
DROP = _FILES + (
    "const event = new DragEvent('drop', { dataTransfer: files, cancelable: true, bubbles: true });"
    "return document.querySelector('header').dispatchEvent(event);"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def page(browser: webdriver.Chrome, peer: Peer) -> Iterator[Page]:
    with serving(peer) as base_url:
        yield Page(browser, base_url)
        browser.get("about:blank")  # ends its requests


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    files = {"one.png": picture(1, 64, 48), "two.png": picture(2, 48, 64), "clip.mp4": clip(3, 64, 48, 8)}
    for name, file in files.items():
        (folder / name).write_bytes(file.data)
    return {name: folder / name for name in files}


def content_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    [message] = body["messages"]
    content: list[dict[str, Any]] = message["content"]
    return content


def data_url(kind: str, file: Path) -> dict[str, str]:
    return {"url": f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"}


def test_enter_sends_and_text_only_is_said(page: Page, peer: Peer) -> None:
    assert page.text("#what-is-sent") == "Text only: no picture is sent"
    page.write("one")
    ActionChains(page.chrome).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.one("#question").send_keys("two", Keys.ENTER)
    note = page.until_text("#answer-note", "3 tokens")
    assert "text only" in note and "first token after" in note
    assert page.text("#answer") == "one\ntwo"
    assert [content_of(body) for body in peer.bodies] == [[{"type": "text", "text": "one\ntwo"}]]

    page.write("   ")
    page.one("#ask [type=submit]").click()
    assert page.until_text("#problem", "Write a question")
    assert len(peer.bodies) == 1
    assert page.errors() == []


def test_pictures_and_a_video_go_out_without_the_one_that_was_removed(
    page: Page, peer: Peer, media: dict[str, Path]
) -> None:
    page.choose(*media.values())
    page.until(lambda: len(page.all("#media li")) == 3)
    assert page.text("#what-is-sent") == "With 2 pictures and 1 video"
    page.one('[aria-label="Remove one.png"]').click()
    assert page.script("return document.activeElement.getAttribute('aria-label')") == "Remove two.png"
    page.ask("What?")
    assert "1 picture and 1 video" in page.until_text("#answer-note", "3 tokens")
    assert [content_of(body) for body in peer.bodies] == [
        [
            {"type": "image_url", "image_url": data_url("image/png", media["two.png"])},
            {"type": "video_url", "video_url": data_url("video/mp4", media["clip.mp4"])},
            {"type": "text", "text": "What?"},
        ]
    ]


def test_files_are_pasted_and_dropped_anywhere(page: Page) -> None:
    page.script(PASTE, "pasted.png", "image/png")
    assert page.script(DROP, "dropped.mp4", "video/mp4") is False, "the browser would open the file"
    assert page.text("#what-is-sent") == "With 1 picture and 1 video"
    assert not page.one("#problem").is_displayed()
    page.script(DROP, "notes.pdf", "application/pdf")
    assert page.text("#problem") == "notes.pdf is neither a picture nor a video."
    page.script(DROP, "unknown.mkv", "")
    assert page.text("#what-is-sent") == "With 1 picture and 2 videos"
    assert not page.one("#problem").is_displayed()


def test_a_file_that_no_request_can_hold_is_refused_before_it_is_read(page: Page, tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    with large.open("wb") as file:
        file.truncate(MAX_BODY_BYTES * 3 // 4 + 1)
    page.until_text("#ready", "loading the model")
    page.choose(large)
    assert "larger than the 268 MB" in page.until_text("#problem", "large.mp4")
    assert page.all("#media li") == []


@pytest.mark.parametrize(
    "answer, kept, problem",
    [
        ("breaks", "Hello", "broke before the answer was complete"),
        ("ends early", "Hello", "broke before the answer was complete"),
        ("error event", "Hello", "the lease expired"),
        ("from a proxy", "", "status 502"),
    ],
)
def test_a_failure_is_shown_until_the_next_answer(
    page: Page, peer: Peer, answer: Answer, kept: str, problem: str
) -> None:
    peer.answer = answer
    page.ask("Hello")
    page.until_text("#answer", kept)
    peer.is_shown.set()
    page.until_text("#problem", problem)
    assert page.text("#answer") == kept
    peer.answer = "whole"
    page.ask("Again")
    page.until_text("#answer-note", "3 tokens")
    assert page.text("#answer") == "Again"
    assert not page.one("#problem").is_displayed()


def test_an_answer_is_stopped(page: Page, peer: Peer) -> None:
    assert not page.one("#stop").is_displayed()
    peer.answer = "hangs"
    page.ask("Hello")
    page.until_text("#answer", "Hello")
    page.one("#question").send_keys(Keys.ENTER)  # one question at a time
    page.one("#stop").click()
    page.until_text("#answer-note", "stopped")
    assert peer.client_gone.wait(10)
    assert page.text("#answer") == "Hello"
    assert not page.one("#problem").is_displayed()
    assert page.script("return document.activeElement.id") == "question"
    assert len(peer.bodies) == 1


def test_what_comes_from_elsewhere_is_text(page: Page, peer: Peer) -> None:
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    peer.state = (False, markup)
    page.until_text("#ready", markup)
    page.script(PASTE, f"{markup}.png", "image/png")
    page.ask(markup)
    page.until_text("#answer-note", "3 tokens")
    assert page.text("#answer") == markup
    assert page.text("#media small") == f"{markup}.png"


def test_a_worker_that_does_not_answer_is_said_and_comes_back(page: Page, peer: Peer) -> None:
    page.until_text("#ready", "loading the model")
    peer.has_failed = True
    page.until_text("#ready", "the worker does not answer")
    peer.has_failed, peer.state = False, (True, "")
    page.until(lambda: page.text("#ready") == "ready")
