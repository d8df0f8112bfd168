"""A hub on this machine: it answers like huggingface.co and its rows API, and fails where a test tells it to."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

COMMIT = "5" * 40


class Hub:
    """`models[name]` and `datasets[name]` are {path: bytes}, `rows[dataset, config, split]` a list of rows.

    `fail(where, *faults)`: the next GETs whose path contains `where` fail, one fault each: (status, headers)
    instead of an answer, or a number: the connection drops after so many bytes of it. `log` holds what was asked:
    (method, path with query, Range header or "").
    """

    def __init__(self):
        self.models, self.datasets, self.rows, self.log, self.faults = {}, {}, {}, [], []
        self.gated: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, where, *faults):
        self.faults += [(where, fault) for fault in faults]

    def asked(self, part=""):
        """What was asked for since the last call of this, where the path contains `part`."""
        log, self.log = self.log, []
        return [entry for entry in log if part in entry[1]]

    def answer(self, path, query):
        """-> (status, headers, body)."""
        if path in ("/splits", "/rows"):
            return self.rows_api(path, {key: values[0] for key, values in query.items()})
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(main|5{40})", path):
            name, what, _ = m.groups()
            if name not in self.models:
                return refused(401, "RepoNotFound")
            files = self.models[name]
            if what == "revision":
                return as_json({"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [],
                                "downloads": 0, "siblings": [{"rfilename": file} for file in files]})
            return as_json([{"type": "file", "path": file, "size": len(content), "oid": etag(content)}
                            for file, content in files.items()])
        if m := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(main|5{40})/(.+)", path):
            kind, name, _, file = m.groups()
            repository = (self.datasets if kind else self.models).get(name)
            if repository is None:
                return refused(401, "RepoNotFound")
            if name in self.gated:
                return refused(401, "GatedRepo")
            if file not in repository:
                return refused(404, "EntryNotFound")
            if kind:  # large files live elsewhere
                return 302, {"Location": f"{self.url}/cdn/{name}/{file}", "X-Repo-Commit": COMMIT}, b""
            content = repository[file]
            return 200, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, content
        if m := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return 200, {"Accept-Ranges": "bytes"}, self.datasets[m[1]][m[2]]
        return 404, {}, b"no such page"

    def rows_api(self, path, query):
        found = [key for key in self.rows if key[0] == query["dataset"]]
        if not found or query["dataset"] in self.gated:  # the real one does not tell these two apart either
            return refused(401, "ExternalUnauthenticatedError")
        if path == "/splits":
            return as_json({"splits": [dict(zip(("dataset", "config", "split"), key)) for key in found]})
        rows = self.rows.get((query["dataset"], query["config"], query["split"]))
        if rows is None or int(query["length"]) > 100:
            return refused(422, "UnprocessableEntityError")
        at = int(query["offset"])
        page = [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(rows)][at:at + 100]
        return as_json({"features": [], "num_rows_total": len(rows), "num_rows_per_page": 100, "partial": False,
                        "rows": page[:int(query["length"])]})


def etag(content):
    return hashlib.sha1(content).hexdigest()


def as_json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def refused(status, code):
    return status, {"X-Error-Code": code, "X-Error-Message": code}, json.dumps({"error": code}).encode()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        url, wanted = urlsplit(self.path), self.headers.get("Range", "")
        self.hub.log.append((self.command, self.path, wanted))
        fault = next((f for f in self.hub.faults if f[0] in self.path and self.command == "GET"), None)
        if fault:
            self.hub.faults.remove(fault)
            fault = fault[1]
        status, headers, body = self.hub.answer(url.path, parse_qs(url.query))
        if isinstance(fault, tuple):
            status, headers, body = *fault, b"<html>busy</html>"
        if status == 200 and "Accept-Ranges" in headers and wanted:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            last = min(int(last or len(body)), len(body) - 1)
            status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}
            body = body[int(first):last + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:fault] if isinstance(fault, int) else body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass
