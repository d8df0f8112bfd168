"""What to type to go on with a run: in the words of this shell, and by torchrun where that had started the run."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def several() -> bool:
    """Whether this process is one of several that learn together."""
    return all(os.environ.get(name) for name in NEEDED) and os.environ["WORLD_SIZE"] != "1"


def quoted(words: Sequence[str]) -> str:
    """Words as a shell takes them, blanks and all."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def python() -> str:
    """This very Python: by its name where the shell finds it by that, for `python` may be another one, or none."""
    path = sys.executable or "python"
    name = Path(path).name.removesuffix(".exe")
    return name if os.path.normcase(shutil.which(name) or "") == os.path.normcase(path) else path


def name_of(folder: Path) -> str:
    """runs/NAME, whatever stands before it -> what --run calls it; a name may have several parts."""
    parts = folder.parts
    return "/".join(parts[len(parts) - parts[::-1].index("runs"):]) if "runs" in parts[:-1] else folder.name


def to_resume(run: str | Path, ranks: int = 1) -> str:
    """The command that goes on with a run: its name, or its folder. "": the latest run.

    Under torchrun as many processes as now; else `ranks` of them.
    """
    name, own = name_of(run) if isinstance(run, Path) else run, Path(sys.argv[0])
    script = str(own.with_name("train.py")) if own.name in ("train.py", "eval.py") else "train.py"
    what = [script, *(["--run", name] if name else []), "--resume"]
    env = os.environ if several() else {"WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": ""}
    if env["WORLD_SIZE"] == "1":
        return quoted([python(), *what])
    if "TORCHELASTIC_RUN_ID" not in env:  # who has started the ranks is not known
        return f"{quoted([python(), *what])} (on each of the {env['WORLD_SIZE']} ranks)"
    start = ["torchrun"] if shutil.which("torchrun") else [python(), "-m", "torch.distributed.run"]
    start += ["--nproc-per-node", env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])]
    if start[-1] == env["WORLD_SIZE"]:
        return quoted([*start, "--", *what])  # "--": torchrun would take --run for a flag of its own
    start += ["--nnodes", env["GROUP_WORLD_SIZE"], "--node-rank", env["GROUP_RANK"],
              "--master-addr", env["MASTER_ADDR"], "--master-port", env["MASTER_PORT"]]
    return f"{quoted([*start, '--', *what])} (on each machine with its own --node-rank)"
