"""A small Hub on this machine, which really stores: what push and download ask of the real one, its errors on demand.

    with StandIn({"hf_...": Account("ann")}) as hub:
        HfApi(endpoint=hub.endpoint, token="hf_...").create_repo("ann/model")

Models only; a branch is a list of commits, each a mapping from path to blob. Files whose name .gitattributes of the
real Hub counts as large (*.safetensors), or that are over `large` bytes, go by LFS, in one part or in several. No Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LICENSES = ("apache-2.0", "mit", "other")


@dataclass
class Account:
    name: str
    role: str = "write"
    organisations: dict[str, str] = field(default_factory=dict)
    """name -> role in it"""

    def may_write(self, owner: str) -> bool:
        return self.role != "read" and (owner == self.name or self.organisations.get(owner) in ("admin", "write"))


@dataclass
class Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """git's: of a large file, that of its pointer."""
        size = len(self.content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()
        stored = pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]]

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for commits in self.branches.values() for one in commits if one.oid == revision), None)


@dataclass
class Fault:
    """What happens to requests instead of, or after, their being answered.

    Attributes:
        request: regular expression that `METHOD /path` has to match from its start.
        kind: a status of HTTP, or the connection ends: "cut" before the request was read, "cut after" it was done, "cut
            amid" the answer.
        times: requests that it happens to.
    """

    request: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class StandIn:
    def __init__(self, accounts: dict[str, Account], large: int = 1 << 20, part: int | None = None) -> None:
        self.accounts, self.large, self.part = accounts, large, part
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}  # large files by SHA-256, committed or not
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.before: Callable[[str], None] = lambda request: None

    def __enter__(self) -> StandIn:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, request: str, kind: int | str, times: int = 1, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(request, kind, times, named))

    def asked(self, pattern: str) -> list[str]:
        """The requests, as `METHOD /path`, that match from their start."""
        return [request for request in self.requests if re.match(pattern, request)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo_id].commit(revision)
        assert commit is not None
        return {path: blob.content for path, blob in commit.files.items() if path != ".gitattributes"}

    def create(self, repo_id: str, private: bool = True) -> Repository:
        first = Commit(_oid(repo_id), "initial commit", {".gitattributes": Blob(ATTRIBUTES, False)})
        self.repositories[repo_id] = Repository(private, {"main": [first]})
        return self.repositories[repo_id]

    def add(self, repo_id: str, branch: str, files: dict[str, bytes], title: str = "by hand") -> Commit:
        """Commits files on top of a branch, as somebody else would."""
        commits = self.repositories[repo_id].branches[branch]
        blobs = {path: Blob(content, path.endswith(".safetensors")) for path, content in files.items()}
        commits.append(Commit(_oid(commits[-1].oid + title + branch), title, commits[-1].files | blobs))
        return commits[-1]


