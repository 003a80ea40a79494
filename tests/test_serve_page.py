"""The page, in a real browser."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import KEY, LIMITS, Client, make_service, running

from mmrec.checkpoints.loading import LoadedModel
from mmrec.model.decode import Decoder
from mmrec.serve.authentication import Access

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


class Sheet:
    """The page of a server in a browser, unlocked, with what went wrong in it.

    Args:
        chromium: the browser.
        client: asks the same server.
    """

    def __init__(self, chromium: Any, client: Client) -> None:
        self.client, self.problems = client, list[str]()
        self.page = chromium.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(f"http://localhost:{client.port}/")
        self.page.fill("#key", KEY)
        self.page.click("text=Unlock")
        self.page.wait_for_selector("#locked", state="hidden")
        self.problems.clear()  # the first request, without the key, was refused

    def write(self, prompt: str, tokens: int, seed: int) -> str:
        """Write ``tokens`` characters after ``prompt``, and return them."""
        for field, value in (("prompt", prompt), ("seed", seed), ("tokens", tokens)):
            self.page.fill(f"#{field}", str(value))
        self.page.click("#write")
        until(self.page, f"document.querySelectorAll('#sheet .written').length === {tokens}")
        return str(
            self.page.eval_on_selector_all("#sheet .written", "found => found.map(s => s.textContent).join('')")
        )

    def asked(self, **options: Any) -> str:
        """Return what the server writes to another client that asks for it."""
        key = {"authorization": f"Bearer {KEY}"}
        answer = self.client.good("POST", "/v1/completions", {"temperature": 0.8, **options}, **key)
        return str(answer["choices"][0]["text"])

    def save(self, name: str) -> None:
        self.page.fill("#name", name)
        self.page.click("#save")
        until(self.page, f"document.getElementById('memory').value === '{name}'")
        self.until_kept()

    def until_kept(self) -> None:
        """Wait until a new memory is kept, and its name is free for another."""
        until(self.page, "document.getElementById('name').value === ''")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture
def sheet(chromium: Any, small_model: LoadedModel, memories: Path) -> Iterator[Sheet]:
    service = make_service(small_model, memories, replace(LIMITS, max_tokens=4096))
    with running(service, Access(KEY)) as client:
        sheet = Sheet(chromium, client)
        yield sheet
        sheet.page.close()
        assert sheet.problems == []


@pytest.mark.slow
def test_each_character_that_is_typed_has_a_colour_and_says_its_bits(sheet: Sheet) -> None:
    page = sheet.page
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


@pytest.mark.slow
def test_the_page_writes_what_the_server_writes_for_others(sheet: Sheet) -> None:
    written = sheet.write("to be or not", tokens=40, seed=1)
    assert written == sheet.asked(prompt="to be or not", max_tokens=40, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/lm", "/lm/", "/a/lm?x=1"])
def test_the_page_works_below_a_path(chromium: Any, small_model: LoadedModel, memories: Path, path: str) -> None:
    """A proxy has it at ``path``, with or without a slash at the end, and something else at the root."""
    prefix = path.partition("?")[0].rstrip("/")

    def pass_on(route: Any) -> None:
        address = route.request.url
        if prefix in address:
            route.continue_(url=address.replace(prefix, "", 1))
        else:
            route.fulfill(status=404, body="something else")

    with running(make_service(small_model, memories)) as client:
        page = chromium.new_page()
        page.route("**/*", pass_on)
        page.goto(f"http://localhost:{client.port}{path}")
        until(page, "document.getElementById('model').textContent === 'a'")
        page.fill("#prompt", "to be")
        until(page, "document.querySelectorAll('#sheet span').length === 5")
        page.close()


@pytest.mark.slow
def test_a_memory_is_kept_and_found_again_after_a_reload(sheet: Sheet, memories: Path, tmp_path: Path) -> None:
    page = sheet.page
    sheet.write("to be or not", tokens=40, seed=1)
    sheet.save("mine")
    assert "52 tokens read" in page.inner_text("#status")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "mine.mem")
    assert (tmp_path / "mine.mem").read_bytes() == (memories / "mine.mem").read_bytes()
    page.reload()
    page.wait_for_selector("#memory option[value=mine]", state="attached")
    page.select_option("#memory", "mine")
    sheet.write("", tokens=10, seed=2)
    assert page.text_content("#sheet") == sheet.asked(memory="mine", max_tokens=10, seed=2)


@pytest.mark.slow
def test_files_are_uploaded_read_and_deleted(sheet: Sheet, memories: Path, tmp_path: Path) -> None:
    page = sheet.page
    sheet.write("to be", tokens=5, seed=1)
    sheet.save("mine")
    (memories / "mine.mem").rename(tmp_path / "mine.mem")
    page.set_input_files("#memory-file", tmp_path / "mine.mem")
    sheet.until_kept()
    assert page.inner_text("#status").startswith("mine: ")
    (tmp_path / "a text.txt").write_text("to be or not to be\n" * 20)
    page.set_input_files("#text-file", tmp_path / "a text.txt")
    page.wait_for_selector("#memory option[value=a-text]", state="attached")
    page.click("#delete")
    page.wait_for_selector("#memory option[value=a-text]", state="detached")
    assert {path.name for path in memories.iterdir()} == {"mine.mem"}


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a step of the decoder slow: else all is written before anything else can happen."""
    step = Decoder.step

    def step_slowly(self: Decoder, tokens: Sequence[int]) -> torch.Tensor:
        time.sleep(0.005)
        return step(self, tokens)

    monkeypatch.setattr(Decoder, "step", step_slowly)


@pytest.mark.slow
def test_writing_is_stopped(sheet: Sheet, slow_steps: None) -> None:
    page = sheet.page
    page.fill("#tokens", "4096")
    page.click("#write")
    until(page, "document.getElementById('sheet').textContent.length > 20")
    page.click("#stop")
    page.wait_for_selector("#write:enabled")
    assert sheet.client.idle()


@pytest.mark.slow
def test_what_is_being_written_stays_where_a_list_of_memories_comes_late(sheet: Sheet, slow_steps: None) -> None:
    page, late = sheet.page, list[Any]()
    page.route("**/v1/memories", lambda route: late.append(route))
    page.reload()
    for _ in range(100):
        if late:
            break
        page.wait_for_timeout(20)
    page.fill("#tokens", "512")
    page.click("#write")
    until(page, "document.getElementById('sheet').textContent.length >= 1")
    late[0].continue_()
    until(page, "document.getElementById('memory').options.length === 1")
    until(page, "document.getElementById('sheet').textContent.length > 40")
    assert page.is_enabled("#stop")  # and so it was not painted anew after all was written
    page.click("#stop")
    page.wait_for_selector("#write:enabled")


@pytest.mark.slow
def test_a_character_that_the_model_does_not_know_is_named(sheet: Sheet) -> None:
    sheet.page.fill("#prompt", "to Ω")
    sheet.page.wait_for_selector("#status.bad")
    assert "'Ω'" in sheet.page.inner_text("#status")
    assert sheet.page.inner_text("#sheet") == "to Ω"
    sheet.problems.clear()  # the request was refused
