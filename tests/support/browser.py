"""A real browser for tests: Chromium without a window, driven over a pipe in its DevTools protocol.

``python -m tests.support.browser runs/demo/report.html docs/report.png`` takes the picture that docs show.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0  # to wait for one answer


def chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next((found for name in NAMES if (found := shutil.which(name)) is not None), None)


class Browser:
    """One page in a browser of its own, as a context manager."""

    def __init__(self) -> None:
        path = chromium()
        assert path is not None, "no Chromium: apt-get install chromium"
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        (its_read, self._write), (self._read, its_write) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_read, its_write)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]

        def as_3_and_4() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [path, *flags],
            preexec_fn=as_3_and_4,
            pass_fds=(3, 4, *ends),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (its_read, its_write, *ends):
            os.close(end)
        self._received, self._next, self._session = b"", 0, ""
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._call("Page.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=SECONDS)
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            while b"\0" in self._received:
                text, _, self._received = self._received.partition(b"\0")
                answer = json.loads(text)
                if answer.get("id") == self._next:
                    assert "error" not in answer, answer["error"]
                    return answer["result"]
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"Chromium gives no answer to {method}"
            self._received += os.read(self._read, 2**20)

    def screen(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Sets the size of the window in CSS pixels, the preferred theme, and whether it is a phone."""
        scale = 2 if phone else 1
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self._call("Emulation.setTouchEmulationEnabled", enabled=phone)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=theme)

    def open(self, path: Path) -> None:
        """Opens a file and waits until its charts are drawn, or it says that they cannot be."""
        self._call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.drawn || document.getElementById('broken')?.textContent")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Waits until an expression is true; its value then."""
        until = time.monotonic() + SECONDS
        while not (found := self.value(expression)):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)
        return found

    def press(self, key: str, code: int) -> None:
        """A key, by its DevTools name and its Windows virtual key code."""
        text = {"text": "\r"} if key == "Enter" else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def move(self, x: float, y: float) -> None:
        """Moves the mouse."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Moves the mouse and clicks."""
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, which is scrolled to the middle of the window."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        rectangle = f"(({{x, y, width, height}}) => [x, y, width, height])({place}.getBoundingClientRect())"
        x, y, width, height = self.value(rectangle)
        return x, y, width, height

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """Writes a PNG of the window, or of the page down to a height."""
        clip: dict[str, Any] = {}
        if height is not None:
            width = self.value("innerWidth")
            clip = {
                "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
                "captureBeyondViewport": True,
            }
        found = self._call("Page.captureScreenshot", format="png", **clip)
        path.write_bytes(base64.b64decode(found["data"]))


def main(report: str, picture: str) -> None:
    """Takes the picture that docs show, down to the end of the heatmaps, in few colors so that it is small."""
    from PIL import Image

    with Browser() as browser:
        browser.screen(1200, 900)
        browser.open(Path(report))
        browser.screenshot(Path(picture), height=browser.value("document.getElementById('bits').offsetTop + 560"))
    with Image.open(picture) as image:
        image.convert("RGB").quantize(96).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