def in_place_of_the_hub(hub: StandIn, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client in this process talks to the stand-in, logged in, without pauses, Xet and progress bars.

    The client reads its environment when it is imported, so that setting HF_ENDPOINT would come too late.
    """
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setitem(import_module("huggingface_hub.utils.tqdm").progress_bar_states, "_global", False)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


class _Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart, and would wait for each other
    hub: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(request)
            hub.before(request)
            fault = next((one for one in hub.faults if one.times > 0 and re.match(one.request, request)), None)
            if fault is not None:
                fault.times -= 1
            if fault is not None and fault.kind == "cut":
                return self._cut()
            body = self._body()
            if fault is not None and isinstance(fault.kind, int):
                return self._send(fault.kind, {"error": f"made to fail with {fault.kind}"}, fault.headers)
            try:
                status, content, *headers = self._answer(path, body)
            except _Refusal as refusal:
                named = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                return self._send(refusal.status, {"error": refusal.message}, named)
        if fault is not None and fault.kind == "cut after":
            return self._cut()
        self._send(status, content, headers[0] if headers else {}, amid=fault is not None)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: Any, headers: dict[str, str], amid: bool = False) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if amid else body)
        if amid:
            self._cut()

    # ------------------------------------------------------------------------------------------------------- who, where

    def _account(self) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.accounts:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.accounts[token]

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        account, owner = self._account(), repo_id.partition("/")[0]
        repository = self.hub.repositories.get(repo_id)
        sees = repository and (
            not repository.private or (account and (account.may_write(owner) or account.name == owner))
        )
        if not sees:
            raise _Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and (account is None or not account.may_write(owner)):
            raise _Refusal(403, f"You don't have write access to {repo_id}")
        assert repository is not None
        return repository

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.commit(revision)
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---------------------------------------------------------------------------------------------------------- answers

    def _answer(self, path: str, body: bytes) -> tuple[Any, ...]:
        method = "GET" if self.command == "HEAD" else self.command
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return answer(self, body, *match.groups())
        raise _Refusal(404, f"the stand-in has no {self.command} {path}")

    def _whoami(self, body: bytes) -> tuple[Any, ...]:
        account = self._account()
        if account is None:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        organisations = [{"name": name, "roleInOrg": role} for name, role in account.organisations.items()]
        token = {"displayName": "token", "role": account.role}
        return 200, {"name": account.name, "orgs": organisations, "auth": {"accessToken": token}}

    def _create(self, body: bytes) -> tuple[Any, ...]:
        wanted, account = json.loads(body), self._account()
        owner = wanted["organization"] or (account.name if account else "")
        repo_id = f"{owner}/{wanted['name']}"
        if account is None or not account.may_write(owner):
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return 409, url | {"error": "You already created this model repo"}
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.create(repo_id, private=bool(private))
        return 200, url

    def _auth_check(self, body: bytes, repo_id: str, write: str | None) -> tuple[Any, ...]:
        self._repository(repo_id, write=bool(write))
        return 200, {}

    def _info(self, body: bytes, repo_id: str, revision: str | None) -> tuple[Any, ...]:
        repository = self._repository(repo_id)
        commit = self._commit(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return 200, {"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings}

    def _refs(self, body: bytes, repo_id: str) -> tuple[Any, ...]:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in self._repository(repo_id).branches.items()
        ]
        return 200, {"branches": branches, "converts": [], "tags": []}

    def _commits(self, body: bytes, repo_id: str, revision: str) -> tuple[Any, ...]:
        commits = self._repository(repo_id).branches.get(revision, [])
        date = "2026-01-01T00:00:00.000Z"
        return 200, [
            {"id": one.oid, "title": one.title, "message": "", "authors": [], "date": date} for one in commits[::-1]
        ]

    def _tree(self, body: bytes, repo_id: str, revision: str) -> tuple[Any, ...]:
        commit = self._commit(self._repository(repo_id), revision)
        entries = []
        for path, blob in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.large:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        return 200, entries

    def _validate_card(self, body: bytes) -> tuple[Any, ...]:
        head = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.S)
        found = re.search(r"^license: *(.*)$", head.group(1), re.M) if head else None
        if found and found.group(1) not in LICENSES:
            message = f'"license" must be one of [{", ".join(LICENSES)}]'
            return 400, {"error": "Invalid metadata", "errors": [{"message": message}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> tuple[Any, ...]:
        commit = self._commit(self._repository(repo_id, write=True), revision)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > self.hub.large
            there = commit.files.get(file["path"])
            oid = None if there is None else there.sha256 if there.large else there.oid
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return 200, {"files": answers}

    def _batch(self, body: bytes, repo_id: str) -> tuple[Any, ...]:
        self._repository(repo_id, write=True)
        objects = []
        for one in json.loads(body)["objects"]:
            oid, size, base = one["oid"], one["size"], f"{self.hub.endpoint}/lfs"
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.store:
                upload: dict[str, Any] = {"href": f"{base}/{oid}?signature=abcdef"}
                if self.hub.part and size > self.hub.part:
                    count = -(-size // self.hub.part)
                    urls = {
                        str(number): f"{base}/{oid}/part/{number}?signature=abcdef" for number in range(1, count + 1)
                    }
                    upload = {"href": f"{base}/{oid}/complete", "header": {"chunk_size": str(self.hub.part)} | urls}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{base}/{oid}/verify"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> tuple[Any, ...]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "content does not have the digest that was announced")
        self.hub.store[oid] = body
        return 200, {}

    def _put_part(self, body: bytes, oid: str, number: str) -> tuple[Any, ...]:
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        return 200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def _complete(self, body: bytes, oid: str) -> tuple[Any, ...]:
        parts = self.hub.parts[oid]
        for part in json.loads(body)["parts"]:
            if part["etag"].strip('"') != hashlib.md5(parts[part["partNumber"]]).hexdigest():
                raise _Refusal(400, "a part is not what it was")
        return self._put(b"".join(parts[number] for number in sorted(parts)), oid)

    def _verify(self, body: bytes, oid: str) -> tuple[Any, ...]:
        if len(self.hub.store.get(oid, b"")) != json.loads(body)["size"]:
            raise _Refusal(404, "no such object")
        return 200, {}

    def _branch(self, body: bytes, repo_id: str, branch: str) -> tuple[Any, ...]:
        repository = self._repository(repo_id, write=True)
        if branch in repository.branches:
            raise _Refusal(409, "Reference already exists")
        start = self._commit(repository, json.loads(body or b"{}").get("startingPoint", "main"))
        repository.branches[branch] = [start]
        return 200, {}

    def _make_commit(self, body: bytes, repo_id: str, branch: str) -> tuple[Any, ...]:
        repository = self._repository(repo_id, write=True)
        if branch not in repository.branches:
            raise _Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        commits = repository.branches[branch]
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, commits[-1].oid):
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(commits[-1].files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.store:
                    raise _Refusal(400, f"the file of {value['path']} was not uploaded")
                files[value["path"]] = Blob(self.hub.store[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = Commit(_oid(commits[-1].oid + header["summary"] + branch), header["summary"], files)
        commits.append(commit)
        return 200, {"commitOid": commit.oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"}

    def _resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> tuple[Any, ...]:
        commit = self._commit(self._repository(repo_id), revision)
        if path not in commit.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        etag = f'"{blob.sha256 if blob.large else blob.oid}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit.oid, "Content-Type": "application/octet-stream"}
        content, status = blob.content, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        return status, content, headers


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Callable[..., tuple[Any, ...]]]] = [
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate_card),
    (rf"GET /api/models/{_ID}/auth-check(/write)?", _Handler._auth_check),
    (rf"GET /api/models/{_ID}(?:/revision/([\w.-]+))?", _Handler._info),
    (rf"GET /api/models/{_ID}/refs", _Handler._refs),
    (rf"GET /api/models/{_ID}/commits/([\w.-]+)", _Handler._commits),
    (rf"GET /api/models/{_ID}/tree/([\w.-]+)", _Handler._tree),
    (rf"POST /api/models/{_ID}/preupload/([\w.-]+)", _Handler._preupload),
    (rf"POST /api/models/{_ID}/branch/([\w.-]+)", _Handler._branch),
    (rf"POST /api/models/{_ID}/commit/([\w.-]+)", _Handler._make_commit),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /lfs/(\w+)", _Handler._put),
    (r"PUT /lfs/(\w+)/part/(\d+)", _Handler._put_part),
    (r"POST /lfs/(\w+)/complete", _Handler._complete),
    (r"POST /lfs/(\w+)/verify", _Handler._verify),
    (rf"GET /{_ID}/resolve/([\w.-]+)/(.+)", _Handler._resolve),
]
