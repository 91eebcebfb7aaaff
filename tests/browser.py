"""A page as a browser sees it: headless Chromium through the DevTools protocol over a pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 30
MOST_TABS = 300
# What has the focus; nothing when it has left the page.
FOCUSED = """(() => {
  const node = document.activeElement;
  return node === document.body ? null : node.getAttribute("aria-label") || node.innerText;
})()"""
# Every picture and every box that scrolls, as laid out.
LAYOUT = """(() => {
  const of = (query) => [...document.querySelectorAll(query)].map((node) => {
    const box = node.getBoundingClientRect();
    return {label: node.getAttribute("aria-label") || node.alt || node.tagName, width: box.width, height: box.height};
  });
  return {
    window: innerWidth, page: document.scrollingElement.scrollWidth, pictures: of("svg, img, canvas"),
    text: document.body.innerText, colour: getComputedStyle(document.body).backgroundColor,
  };
})()"""


@dataclass(frozen=True)
class Seen:
    """What opening a page showed."""

    errors: list[str]
    """Console errors, failed loads and uncaught exceptions."""
    requests: list[str]
    """Addresses asked for, without data:, which is in the page itself."""
    layout: dict[str, Any]


def browser_path() -> str:
    """The program; a test without one is skipped."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on PATH")
    return found


class Browser:
    """One Chromium; a context manager."""

    def __enter__(self) -> "Browser":
        path = browser_path()
        self.profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        # The browser reads commands from 3 and answers on 4. High numbers first, so that neither is in the way.
        ends = [end for pipe in (os.pipe(), os.pipe()) for end in pipe]
        commands, self.write, self.read, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
                 "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}")  # fmt: skip
        actions = [
            (os.POSIX_SPAWN_DUP2, commands, 3), (os.POSIX_SPAWN_DUP2, answers, 4),
            *((os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1, 2)),
        ]  # fmt: skip
        self.process = os.posix_spawn(path, [path, *flags, "about:blank"], os.environ, file_actions=actions)
        for end in ends:
            os.close(end)
        os.close(commands)
        os.close(answers)
        self.held, self.count, self.events = b"", 0, []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
        finally:
            os.close(self.write)
            os.close(self.read)
            self._reap()
            self.profile.cleanup()

    def _reap(self) -> None:
        end = time.monotonic() + SECONDS
        while os.waitpid(self.process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.02)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._message()
            if got.get("id") == self.count:
                assert "error" not in got, f"{method}: {got['error']}"
                return got["result"]
            self.events.append(got)

    def wait(self, event: str) -> None:
        while not any(got.get("method") == event for got in self.events):
            self.events.append(self._message())

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.held:
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {SECONDS} s"
            piece = os.read(self.read, 1 << 16)
            assert piece, "the browser has ended"
            self.held += piece
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)

    def tab_through(self, page: Path, width: int) -> list[str]:
        """What the Tab key reaches, by its label or text, until it comes round."""
        target, session = self._open(page, width, dark=False)
        found: list[str] = []
        while len(found) < MOST_TABS:
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", session, type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
            name = self.call("Runtime.evaluate", session, expression=FOCUSED, returnByValue=True)["result"]["value"]
            if name is None:
                break
            found.append(name)
        self.call("Target.closeTarget", targetId=target)
        return found

    def look(self, page: Path, width: int, dark: bool = False, picture: Path | None = None) -> Seen:
        """Open a file in a window of `width` pixels; `picture` is where a screenshot of the whole page goes."""
        target, session = self._open(page, width, dark)
        layout = self.call("Runtime.evaluate", session, expression=LAYOUT, returnByValue=True)["result"]["value"]
        if picture is not None:
            size = self.call("Page.getLayoutMetrics", session)["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
            shot = self.call("Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip)["data"]
            picture.write_bytes(base64.b64decode(shot))
        self.call("Target.closeTarget", targetId=target)
        return Seen(_errors(self.events), _requests(self.events), layout)

    def _open(self, page: Path, width: int, dark: bool) -> tuple[str, str]:
        """The target and session of a loaded page."""
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.call("Page.navigate", session, url=page.resolve().as_uri())
        self.wait("Page.loadEventFired")
        return target, session


def _errors(events: list[dict[str, Any]]) -> list[str]:
    found = []
    for event in events:
        what = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            found.append(json.dumps(what["exceptionDetails"].get("text")))
        elif event.get("method") == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
            found.append(json.dumps(what["args"]))
        elif event.get("method") == "Log.entryAdded" and what["entry"]["level"] == "error":
            found.append(what["entry"]["text"])
        elif event.get("method") == "Network.loadingFailed":
            found.append(what["errorText"])
    return found


def _requests(events: list[dict[str, Any]]) -> list[str]:
    asked = [event["params"]["request"]["url"] for event in events if event.get("method") == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:")]
