"""The page, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import KEY, LIMITS, Client, make_service, running

from mmrec.checkpoints.checkpoint import LoadedModel

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def test_the_page_asks_nobody_else(client: Client) -> None:
    with client.open("GET", "/") as response:
        page, policy = response.read().decode(), response.getheader("content-security-policy", "")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", page)


@contextmanager
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript; the page's policy forbids playwright's own way."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"{condition}: {page.inner_text('body')}")


@pytest.mark.slow
def test_the_page_in_a_browser(small_model: LoadedModel, memories: Path, tmp_path: Path) -> None:
    service = make_service(small_model, memories, replace(LIMITS, max_tokens=4096))
    with running(service, KEY) as client, browser() as chromium:
        page = chromium.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"http://localhost:{client.port}/")
        page.fill("#key", KEY)
        page.click("text=Unlock")
        page.wait_for_selector("#locked", state="hidden")
        problems.clear()  # the first request, without the key, was refused

        # Typing: each character has a colour, and says its bits.
        page.fill("#prompt", "to be or not")
        until(page, "document.querySelectorAll('#sheet span').length === 12")
        assert page.inner_text("#sheet") == "to be or not"
        classes = page.eval_on_selector_all("#sheet span", "found => found.map(span => span.className)")
        assert classes[0] == ""
        assert all(re.fullmatch(r"s[0-6]", name) for name in classes[1:])
        assert len(set(classes)) > 2
        page.hover("#sheet span:nth-child(3)")
        assert re.fullmatch(r'" " \d+\.\d\d bits', page.inner_text("#tip"))
        assert "bits per byte" in page.inner_text("#figures")

        # Writing.
        page.fill("#tokens", "40")
        page.fill("#seed", "1")
        page.click("#write")
        until(page, "document.querySelectorAll('#sheet .written').length === 40")
        written = page.eval_on_selector_all("#sheet .written", "found => found.map(s => s.textContent).join('')")
        alone = Client(client.port)
        key = {"authorization": f"Bearer {KEY}"}
        asked = {"prompt": "to be or not", "max_tokens": 40, "temperature": 0.8, "seed": 1}
        answer = alone.good("POST", "/v1/completions", asked, **key)
        assert written == answer["choices"][0]["text"]

        # A memory of all that, found again after a reload.
        page.fill("#name", "mine")
        page.click("#save")
        until(page, "document.getElementById('memory').value === 'mine'")
        assert "52 tokens read" in page.inner_text("#status")
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "mine.mem")
        assert (tmp_path / "mine.mem").read_bytes() == (memories / "mine.mem").read_bytes()
        page.reload()
        page.wait_for_selector("#memory option[value=mine]", state="attached")
        page.select_option("#memory", "mine")
        page.fill("#prompt", "")
        page.fill("#seed", "2")
        page.fill("#tokens", "10")
        page.click("#write")
        until(page, "document.querySelectorAll('#sheet .written').length === 10")
        asked = {"memory": "mine", "max_tokens": 10, "temperature": 0.8, "seed": 2}
        answer = alone.good("POST", "/v1/completions", asked, **key)
        assert page.text_content("#sheet") == answer["choices"][0]["text"]

        # Stopping, a character that the model does not know, uploading, a text file, deleting.
        page.fill("#tokens", "4096")
        page.click("#write")
        until(page, "document.getElementById('sheet').textContent.length > 20")
        page.click("#stop")
        page.wait_for_selector("#write:enabled")
        assert client.idle()
        page.set_input_files("#memory-file", tmp_path / "mine.mem")
        until(page, "document.getElementById('status').textContent.startsWith('mine: ')")
        (tmp_path / "a text.txt").write_text("to be or not to be\n" * 20)
        page.set_input_files("#text-file", tmp_path / "a text.txt")
        page.wait_for_selector("#memory option[value=a-text]", state="attached")
        page.click("#delete")
        page.wait_for_selector("#memory option[value=a-text]", state="detached")
        assert {path.name for path in memories.iterdir()} == {"mine.mem"}
        assert problems == []
        page.fill("#prompt", "to Ω")
        page.wait_for_selector("#status.bad")
        assert "'Ω'" in page.inner_text("#status")
        assert page.inner_text("#sheet") == "to Ω"
