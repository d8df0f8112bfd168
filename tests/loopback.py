"""A hub on this machine: it answers like huggingface.co, and fails where a test tells it to.

What it answers was read off what huggingface_hub and datasets ask: the state of a repository, its tree in pages, its
files whole or in ranges (large ones from another place), a README.md with the data set's configs.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3  # entries of a tree; the real hub's pages have 1,000


class Hub:
    """`models[name]` and `datasets[name]` are {path: bytes}; `gated` and `denied` hold names: nobody has logged in, and
    somebody has, whom the owner has not let in.

    `fail(where, *faults)`: the next GETs whose path contains `where` fail, one fault each: (status, headers)
    instead of an answer, or a number: the connection drops after so many bytes of it. `log` holds what was asked:
    (method, path with query, Range header or "").
    """

    def __init__(self):
        self.models, self.datasets, self.log, self.faults = {}, {}, [], []
        self.gated: set[str] = set()
        self.denied: set[str] = set()
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
        if m := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return 200, {"Accept-Ranges": "bytes"}, self.datasets[m[1]][unquote(m[2])]
        m = (re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/?(revision|tree)?/?([^/]*)/?(.*)", path)
             or re.fullmatch(r"/(datasets)?/?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path))
        if not m:
            return 404, {}, b"no such page"
        kind, name, what, revision, file = m[1], m[2], m[3], m[4], unquote(m[5])
        files = (self.datasets if kind == "datasets" else self.models).get(name)
        if files is None:
            return refused(401, "RepoNotFound")
        if revision not in ("", "main", commit(files)):
            return refused(404, "RevisionNotFound")
        if what == "resolve":
            if name in self.gated | self.denied and file != "README.md":  # what a data set is, everybody may read
                return refused(401 if name in self.gated else 403, "GatedRepo")
            if file not in files:
                return refused(404, "EntryNotFound")
            headers = {"ETag": f'"{etag(files[file])}"', "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
            if kind and len(files[file]) > 1000 and not file.endswith(".md"):  # large files live elsewhere
                return 302, {**headers, "Location": f"{self.url}/cdn/{name}/{file}",
                             "X-Linked-Size": len(files[file]), "X-Linked-ETag": headers["ETag"]}, b""
            return 200, headers, files[file]
        if what == "tree":
            return self.tree(path, files, file, query)
        return as_json({"_id": "1", "id": name, "modelId": name, "sha": commit(files), "private": False, "tags": [],
                        "downloads": 0, "gated": name in self.gated | self.denied,
                        "siblings": [{"rfilename": file} for file in files]})

    def tree(self, path, files, folder, query):
        """A page of what lies in a folder, or of all that lies below it; a header says where the next page is."""
        prefix = folder and folder + "/"
        below = {f: c for f, c in files.items() if f.startswith(prefix)}
        if not below and folder:
            return refused(404, "EntryNotFound")
        folders = {"/".join(f.split("/")[:i]) for f in below for i in range(1, f.count("/") + 1)} - {folder}
        entries = [{"type": "directory", "path": f, "oid": etag(f.encode())} for f in folders if f.startswith(prefix)]
        entries += [{"type": "file", "path": f, "size": len(c), "oid": etag(c)} for f, c in below.items()]
        if query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix):]]
        entries.sort(key=lambda entry: entry["path"])
        at = int(query.get("cursor", ["0"])[0])
        status, headers, body = as_json(entries[at:at + PAGE])
        if at + PAGE < len(entries):
            recursive = query.get("recursive", ["false"])[0]
            headers["Link"] = f'<{self.url}{path}?recursive={recursive}&cursor={at + PAGE}>; rel="next"'
        return status, headers, body


def commit(files):
    """Another content is another commit."""
    return hashlib.sha1(repr([(file, etag(content)) for file, content in files.items()]).encode()).hexdigest()


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
