"""A headless Chromium driven over the pipe of its DevTools: no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE = 60.0
"""Seconds for anything: a machine at its limits, and no promise of the page."""

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The browser reads commands from descriptor 3 and answers on 4. They are put there in a process of its own, since a
# function run between fork and exec is not safe beside threads.
LAUNCH = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(reads, 3), os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

# What went wrong in a page, from its first script on.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
"""


class Chromium:
    """One browser; `tab` opens pages."""

    def __init__(self, *arguments: str) -> None:
        assert CHROMIUM
        self._profile = tempfile.mkdtemp(prefix="tracker-chromium-")
        reads, self._commands = os.pipe()
        self._answers, writes = os.pipe()
        self._log = Path(self._profile, "stderr").open("wb")  # noqa: SIM115 - closed in close
        flags = [
            "--headless",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            *(["--no-sandbox"] if os.getuid() == 0 else []),
            *arguments,
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(reads), str(writes), CHROMIUM, *flags, "about:blank"],
            pass_fds=(reads, writes),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(reads)
        os.close(writes)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        try:
            self.call("Browser.close")
            self._process.wait(DEADLINE)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._log.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a DevTools method and return its result; events that come meanwhile are kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        command, until = json.dumps(message).encode() + b"\0", time.monotonic() + DEADLINE
        while command:
            command = command[os.write(self._commands, command) :]
        while True:
            answer = self._receive(until)
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]  # type: ignore[no-any-return]

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"no answer; the browser says: {self._said()}")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise EOFError(f"the browser has ended: {self._said()}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)  # type: ignore[no-any-return]

    def _said(self) -> str:
        return Path(self._profile, "stderr").read_text(errors="replace")[-2_000:]

    @contextmanager
    def tab(self, *, width: int = 1280, height: int = 800, **media: str) -> Iterator[Tab]:
        """Open an empty page of this size, with media features such as `prefers_color_scheme="dark"`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        tab.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        tab.call("Emulation.setEmulatedMedia", features=features)
        yield tab
        self.call("Target.closeTarget", targetId=target)


class Tab:
    """One page."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a DevTools method of this page."""
        return self._browser.call(method, self._session, **params)

    def open(self, url: str) -> None:
        """Begin to load *url*."""
        assert not self.call("Page.navigate", url=url).get("errorText")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression; a promise's when it is one."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Wait until a JavaScript expression is true; return its value, or fail at the deadline."""
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            # Within the page, which is asked again: a navigation ends what was waiting in it.
            value = self.evaluate(
                "new Promise((done) => { const until = performance.now() + 1000; (function look() {"
                f"let value = null; try {{ value = {condition}; }} catch {{}}"
                "if (value || performance.now() > until) done(value); else setTimeout(look, 20); })(); })"
            )
            if value:
                return value
        raise AssertionError(f"not within {DEADLINE:.0f} s: {condition}\n{self.text('body')}")

    def text(self, selector: str) -> str:
        """Return the text of an element as it is shown."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")  # type: ignore[no-any-return]

    def press(self, *keys: str) -> None:
        """Press keys, by the names that `KeyboardEvent.key` has."""
        codes = {"Tab": 9, "Escape": 27, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        codes |= {"PageUp": 33, "PageDown": 34}
        for key in keys:
            text = {"text": "\r"} if key == "Enter" else {}
            for kind in ("keyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text
                )

    def faults(self) -> list[str]:
        """Return errors of scripts, the console, the network and the content policy until now."""
        found: list[str] = list(self.evaluate("window.violations") or [])
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
                found.append(f"console: {params['args']}")
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write the page as PNG."""
        data = self.call(
            "Page.captureScreenshot", captureBeyondViewport=whole, **({"clip": self._whole()} if whole else {})
        )
        path.write_bytes(base64.b64decode(data["data"]))

    def _whole(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
