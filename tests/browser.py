"""A headless Chromium, driven by the DevTools protocol over pipes, with the standard library alone."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60  # seconds for an answer


def found() -> str | None:
    """Return the browser of this machine, None if there is none, or no bash to start it."""
    return next(filter(None, map(shutil.which, NAMES)), None) if shutil.which("bash") else None


class Browser:
    """One page in a browser of its own."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1200, 900)) -> None:
        commands, self.send_to = os.pipe()
        self.receive_from, answers = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        # The browser reads from 3 and writes to 4. Not sh: Debian's knows no numbers above 9.
        shell = f'exec "$@" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", found(), *options],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.numbers, self.buffer, self.events = itertools.count(1), b"", []
        self.session = None
        pages = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(*size)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.send_to)
        os.close(self.receive_from)

    def call(self, method: str, **parameters: object) -> dict:
        """Run a command of the protocol and return its result; what happens meanwhile goes to ``events``."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive_from], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            read = os.read(self.receive_from, 1 << 20)
            assert read, "the browser has ended"
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        """Show a file, and wait until the page says that it is ready."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while not self.value("Boolean(globalThis.explore && globalThis.explore.ready)"):
            assert time.monotonic() < end, self.complaints()
            time.sleep(0.05)

    def value(self, expression: str) -> object:
        """Return what an expression of JavaScript gives, as JSON has it."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def key(self, name: str, shift: bool = False) -> None:
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            modifiers = 8 if shift else 0
            options = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name], "modifiers": modifiers}
            self.call("Input.dispatchKeyEvent", type=kind, **options)

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def touch(self, x: float, y: float) -> None:
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def resize(self, width: int, height: int, phone: bool = False, dark: bool = False) -> None:
        scale = 2 if phone else 1
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(result["data"]))

    def complaints(self) -> list[dict]:
        """Return what went wrong in the page so far: exceptions, errors and warnings of the console."""
        kinds = ("error", "warning", "assert")
        return [
            event
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] in kinds)
            or (event.get("method") == "Runtime.consoleAPICalled" and event["params"]["type"] in kinds)
        ]

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for so far."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]
