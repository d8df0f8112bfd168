"""The command line: a dataclass becomes flags, a run's folder is opened or gone on with, Ctrl-C ends it in order."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from plumbing import ranks
from plumbing.checkpoint import check_that_it_can_go_on
from plumbing.command import to_resume
from plumbing.folder import read_json
from plumbing.log import say
from plumbing.memory import Full
from plumbing.report import reporting

LOCK = Path("checkpoint") / "lock"  # in a run's folder
# What a resumed run may change: memory and habits. No result depends on it, but in the last bits.
FREE = ("micro_tokens", "checkpointing", "save_every", "print_every", "backend", "rollouts")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"train.py: {message}. See python train.py --help.\n")


def read_arguments(kind: type, argv: list[str] | None, description: str) -> tuple:
    """argv -> (an object of the dataclass `kind`, resume, the flags that were really given).

    Each field is a flag; its metadata have its help, its choices, and the group under which --help lists it.
    """
    parser = Parser(description=description, usage="python train.py [--FLAG VALUE ...]", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups: dict = {}
    for f in fields(kind):
        default = " ".join(f'"{x}"' for x in f.default) if isinstance(f.default, tuple) else f.default
        default = "empty" if default == "" else default
        more: dict = {"help": f"{f.metadata['help']} (default: {default})".replace("%", "%%")}
        if isinstance(f.default, bool):
            more["action"] = argparse.BooleanOptionalAction
        else:
            more |= {"type": str if isinstance(f.default, tuple) else type(f.default),
                     "choices": f.metadata["choices"],
                     "nargs": ("+" if f.default else "*") if isinstance(f.default, tuple) else None,
                     "metavar": None if f.metadata["choices"] else f.name.upper()}
        title = f.metadata["group"]
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        groups[title].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **more)
    parser.add_argument("--resume", action="store_true", help="go on with the run named by --run (or the latest one)")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return kind(**given), resume, given


@contextmanager
def open_run(config, resume: bool, given: dict) -> Iterator[tuple]:
    """(the config that counts, the run's folder), new or to be resumed. `given`: the flags of this command line.

    The folder is held as long as the block goes on: a second train.py, started in the same second or by mistake, gets
    another name, or a sentence. A run that is refused before it has written anything leaves no folder.

    Of several ranks the first does that, and the others are told what it has found.
    """
    runs = Path("runs")
    if not ranks.first():
        yield told(config, resume, given)
        return
    if resume:
        config, folder = run_to_resume(config, given, runs)
        lock = hold(folder)
    elif config.run:
        folder = runs / config.run
        lock = hold(folder)
    else:
        folder, lock = hold_the_first_free(runs, Path(config.model).name)
        config.run = folder.name
    try:
        if resume:
            check_that_it_can_go_on(folder)
        elif (folder / "config.json").exists():
            raise FileExistsError(f"{folder} is there already: {to_resume(folder)} goes on with it, or take another "
                                  f"--run.")
        ranks.same_settings(config, resume, given, folder)
        with reporting(folder):
            yield config, folder
    except Full as e:
        if resume and "--micro-tokens" not in str(e):
            raise Full(f"{e} A run that is resumed can only take --checkpointing and a lower --micro-tokens: else go "
                       f"on with it where there is more memory, or start another.") from e
        raise
    finally:
        lock.release()
        with suppress(OSError):  # the first folder that is not empty ends it
            if os.listdir(folder / LOCK.parent) == [LOCK.name]:  # there is no checkpoint
                (folder / LOCK).unlink()
                for empty in (folder / LOCK.parent, folder, runs):
                    empty.rmdir()


def told(config, resume: bool, given: dict) -> tuple:
    """What `open_run` yields on rank 0, on another one. Only the device is its own."""
    found = ranks.same_settings(config, resume, given)
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in found["config"].items()}
    return type(config)(**kept | {"device": given.get("device", kept["device"])}), Path(found["folder"])


def run_to_resume(config, given: dict, runs: Path) -> tuple:
    """The settings with which a run was begun, and its folder."""
    known = sorted(runs.glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    folder = runs / config.run if config.run else known[-1].parent if known else runs / "?"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"There is no run {folder} to resume; there are: "
                                f"{', '.join(p.parent.name for p in known) or 'none'}.")
    saved = {name: tuple(value) if isinstance(value, list) else value
             for name, value in read_json(folder / "config.json").items()}
    for name, value in given.items():
        if name not in ("run", *FREE) and saved.get(name) != value:
            raise ValueError(f"{folder} was begun with {name} = {saved.get(name)}, not {value}: a resumed run keeps "
                             f"its settings, but for {', '.join('--' + n.replace('_', '-') for n in FREE)}. Leave the "
                             f"flag out, or start another run.")
    check_settings(type(config), saved, folder / "config.json")
    kept = {f.name: saved[f.name] for f in fields(config) if f.name in saved}
    kept["run"] = config.run or folder.name  # it may have been renamed
    then = kept.get("backend", "torch")
    if given.get("backend", then) != then:
        say(f"{folder} was computed by {then} so far: by {given['backend']} it goes on within rounding, and not bit "
            f"for bit.")
        kept["device"] = ""  # that of the other backend need not be on this machine
    if saved.get("ranks", 1) != ranks.count():
        say(f"{folder} was computed by {saved.get('ranks', 1)} processes so far: by {ranks.count()} it goes on within "
            f"rounding, and not bit for bit.")
    return type(config)(**kept | {name: given[name] for name in FREE if name in given}), folder


def check_settings(kind: type, saved: dict, where: Path) -> None:
    """ValueError where config.json is not what a run wrote: edited by hand, or broken. What is not there was no flag
    yet when the run began, and has its default, which changes nothing."""
    if not {"model", "data", "stages", "seed"} <= saved.keys():
        raise ValueError(f"{where} does not hold the settings of a run: put back the one that the run was begun with, "
                         f"or start another run.")
    for f in fields(kind):
        value, kinds = saved.get(f.name, f.default), (int, float) if type(f.default) is float else (type(f.default),)
        if type(value) not in kinds or f.metadata["choices"] and value not in f.metadata["choices"]:
            raise ValueError(f"{where} says that {f.name} is {value!r}, which it cannot be: put back what the run was "
                             f"begun with (the default is {f.default!r}).")


def hold(folder: Path) -> FileLock:
    """A lock on a run's folder, which is made if need be. It ends with the process, however that ends."""
    (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        raise FileExistsError(f"{folder} is in use by another train.py: wait until it has ended, or take another "
                              f"--run.") from e
    return lock


def hold_the_first_free(runs: Path, base: str) -> tuple[Path, FileLock]:
    """Of runs/BASE-1, runs/BASE-2, ... the first that is not there yet, made and held."""
    n = 1
    while True:
        folder = runs / f"{base}-{n}"
        with suppress(FileExistsError):  # where another process makes it at this moment, too
            folder.mkdir(parents=True)
            return folder, hold(folder)
        n += 1


class Stop:
    """Ctrl-C ends the run after its step, the second one at once. A scheduler that wants the machine back (SIGTERM)
    and a terminal that is closed (SIGHUP) end it after its step, too; they often signal twice, which means no more.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    def __enter__(self) -> "Stop":
        self.asked = self.heard = False
        self.before: dict = {}
        self.at_end: list[Callable[[], None]] = []  # what is to be done when the run is over, however it ended
        if threading.current_thread() is threading.main_thread():  # no other thread hears signals
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # no system has all of them
                number = getattr(signal, name, None)
                # nohup has asked that SIGHUP be ignored.
                if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_) -> None:
        for do in self.at_end:
            do()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _) -> None:
        if self.heard and number == signal.SIGINT:
            how = ""
            if self.folder and (self.folder / "config.json").exists():
                how = f" The last checkpoint is good; go on with: {to_resume(self.folder)}"
            sys.exit(f"\nStopped at once.{how}")
        if not self.heard:
            self.heard = True
            self.asked = ranks.count() == 1
            say("\nStopping after this step (Ctrl-C again to stop at once) ...")


def open_console() -> None:
    """A screen that cannot show an emoji, or no screen at all, should not end a run."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start: the next file would get its number, and its prints
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(getattr(sys, name), "reconfigure"):  # a notebook's has not
            getattr(sys, name).reconfigure(errors="replace")


def complain(text: str) -> int:
    """What went wrong, on stderr -> the exit code."""
    say(f"train.py: {text}", sys.stderr)
    return 1
