"""A headless Chromium that a test clicks in: the DevTools protocol over two pipes, by the standard library alone."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium():
    """The browser's path, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page; a context manager.

    Attributes:
        problems: What the page's console complained of, its uncaught errors, and what its policy forbade.
        asked: Addresses that the page asked for.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self.problems: list[str] = []
        self.asked: list[str] = []
        self._numbers = itertools.count(1)
        self._unread = b""
        self._session: str | None = None

    def __enter__(self) -> "Chromium":
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()  # the browser reads descriptor 3 and writes 4
        self._from, to_write = os.pipe()
        ends = {to_read: 3, to_write: 4}
        moved = {end: os.dup(end) for end in ends}  # out of the way of 3 and 4 themselves

        def arrange() -> None:
            for end, number in ends.items():
                os.dup2(moved[end], number, inheritable=True)

        command = [
            *(find_chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *(f"--user-data-dir={self._profile.name}", "--no-first-run", "--disable-extensions", "about:blank"),
        ]
        self._process = subprocess.Popen(
            command,
            preexec_fn=arrange,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, *moved.values()):
            os.close(end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired, TimeoutError, EOFError):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    # -- the protocol --

    def call(self, method: str, **params: object) -> dict:
        """One command, and its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        written = json.dumps(message).encode() + b"\0"
        while written:
            written = written[os.write(self._to, written) :]
        return self._wait(lambda got: got.get("id") == number, method)

    def _wait(self, wanted, what: str) -> dict:
        until = time.monotonic() + self.timeout
        while True:
            while b"\0" in self._unread:
                message, _, self._unread = self._unread.partition(b"\0")
                got = json.loads(message)
                self._notice(got)
                if wanted(got):
                    if "error" in got:
                        raise RuntimeError(f"{what}: {got['error']}")
                    return got.get("result", got.get("params", {}))
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{what}: Chromium did not answer within {self.timeout} s")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise EOFError(f"{what}: Chromium ended")
            self._unread += part

    def _notice(self, got: dict) -> None:
        method, params = got.get("method"), got.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])

    # -- what a person does --

    def size(self, width: int, height: int) -> None:
        """Size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, kind: str = "", **features: str) -> None:
        """Media ("print") and features, such as `prefers_color_scheme="dark"`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=named)

    def open(self, file: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self.call("Page.navigate", url=Path(file).resolve().as_uri())
        self._wait(lambda got: got.get("method") == "Page.loadEventFired", "loading")

    def run(self, script: str):
        """Value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "an error"))
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of the first element of a CSS selector."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null; "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        assert box is not None, f"the page has no {selector}"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """One key: "Tab", "Enter", " ", "ArrowDown"."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        both = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        letters = {"Enter": "\r", " ": " "}
        down = {"type": "keyDown", "text": letters[key]} if key in letters else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **both, **down)
        self.call("Input.dispatchKeyEvent", **both, type="keyUp")

    def picture(self, file: Path, whole: bool = True) -> Path:
        """A screenshot as PNG, of the whole page or of the window."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(file).write_bytes(base64.b64decode(taken["data"]))
        return Path(file)

    def paper(self, file: Path) -> Path:
        """The page as a PDF, A4."""
        printed = self.call("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)
        Path(file).write_bytes(base64.b64decode(printed["data"]))
        return Path(file)
