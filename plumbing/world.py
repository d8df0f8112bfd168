"""Where torchrun's processes meet, and how one that dies is missed by the others (ranks.py).

gloo tells at once of a rank that is gone, where that rank is waited for. And all ranks beat in the store in which they
have met, so silence is heard within half a minute, also while somebody samples or where NCCL waits for ever.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.command import to_resume

BEAT, SILENCE = 2.0, 24.0  # seconds; torchrun kills 30 s after it has asked to end, and until then all is to be said
PATIENCE = timedelta(minutes=30)  # for a rank that lives: it may be loading a model while others wait


class Lost(Exception):
    """Another rank is gone, or has gone another way; the message says which, and how to go on."""


class World:
    """The other ranks, as this one sees them."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.over, self.run = threading.Event(), ""
        self.nccl: bool | None = None  # whether gradients go by it
        self.heard = dict.fromkeys(set(range(self.size)) - {self.rank}, time.monotonic())  # when each has last beaten
        self.last_words: dict[int, str] = {}

    def meet(self) -> None:
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        host, _, port = self.at.rpartition(":")
        try:
            dist.init_process_group(backends, timeout=PATIENCE)
            # A connection of its own: one that is waited at cannot be asked.
            self.store = dist.TCPStore(host, int(port), is_master=False, timeout=PATIENCE)
        except (RuntimeError, ValueError) as e:
            raise Lost(f"The {self.size} ranks did not meet at {self.at} ({first_line(e)}). Can all machines reach "
                       f"that address? GLOO_SOCKET_IFNAME names the network interface to use, such as en0.") from e
        for work in (self.listen, self.watch):
            threading.Thread(target=work, daemon=True).start()

    def listen(self) -> None:
        """Beat, and note who else has. Where the store is away this waits or ends, and then all seem silent."""
        counts = dict.fromkeys(self.heard, -1)
        with suppress(RuntimeError):
            while not self.over.wait(BEAT / 2):
                self.store.add(f"crisp/beat/{self.rank}", 1)
                for rank in counts:
                    n = self.store.add(f"crisp/beat/{rank}", 0)
                    if n != counts[rank]:
                        counts[rank], self.heard[rank] = n, time.monotonic()
                    if rank not in self.last_words and self.store.check([f"crisp/end/{rank}"]):
                        said = self.store.get(f"crisp/end/{rank}").decode("utf-8", "replace")
                        self.last_words[rank] = "".join(c for c in said if c.isprintable())[:500]

    def watch(self) -> None:
        """End this process where a rank is gone, unless it ends by itself: it may be at work, or wait for ever."""
        while not self.over.wait(BEAT / 2):
            if self.gone() and not self.over.wait(2 * BEAT) and self.gone():
                print(f"train.py: {self.why()}", file=sys.stderr, flush=True)
                os._exit(1)

    def gone(self) -> bool:
        return bool(self.last_words or self.silent(SILENCE))

    def silent(self, seconds: float) -> list[int]:
        return [rank for rank, at in sorted(self.heard.items()) if time.monotonic() - at > seconds]

    def why(self, error: Exception | None = None) -> str:
        """Who is gone, as far as one can know, and how to go on."""
        until = time.monotonic() + 3 * BEAT
        while error and not self.last_words and time.monotonic() < until:
            time.sleep(BEAT / 10)
        silent = self.silent(2 * BEAT)
        if self.last_words:
            rank, said = next(iter(self.last_words.items()))
            what = f"Rank {rank} has ended: {said.rstrip('.')}"
        elif len(silent) == len(self.heard) > 1:
            what = f"No other rank answers at {self.at}: the machine or the network is gone"
        elif silent:
            what = f"Rank {silent[0]} is gone without a word: killed, or its machine or the network is away"
        else:
            what = f"The connection to another rank broke ({first_line(error)})"
        how = f" Go on from the last checkpoint with: {to_resume(self.run)}"
        if error:
            self.over.set()  # this process ends by itself
        return f"{what}. Rank {self.rank} ends, too.{how if self.run else ''}"

    def end(self, last_words: str) -> None:
        """Say why this rank ends, so that the others can."""
        self.over.set()
        with suppress(RuntimeError):
            self.store.set(f"crisp/end/{self.rank}", last_words)
            time.sleep(BEAT)  # without torchrun the store ends with rank 0


def first_line(e: BaseException | None) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
