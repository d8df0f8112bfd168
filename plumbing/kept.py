"""What was asked, written or measured once, and need not be again: a table on disk."""

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any


class Kept:
    """A table on disk, or in memory: key -> value. What is in there is whole: sqlite sees to kills and full disks."""

    def __init__(self, path: Path | None = None):
        try:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(path or ":memory:", check_same_thread=False, timeout=60)
            self.db.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT)")
        except sqlite3.Error as e:
            raise OSError(f"{path} cannot be used to keep answers ({e}): delete it, or name another --cache.") from e
        self.lock = threading.Lock()  # a judge's threads keep what they get

    def get(self, *key) -> Any:
        try:
            with self.lock:
                row = self.db.execute("SELECT value FROM kept WHERE key = ?", (self.name(key),)).fetchone()
            return None if row is None else json.loads(row[0])
        except (sqlite3.Error, ValueError) as e:
            raise OSError(f"What was kept cannot be read ({e}): delete the file, or name another --cache.") from e

    def put(self, value: object, *key) -> None:
        try:
            with self.lock, self.db:
                self.db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (self.name(key), json.dumps(value)))
        except sqlite3.Error as e:
            raise OSError(f"An answer could not be kept ({e}): free some space; what was kept before is safe.") from e

    def __len__(self) -> int:
        return self.db.execute("SELECT count(*) FROM kept").fetchone()[0]

    def clear(self) -> None:
        with self.db:
            self.db.execute("DELETE FROM kept")

    @staticmethod
    def name(key: tuple) -> str:
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()
