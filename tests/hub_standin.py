"""A stand-in for the Hugging Face hub on 127.0.0.1: serves a folder, read-only, to the real client libraries.

`serve(root)` serves ROOT/models/<org>/<name>/* and ROOT/datasets/<org>/<name>/* while its `with` block runs. With
HF_ENDPOINT set to what it returns and HF_HOME to a fresh folder, `from_pretrained("<org>/<name>")` and
`load_dataset("<org>/<name>")` download as they would from the hub. A repo has one branch, `main`, whose commit id is a
hash of its files. There is no login, upload, LFS, Xet, part of a file or data set viewer, and no folder in a repo.

`load_dataset` reaches for two other hosts and shrugs if they fail: HF_UPDATE_DOWNLOAD_COUNTS=0 spares the one; the
other is the look-up of the name "datasets-server.127.0.0.1", which does not exist.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPO_ID = r"([\w.-]+/[\w.-]+)"
API_ROUTE = re.compile(rf"/api/(models|datasets)/{REPO_ID}(?:/(revision|tree|paths-info)/([^/]+)(/.+)?)?", re.ASCII)
FILE_ROUTE = re.compile(rf"/(?:(datasets)/)?{REPO_ID}/resolve/([^/]+)/([^/]+)", re.ASCII)
AGENT_REGISTRY = {"standardEnvVars": [], "harnesses": {}}  # huggingface_hub asks for it once per HF_HOME and day


class HubError(Exception):
    """An error that the client libraries know by its `X-Error-Code` header."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status, self.code = status, code


class Repo:
    """One model or data set folder as it is now."""

    def __init__(self, root: Path, kind: str, repo_id: str):
        folder = root / kind / repo_id
        if ".." in repo_id.split("/") or not folder.is_dir():
            # The hub says 401, not 404, to a caller without a token: the repo might be private.
            raise HubError(401, "RepoNotFound")
        self.repo_id = repo_id
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.blob_ids = {
            name: hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            for name, content in self.files.items()
        }
        self.commit = hashlib.sha1(repr((kind, repo_id, self.blob_ids)).encode()).hexdigest()

    def check_revision(self, revision: str):
        if revision not in ("main", self.commit):
            raise HubError(404, "RevisionNotFound")

    def describe(self) -> dict:
        siblings = [{"rfilename": name} for name in self.files]
        return {"id": self.repo_id, "sha": self.commit, "siblings": siblings, "tags": [], "private": False}

    def list_files(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": self.blob_ids[name]}
            for name, content in self.files.items()
        ]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle would put 40 ms between them

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))  # also keeps the connection in step
        try:
            self.route(urlsplit(self.path).path, body.decode())
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.code}
            self.send_json({"error": error.code}, error.status, headers)
        except ConnectionError:  # the client went away in the middle of a file
            self.close_connection = True

    do_GET = do_HEAD = do_POST = answer

    def route(self, path: str, body: str):
        if match := FILE_ROUTE.fullmatch(path):
            kind, repo_id, revision, name = match.groups()
            return self.send_file(Repo(self.server.root, kind or "models", repo_id), unquote(revision), unquote(name))
        if match := API_ROUTE.fullmatch(path):
            kind, repo_id, action, revision, folder = match.groups()
            repo = Repo(self.server.root, kind, repo_id)
            repo.check_revision(unquote(revision or "main"))
            if folder:
                raise HubError(404, "EntryNotFound")
            if action == "paths-info":
                wanted = parse_qs(body)["paths"]
                return self.send_json([entry for entry in repo.list_files() if entry["path"] in wanted])
            return self.send_json(repo.list_files() if action == "tree" else repo.describe())
        if path == "/api/agent-harnesses":
            return self.send_json(AGENT_REGISTRY)
        self.server.unanswered.append(f"{self.command} {self.path}")
        return self.send_json({"error": "the stand-in has no such endpoint"}, 404)

    def send_file(self, repo: Repo, revision: str, name: str):
        repo.check_revision(revision)
        # The commit matters where there is no file, too: with it the client remembers that there is none.
        headers = {"X-Repo-Commit": repo.commit}
        if name not in repo.files:
            return self.send_json({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        self.send(200, repo.files[name], headers | {"ETag": f'"{repo.blob_ids[name]}"'}, "application/octet-stream")

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None):
        self.send(status, json.dumps(value).encode(), headers or {}, "application/json")

    def send(self, status: int, body: bytes, headers: dict[str, str], content_type: str):
        self.send_response(status)
        for name, value in (headers | {"Content-Type": content_type, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object):
        self.server.requests.append(format % args)


@contextmanager
def serve(root: Path) -> Iterator[ThreadingHTTPServer]:
    """A running server on a free port: `.endpoint` is its address, `.requests` what it was asked, `.unanswered` that
    for which there is no code here."""
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.root, server.requests, server.unanswered = root, [], []
        server.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
