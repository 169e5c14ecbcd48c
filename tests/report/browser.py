"""Headless Chromium over its debugging pipe: load a file, look at what it logged and asked for, take a picture."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe", "about:blank"),
)


class Browser:
    """Speaks the DevTools protocol: JSON messages that end in a zero byte, on descriptors 3 (to) and 4 (from)."""

    def __init__(self, binary: str, profile: Path):
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()

        def place():  # in the child, where 3 and 4 may be these pipes' own numbers, or each other's
            spare = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_child, from_child)]
            for number, end in zip((3, 4), spare, strict=True):
                os.dup2(end, number)

        self._process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child), os.close(from_child)
        self._buffer, self._number, self.events = b"", 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._out), os.close(self._in)

    def call(self, method: str, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self.events.append(reply)

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("Chromium went away")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> SimpleNamespace:
        """Load the file; .requests are addresses asked for besides itself, .errors what the console complained of."""
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=theme)
        self.call(
            *("Emulation.setDeviceMetricsOverride",),
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.events.clear()
        url = path.resolve().as_uri()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
        sent = [e["params"]["request"]["url"] for e in self._seen("Network.requestWillBeSent")]
        errors = [str(e["params"]["exceptionDetails"]) for e in self._seen("Runtime.exceptionThrown")]
        errors += [e["params"]["entry"]["text"] for e in self._seen("Log.entryAdded")]
        errors += [str(e["params"]["args"]) for e in self._seen("Runtime.consoleAPICalled")]
        return SimpleNamespace(requests=[u for u in sent if u != url and not u.startswith("data:")], errors=errors)

    def _seen(self, method: str) -> list[dict]:
        return [event for event in self.events if event.get("method") == method]

    def run(self, script: str):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
