"""The page for people, as a browser has it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from local_server import LocalAdapter, client_of, make_service

from litecache.serving.http_app import HttpApp
from litecache.serving.service import ModelService

needs_chromium = pytest.mark.skipif(chromium() is None, reason="needs chromium on the PATH")
READY = "document.getElementById('model')?.textContent === 'tiny'"


def test_the_page_needs_nothing_from_elsewhere_and_its_policy_says_so(
    service: ModelService,
) -> None:
    async def ask() -> tuple[str, str]:
        async with client_of(service) as client:
            answer = await client.get("/")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/html")
            return answer.text, answer.headers["content-security-policy"]

    text, policy = asyncio.run(ask())
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-", policy)) == 2
    assert not re.findall(r"https?://|src=|href=|innerHTML|style=|\son[a-z]+=", text)


@contextlib.contextmanager
def listening(service: ModelService) -> Iterator[str]:
    import uvicorn

    config = uvicorn.Config(HttpApp(service), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    while not server.started:
        assert running.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    running.join(30)


def say(browser: Browser, text: str) -> None:
    browser.value(f"document.getElementById('text').value = {text!r}")
    before = browser.value("document.querySelectorAll('article.assistant').length")
    browser.value("document.getElementById('form').requestSubmit()")
    browser.wait_for(f"document.querySelectorAll('article.assistant').length === {before + 1}")
    browser.wait_for("document.getElementById('send').textContent === 'Send'")


def notes(browser: Browser) -> list[str]:
    query = "[...document.querySelectorAll('article small')].map(each => each.textContent)"
    return list(browser.value(query))


@needs_chromium
@pytest.mark.slow
def test_a_chat_in_the_browser_shows_what_each_turn_reused(service: ModelService) -> None:
    with listening(service) as url, Browser(url) as browser:
        browser.wait_for(READY)
        browser.value("document.getElementById('most').value = 8")
        attack = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
        for text in (attack, "and now?", "and then?"):
            say(browser, text)
        first, second, third = notes(browser)
        assert "from GPU" not in first
        assert "computed" in first
        reused = [int(found) for n in (second, third) for found in re.findall(r"(\d+) from GPU", n)]
        assert reused[1] > reused[0] > len(attack)
        assert browser.value("document.querySelector('article.user p').textContent") == attack
        assert browser.value("document.querySelectorAll('article img, article script').length") == 0
        assert browser.value("document.title") == "LiteCache"
        total = browser.value("document.getElementById('totals').textContent")
        assert f"{sum(reused)} from GPU" in total
        browser.value("document.getElementById('fresh').click()")
        assert browser.value("document.querySelectorAll('article').length") == 0
        assert not browser.problems


@needs_chromium
@pytest.mark.slow
def test_an_answer_can_be_stopped_and_an_error_is_shown(
    adapter: LocalAdapter, service: ModelService
) -> None:
    with listening(service) as url, Browser(url) as browser:
        browser.wait_for(READY)
        browser.value("document.getElementById('most').value = 400")
        browser.value("document.getElementById('text').value = 'go on and on'")
        browser.value("document.getElementById('form').requestSubmit()")
        browser.wait_for("document.getElementById('send').textContent === 'Stop'")
        browser.value("document.getElementById('form').requestSubmit()")
        browser.wait_for("document.getElementById('send').textContent === 'Send'")
        adapter.check()
        assert "tokens/s" not in notes(browser)[0]
        say(browser, "far too long " * 100)
        error = browser.value("document.querySelector('article .error').textContent")
        assert "maximum context length is 512" in error


@needs_chromium
@pytest.mark.slow
def test_where_keys_are_needed_the_page_asks_for_one(adapter: LocalAdapter, tmp_path: Path) -> None:
    from litecache.serving.keys import ApiKeys

    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("alice-secret-0123456789 alice\n")
    service = make_service(adapter, ApiKeys.read(str(keys)))
    with listening(service) as url, Browser(url) as browser:
        browser.wait_for("document.getElementById('key-label')?.hidden === false")
        browser.value("document.getElementById('key').value = 'alice-secret-0123456789'")
        browser.value("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.wait_for(READY)
    service.stop_threads()
