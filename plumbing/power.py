"""How much energy a piece of work took, where the system tells it.

RAPL (Intel and AMD under Linux; most systems let only root read it) counts. nvidia-smi, and powermetrics on a Mac
(with sudo that asks for no password), are asked for their power now and then. All three are untested.
"""

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

RAPL = Path("/sys/class/powercap")
COMMANDS = {"nvidia-smi": (["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"], r"([\d.]+)", 1.0),
            "powermetrics": (["sudo", "-n", "powermetrics", "-n", "1", "-i", "500", "--samplers", "cpu_power"],
                             r"Combined Power.*?: (\d+) mW", 1e-3)}


def counted() -> float | None:
    """Joules that RAPL's packages have counted; None where it cannot be read."""
    try:
        files = [path / "energy_uj" for path in RAPL.glob("intel-rapl:?")]
        return sum(int(file.read_text(encoding="utf-8")) for file in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None


def drawn() -> float:
    """Watts that the commands which are here say; 0 where none is."""
    watts = 0.0
    for name, (command, pattern, unit) in COMMANDS.items():
        if shutil.which(name):
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            watts += unit * sum(map(float, re.findall(pattern, said)))
    return watts


class Meter:
    """Inside, time and energy are measured. After it: `seconds`, and `watt_hours`, None where nothing tells them."""

    def __enter__(self):
        self.before, self.begun, self.watts, self.ended = counted(), time.perf_counter(), [], threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        if any(map(shutil.which, COMMANDS)):
            self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.ended.is_set():
            self.watts.append(drawn())
            self.ended.wait(1)

    def __exit__(self, *_) -> None:
        self.seconds, after = time.perf_counter() - self.begun, counted()
        self.ended.set()
        if self.watcher.is_alive():
            self.watcher.join()
        joules = 0.0
        if self.before is not None and after is not None and after >= self.before:  # the counter may have begun anew
            joules += after - self.before
        if self.watts:
            joules += self.seconds * sum(self.watts) / len(self.watts)
        self.watt_hours = joules / 3600 or None
