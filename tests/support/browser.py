"""A headless Chromium through its driver's own HTTP protocol (W3C WebDriver); needs Debian's chromium-driver only."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which the protocol names an element."""

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Browser:
    """One window."""

    def __init__(self, address: str):
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        wanted = {
            "goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = _call(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address = f"{address}/session/{session['sessionId']}"

    def open(self, url: str) -> None:
        _call(f"{self.address}/url", {"url": url})

    def click(self, selector: str) -> None:
        """A real click into the middle of the only element that matches, scrolled into view."""
        (found,) = _call(f"{self.address}/elements", {"using": "css selector", "value": selector})
        _call(f"{self.address}/element/{found[ELEMENT]}/click", {})

    def type(self, selector: str, text: str) -> None:
        (found,) = _call(f"{self.address}/elements", {"using": "css selector", "value": selector})
        _call(f"{self.address}/element/{found[ELEMENT]}/value", {"text": text})

    def ask(self, script: str) -> Any:
        """What a function body returns in the page."""
        return _call(f"{self.address}/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Everything that the page, or the browser about it, has written to the console."""
        return [entry["message"] for entry in _call(f"{self.address}/se/log", {"type": "browser"})]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        started = next(line for line in driver.stdout if "started successfully on port" in line)
        window = Browser(f"http://127.0.0.1:{started.split()[-1].rstrip('.')}")
        try:
            yield window
        finally:
            _call(window.address, None, method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _call(url: str, body: Any, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
        return json.load(reply)["value"]
