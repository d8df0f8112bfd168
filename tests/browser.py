"""A headless Chromium, spoken to over a pipe (--remote-debugging-pipe): no driver, no package, no port."""

import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-sync", "--disable-dev-shm-usage", "--disable-extensions", "--remote-debugging-pipe")
# The browser reads commands from descriptor 3 and answers on 4.
START = """import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One page. `complaints`: what the console and the page's scripts have complained of."""

    def __init__(self, profile):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None or sys.platform == "win32":
            pytest.skip("needs Chromium or Chrome (apt-get install chromium), and pipes that a child inherits")
        self.complaints, self.last, self.session, self.buffer = [], 0, None, b""
        theirs, self.to = os.pipe()
        self.come, out = os.pipe()
        child = [sys.executable, "-c", START, str(theirs), str(out), program, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen([*child, "about:blank"], pass_fds=(theirs, out), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(out)
        pages = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.come)

    def ask(self, method: str, seconds: float = 30, **params) -> dict:
        """A command of the DevTools protocol -> its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        return self.read(lambda said: said.get("id") == self.last, seconds).get("result", {})

    def read(self, wanted, seconds: float = 30) -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            while b"\0" in self.buffer:
                first, _, self.buffer = self.buffer.partition(b"\0")
                said = json.loads(first)
                self.hear(said)
                if wanted(said):
                    assert "error" not in said, said
                    return said
            if select.select([self.come], [], [], 0.2)[0]:
                self.buffer += os.read(self.come, 1 << 20)
            assert self.process.poll() is None, "the browser has ended"
        raise AssertionError("the browser did not answer in time")

    def hear(self, said: dict) -> None:
        params = said.get("params", {})
        if said.get("method") == "Runtime.exceptionThrown":
            thrown = params["exceptionDetails"]
            self.complaints.append(thrown.get("exception", {}).get("description", thrown["text"]))
        elif said.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.complaints.append(params["entry"]["text"])
        elif said.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            self.complaints.append(str(params["args"]))
        elif said.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.complaints.append(f"the page asked for {url}")

    def open(self, path, width: int = 1000, height: int = 800, dark: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)
        self.ask("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("Page.navigate", url=path.as_uri())
        self.read(lambda said: said.get("method") == "Page.loadEventFired")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str):
        """The value of an expression in the page, which may be a promise."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element: what lies above it would get the click."""
        x, y = self.run(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
                        f"e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
                        f"return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
