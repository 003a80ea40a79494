"""A stand-in for the Hugging Face Hub on the loopback interface: repositories of models, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the stand-in holds.

    Attributes:
        files: of each repository, by path.
        private: the repositories that were made private.
        tokens: what each request was authorized by.
        address: of the stand-in.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.address = ""

    def commit(self, repository: str) -> str:
        """Return the revision: a hash of the files."""
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.files[repository].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Answer on a free port of 127.0.0.1 until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self) -> tuple[str, str] | None:
        """Return the repository asked about, and the rest of the path; None after answering that it is none."""
        self.hub.tokens.add(self.headers.get("Authorization"))
        match = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?$", self.path.split("?")[0])
        if match is None or match[1] not in self.hub.files:
            self._answer(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        return match[1], match[2] or ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = self._repository()
        if asked is None:
            return
        repository, rest = asked
        files, commit = self.hub.files[repository], self.hub.commit(repository)
        if rest.startswith("resolve/"):
            revision, path = rest.removeprefix("resolve/").split("/", 1)
            if revision not in ("main", commit) or path not in files:
                self._answer(404, b"", X_Error_Code="EntryNotFound")
                return
            etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
            self._answer(200, files[path], ETag=etag, X_Repo_Commit=commit)
            return
        if rest.startswith("revision/") and rest.removeprefix("revision/") not in ("main", commit):
            self._answer(404, b"", X_Error_Code="RevisionNotFound")
            return
        if rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            self._answer(200, tree)
            return
        siblings = [{"rfilename": path} for path in files]
        self._answer(200, {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []})

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rsplit("/", 1)[-1]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if self.headers.get("Authorization") is None:
                self._answer(401, {"error": "Invalid username or password."})
                return
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self.hub.files.setdefault(name, {})
            self._answer(200, {"url": f"{self.hub.address}/{name}", "id": name, "name": name})
            return
        if self.path.split("?")[0].startswith("/api/validate-yaml"):
            self._answer(200, {"errors": [], "warnings": []})
            return
        asked_about = self._repository()
        if asked_about is None:
            return
        repository, rest = asked_about
        if rest.startswith("preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "lfs" if p.endswith("safetensors") else "regular"} for p in paths]
            self._answer(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif rest == "info/lfs/objects/batch":
            objects = [
                one | {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        elif rest.startswith("commit/"):
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404)

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repository][value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.commit(repository)
        self._answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}/{repository}/commit/{oid}"}
        )

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
