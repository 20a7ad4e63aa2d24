"""A real browser, headless: Chromium through its WebDriver, which speaks JSON over HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_START, _POLL = 60, 0.1  # seconds
needs_browser = pytest.mark.skipif(
    shutil.which("chromedriver") is None or shutil.which("chromium") is None,
    reason="needs a browser: apt install chromium chromium-driver",
)
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "Down": "\ue015", "Right": "\ue014", "Left": "\ue012"}


class Browser:
    """One window. Every error that a page logs is in :meth:`errors`."""

    def __init__(self, driver: str, width: int, height: int, dark: bool):
        self._driver = driver
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        options = {"binary": shutil.which("chromium"), "args": [*arguments, "--force-dark-mode"] if dark else arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._driver += f"/session/{session['sessionId']}"
        # Not the size of the window, which cannot be as narrow as a telephone.
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", screen)
        if dark:
            features = [{"name": "prefers-color-scheme", "value": "dark"}]
            self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Press keys by name, or type text, where the focus is."""
        typed = [key for name in keys for key in ([KEYS[name]] if name in KEYS else name)]
        actions = [{"type": kind, "value": key} for key in typed for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def errors(self) -> list[str]:
        """Everything that was logged since the last time."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        self._call("DELETE", "")

    def _devtools(self, command: str, parameters: dict[str, Any]) -> None:
        self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=_START) as answer:
            return json.load(answer)["value"]


@contextlib.contextmanager
def driver() -> Iterator[str]:
    """The address of a running WebDriver."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + _START
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=_START).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(_POLL)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Browser]:
    """A window of so many CSS pixels."""
    with driver() as address:
        window = Browser(address, width, height, dark)
        try:
            yield window
        finally:
            window.close()
