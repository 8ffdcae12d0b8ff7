"""Headless Chromium, driven over its pipe (`--remote-debugging-pipe`): no package and no port."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.support.deadlines import wait_until

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip


def chromium_program() -> str | None:
    """Path of the browser; None if there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Page:
    """A page of a running browser."""

    def __init__(self, requests: Any, answers: Any) -> None:
        self._requests = requests
        self._answers = answers
        self._number = 0
        self._session: str | None = None

    def attach(self) -> Self:
        """Open a page and speak to it from now on."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return self

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._requests.write(json.dumps(message).encode() + b"\0")
        self._requests.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(answer["error"]["message"])
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; waits for a promise."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def open(self, url: str, *, width: int, height: int) -> None:
        """Load a page in a window of this size, and wait until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        self.call("Page.navigate", url=url)
        wait_until(self._has_loaded)

    def _has_loaded(self) -> bool:
        try:
            return self.evaluate("document.readyState === 'complete' && location.href !== 'about:blank'")
        except RuntimeError:  # the page was replaced meanwhile
            return False

    def _read(self) -> bytes:
        found = b""
        while not found.endswith(b"\0"):
            part = self._answers.read(1)
            if not part:
                raise RuntimeError("the browser has ended")
            found += part
        return found[:-1]


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """Run the browser.

    Args:
        profile: a new folder.
    """
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    # The browser reads file descriptor 3 and writes 4.
    shell = f"exec {program} {' '.join(OPTIONS)} --user-data-dir={profile} 3<&{to_browser} 4>&{from_browser}"
    process = subprocess.Popen(
        ["bash", "-c", shell], pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        with os.fdopen(from_us, "wb") as requests, os.fdopen(to_us, "rb") as answers:
            yield Page(requests, answers).attach()
    finally:
        process.kill()
        process.wait()
