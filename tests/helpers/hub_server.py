"""A small Hub on loopback, for the real client: repositories in memory, one branch each."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub
import yaml

LARGE = 10_000  # bytes: files from here on take the way of large files
PART = 40_000  # bytes: larger ones are uploaded in parts
USER = "me"


class Repository:
    """The files at each commit, the newest last."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.commit("initial commit", {})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[name] = files
        self.messages.append(message)
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        name = self.head if revision == "main" else revision
        return (name, self.commits[name]) if name in self.commits else None


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.broken: set[str] = set()
        """What fails: "create" and "commit" with status 500, "upload" by a cut connection."""
        self.may_commit = threading.Event()
        self.may_commit.set()
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    # ---- HTTP --------------------------------------------------------------------------------

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._reply(status, json.dumps(content).encode(), Content_Type="application/json")

    def _missing(self, what: str, **headers: str) -> None:
        self._reply(404, b"{}", X_Error_Code=what, **headers)

    def _cut_the_connection(self) -> None:
        """In the middle of the body, without a word."""
        self.rfile.read(1000)
        reset_at_once = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_at_once)
        self.connection.close()
        self.close_connection = True

    def _handle(self) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        with self.server.lock:
            self.server.requests.append(f"{self.command} /{'/'.join(path)}")
        match self.command, path:
            case "PUT", ["large", oid, part]:
                self._put_large(oid, int(part))
            case "POST", ["large", oid]:
                self._join_parts(oid, json.loads(self._body()))
            case "POST", ["verify"]:
                self._verify(json.loads(self._body()))
            case "POST", ["api", "repos", "create"]:
                self._create(json.loads(self._body()))
            case "POST", ["api", "validate-yaml"]:
                self._validate(json.loads(self._body())["content"])
            case "POST", ["api", "models", owner, name, "preupload", "main"]:
                self._preupload(f"{owner}/{name}", json.loads(self._body()))
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self._batch(json.loads(self._body()))
            case "POST", ["api", "models", owner, name, "commit", "main"]:
                self._commit(f"{owner}/{name}", self._body())
            case "GET" | "HEAD", [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case "GET", ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case "GET", ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case "GET", ["api", "models", owner, name, "tree", revision, *folder]:
                self._tree(f"{owner}/{name}", revision, "/".join(folder))
            case "GET", ["api", "agent-harnesses"]:  # the client's own statistics
                self._missing("EntryNotFound")
            case _:
                self.server.unknown.append(f"{self.command} {self.path}")
                self._body()
                self._reply(501)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    # ---- What the client asks for ------------------------------------------------------------

    def _create(self, wanted: dict[str, Any]) -> None:
        if "create" in self.server.broken:
            return self._reply(500)
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository())
        return self._json({"url": f"{self.server.url}/{name}"}, 409 if exists else 200)

    def _validate(self, card: str) -> None:
        data = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None
        errors = [] if isinstance(data, dict) else [{"message": "metadata is required"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, name: str, wanted: dict[str, Any]) -> None:
        if name not in self.server.repositories:
            return self._missing("RepoNotFound")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        return self._json({"files": files})

    def _batch(self, wanted: dict[str, Any]) -> None:
        self._json({"transfer": "basic", "objects": [self._upload(x) for x in wanted["objects"]]})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.server.large_files:
            return wanted
        url = f"{self.server.url}/large/{oid}"
        upload: dict[str, Any] = {"href": f"{url}/1"}
        if size > PART:
            parts = {str(i + 1): f"{url}/{i + 1}" for i in range(-(-size // PART))}
            upload = {"href": url, "header": {"chunk_size": str(PART), **parts}}
        verify = {"href": f"{self.server.url}/verify"}
        return {**wanted, "actions": {"upload": upload, "verify": verify}}

    def _put_large(self, oid: str, part: int) -> None:
        if "upload" in self.server.broken:
            return self._cut_the_connection()
        body = self._body()
        with self.server.lock:
            self.server.parts.setdefault(oid, {})[part] = body
        return self._reply(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def _join_parts(self, oid: str, wanted: dict[str, Any]) -> None:
        parts = self.server.parts[oid]
        sent = {x["partNumber"]: x["etag"].strip('"') for x in wanted["parts"]}
        received = {i: hashlib.md5(parts[i]).hexdigest() for i in sorted(parts)}
        self._json({}, 200 if sent == received else 400)

    def _verify(self, wanted: dict[str, Any]) -> None:
        oid, parts = wanted["oid"], self.server.parts[wanted["oid"]]
        content = b"".join(parts[i] for i in sorted(parts))
        if hashlib.sha256(content).hexdigest() != oid or len(content) != wanted["size"]:
            return self._reply(400)
        self.server.large_files[oid] = content
        return self._json({})

    def _commit(self, name: str, body: bytes) -> None:
        self.server.may_commit.wait()
        if "commit" in self.server.broken:
            return self._reply(500)
        repository = self.server.repositories[name]
        message, files = "", dict(repository.files)
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.large_files[value["oid"]]
                case other:
                    raise NotImplementedError(other)
        oid = repository.commit(message, files)
        return self._json({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if name not in self.server.repositories:
            self._missing("RepoNotFound")
            return None
        found = self.server.repositories[name].at(revision)
        if found is None:
            self._missing("RevisionNotFound")
        return found

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self._missing("EntryNotFound", X_Repo_Commit=commit)
        else:
            etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
            self._reply(200, files[path], ETag=etag, X_Repo_Commit=commit)

    def _info(self, name: str, revision: str) -> None:
        if (found := self._found(name, revision)) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self._json({"id": name, "sha": found[0], "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        files = {p: x for p, x in found[1].items() if not folder or p.startswith(f"{folder}/")}
        entries = [
            {"type": "file", "path": p, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
            for p, x in files.items()
        ]
        if entries or not folder:
            self._json(entries)
        else:
            self._missing("EntryNotFound")


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.may_commit.set()
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: str) -> None:
    """Let the clients of this process ask the Hub at `url`, which they read when imported."""
    constants = huggingface_hub.constants
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)  # read when it was made
    for module in ("constants", "file_download"):  # versions before 1.0 import it by name
        name = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(name, template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    path = f"{cache}/agent_harnesses.json"
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", path, raising=False)
    # The protocol of the Xet storage is that of its own library.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")  # no other one must be sent
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)
    # The client waits for seconds before it tries again what failed.
    no_wait = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
