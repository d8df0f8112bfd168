"""The command line: a dataclass becomes flags, a run's folder is opened or gone on with, Ctrl-C ends it in order."""

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path

from plumbing.folder import read_json


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
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
                     "choices": f.metadata["choices"], "nargs": "+" if isinstance(f.default, tuple) else None,
                     "metavar": None if f.metadata["choices"] else f.name.upper()}
        title = f.metadata["group"]
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        groups[title].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **more)
    parser.add_argument("--resume", action="store_true", help="go on with the run named by --run (or the latest one)")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return kind(**given), resume, given


def open_run(config, resume: bool, given: dict) -> tuple:
    """(the config that counts, the run's folder), new or to be resumed. `given`: the flags of this command line."""
    runs = Path("runs")
    if resume:
        known = sorted(runs.glob("*/config.json"), key=lambda p: p.stat().st_mtime)
        folder = runs / config.run if config.run else known[-1].parent if known else runs / "?"
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"There is no run {folder} to resume; there are: "
                                    f"{', '.join(p.parent.name for p in known) or 'none'}.")
        saved = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in read_json(folder / "config.json").items()}
        for name, value in given.items():
            if name != "run" and saved.get(name) != value:
                raise ValueError(f"{folder} was begun with {name} = {saved.get(name)}, not {value}: a resumed run "
                                 f"keeps its settings. Leave the flag out, or start another run.")
        return type(config)(**{f.name: saved[f.name] for f in fields(config) if f.name in saved}), folder
    if not config.run:
        base, n = Path(config.model).name, 1
        while (runs / f"{base}-{n}").exists():
            n += 1
        config.run = f"{base}-{n}"
    folder = runs / config.run
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} is there already: go on with --resume, or take another --run.")
    return config, folder


class Stop:
    """Ctrl-C: the first one ends the run after its step, the second one at once."""

    def __enter__(self):
        self.asked, self.before = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)

    def ask(self, *_) -> None:
        if self.asked:
            sys.exit("\nStopped at once. The last checkpoint is good; go on with --resume.")
        self.asked = True
        print("\nStopping after this step (again to stop at once) ...", flush=True)
