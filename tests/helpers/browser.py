"""A page in headless Chromium, driven by its DevTools protocol over a pipe: what a visitor's browser says of it."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic", "--disable-dev-shm-usage", "--hide-scrollbars"),
)
LOOK = """JSON.stringify({
  title: document.title,
  text: document.body.innerText,
  images: [...document.images].map((image) => [image.complete, image.naturalWidth]),
  plots: document.querySelectorAll("svg").length,
  broken: [...document.querySelectorAll("a[href^='#']")]
    .filter((link) => !document.querySelector(link.getAttribute("href"))).length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@dataclass
class Seen:
    """What a browser saw: messages of its console, addresses asked for, and the page itself."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    title: str = ""
    text: str = ""
    images: list[list] = field(default_factory=list)
    plots: int = 0
    broken: int = 0
    wide: int = 0


def open_page(path: Path, *, screenshot: Path | None = None, dark: bool = False, width: int = 1280) -> Seen:
    """Open a file; skips the test where there is no Chromium."""
    with Browser() as browser:
        return browser.open(path, screenshot=screenshot, dark=dark, width=width)


def assert_whole(path: Path, **options: Any) -> Seen:
    """No message in the console, every image loaded, nothing asked for but the file, no dead link within."""
    seen = open_page(path, **options)
    assert seen.console == []
    assert seen.requests == [path.resolve().as_uri()]
    assert all(complete and width > 0 for complete, width in seen.images), seen.images
    assert seen.broken == 0
    assert seen.wide <= 0, f"the page is {seen.wide} px wider than the window"
    return seen


class Browser:
    def __init__(self) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("there is no Chromium here to open the page in")
        self.program = program

    def __enter__(self) -> "Browser":
        self.folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()

        def hand_over() -> None:
            # The protocol's pipe is descriptors 3 (in) and 4 (out); ends that have these numbers must not be lost.
            spare_in, spare_out = (os.dup(fd) for fd in (theirs_in, theirs_out))
            os.dup2(spare_in, 3)
            os.dup2(spare_out, 4)

        command = [
            self.program,
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={self.folder.name}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command, preexec_fn=hand_over, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (theirs_in, theirs_out):
            os.close(end)
        self.out, self.input = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self.count, self.events, self.session = 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.input.close()
        self.folder.cleanup()

    def open(self, path: Path, *, screenshot: Path | None, dark: bool, width: int) -> Seen:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired")
        seen = Seen(**json.loads(self.call("Runtime.evaluate", expression=LOOK)["result"]["value"]))
        if screenshot is not None:
            data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            screenshot.write_bytes(base64.b64decode(data))
        for event in self.events:
            method, told = event["method"], event["params"]
            if method == "Runtime.consoleAPICalled":
                seen.console.append(str([argument.get("value") for argument in told["args"]]))
            elif method == "Runtime.exceptionThrown":
                seen.console.append(told["exceptionDetails"]["text"])
            elif method == "Log.entryAdded":
                seen.console.append(told["entry"]["text"])
            elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
                seen.requests.append(told["request"]["url"])
        return seen

    def call(self, method: str, **params: Any) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def wait_for(self, method: str) -> None:
        while all(event["method"] != method for event in self.events):
            self.receive()

    def receive(self) -> dict:
        data = bytearray()
        while (byte := self.input.read(1)) != b"\0":
            assert byte, "the browser ended"
            data += byte
        message = json.loads(data)
        if "method" in message:
            self.events.append(message)
        return message
