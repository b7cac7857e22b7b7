"""A Hugging Face Hub of one process: the HTTP API that `huggingface_hub` speaks, in memory, on the loopback interface.

The tests talk to it with the real client, so that what they hold is what users get. A repository is a chain of commits;
a commit is a full `{path: File}` snapshot; branches map to commit ids. Large files go through the LFS batch API.

    with MiniHub() as hub:
        environment = hub.environment(cache_folder)   # HF_ENDPOINT, HF_TOKEN, ... for a subprocess
        hub.files("user/repo")["README.md"].content
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "user"
TOKEN = "hf_minihub"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".npz", ".zip", ".gz")
LFS_BYTES = 10 * 2**20
DATE = "2026-01-01T00:00:00.000Z"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "unknown", "other"}


@dataclass(frozen=True)
class File:
    """One version of one file."""

    content: bytes
    is_lfs: bool = False

    @property
    def sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.sha1

    def entry(self, path: str) -> dict[str, Any]:
        described = {"type": "file", "path": path, "size": len(self.content), "oid": self.sha1}
        if self.is_lfs:
            described["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return described


@dataclass
class Commit:
    """A snapshot of all files."""

    files: dict[str, File]
    parent: str | None
    title: str

    @property
    def sha(self) -> str:
        tree = sorted((path, file.sha1) for path, file in self.files.items())
        return hashlib.sha1(json.dumps([tree, self.parent, self.title]).encode()).hexdigest()


@dataclass
class Repository:
    """Commits, and the names that point at them."""

    commits: dict[str, Commit]
    refs: dict[str, str]
    private: bool = False


@dataclass
class State:
    """Everything the server knows."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)


class MiniHub:
    """The server, as a context manager; port 0 takes a free one."""

    def __init__(self, port: int = 0) -> None:
        self.state = State()
        handler = type("BoundHandler", (Handler,), {"state": self.state})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "MiniHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a client's process needs; the variables are read when huggingface_hub is imported."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def repository(self, name: str) -> Repository:
        return self.state.repositories[("model", name)]

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        repository = self.repository(name)
        return repository.commits[repository.refs.get(revision, revision)].files

    def history(self, name: str, revision: str = "main") -> list[str]:
        """Commit titles, newest first."""
        repository, titles = self.repository(name), []
        sha: str | None = repository.refs[revision]
        while sha is not None:
            titles.append(repository.commits[sha].title)
            sha = repository.commits[sha].parent
        return titles


class HubError(Exception):
    """An answer other than success; the client maps `code` (X-Error-Code) to its exception classes."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, answer with JSON or bytes."""

    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, path, body = parse_qs(url.query), unquote(url.path), self.read_body()
        with self.state.lock:
            self.state.requests.append((self.command, path))
            try:
                self.authorize(path)
                for methods, pattern, respond in ROUTES:
                    if self.command in methods and (match := re.fullmatch(pattern, path)):
                        respond(self, body, *match.groups())
                        return
                raise HubError(404, f"no route {self.command} {path}")
            except HubError as error:
                codes = {"X-Error-Code": error.code} if error.code else {}
                self.send(error.status, {"error": str(error)}, codes | {"X-Error-Message": str(error)} | error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def authorize(self, path: str) -> None:
        """Writing needs the token, reading a private repository too."""
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        writes = self.command in ("POST", "PUT", "DELETE") and not path.startswith(("/lfs-", "/api/validate-yaml"))
        if writes and "/paths-info/" not in path and not has_token:
            raise HubError(401, "Invalid username or password.")
        self.has_token = has_token

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":  # LFS uploads are streamed
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(
        self, status: int, body: Any = b"", headers: dict[str, Any] | None = None, kind: str = "application/json"
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repository(self, kind: str, name: str) -> Repository:
        found = self.state.repositories.get((KINDS[kind], name))
        if found is None or (found.private and not self.has_token):
            # As on the real Hub: without a token a missing and a private repository look alike.
            raise HubError(404 if self.has_token else 401, "Repository not found", "RepoNotFound")
        return found

    def commit(self, repository: Repository, revision: str) -> tuple[str, Commit]:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]


def who_am_i(handler: Handler, body: bytes) -> None:
    if not handler.has_token:
        raise HubError(401, "Invalid username or password.")
    role = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    handler.send(200, {"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": [], "auth": role})


def create_repository(handler: Handler, body: bytes) -> None:
    wanted = json.loads(body)
    kind = wanted.get("type") or "model"
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    url = f"http://{handler.headers['Host']}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in handler.state.repositories:
        handler.send(409, {"error": "You already created this repo", "url": url})
        return
    attributes = File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    first = Commit({".gitattributes": attributes}, None, "initial commit")
    private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    handler.state.repositories[(kind, name)] = Repository({first.sha: first}, {"main": first.sha}, private)
    handler.send(200, {"url": url, "name": name, "id": name})


def repository_info(handler: Handler, body: bytes, kind: str, name: str, revision: str = "main") -> None:
    repository = handler.repository(kind, name)
    sha, commit = handler.commit(repository, revision)
    described = {
        "_id": sha, "id": name, "modelId": name, "author": name.split("/")[0], "sha": sha, "lastModified": DATE,
        "createdAt": DATE, "private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
        "tags": [], "siblings": [{"rfilename": path} for path in sorted(commit.files)],
    }  # fmt: skip
    handler.send(200, described)


def list_tree(handler: Handler, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
    _, commit = handler.commit(handler.repository(kind, name), revision)
    prefix = folder.strip("/") + "/" if folder and folder.strip("/") else ""
    inside = {path: file for path, file in sorted(commit.files.items()) if path.startswith(prefix)}
    if prefix and not inside:
        raise HubError(404, f"{folder} does not exist", "EntryNotFound")
    recursive = handler.query.get("recursive", ["false"])[0].lower() in ("1", "true")
    folders: dict[str, None] = {}
    files = []
    for path, file in inside.items():
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folders[prefix + "/".join(parts[:depth])] = None
        if recursive or len(parts) == 1:
            files.append(file.entry(path))
    handler.send(200, [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders] + files)


def paths_info(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    _, commit = handler.commit(handler.repository(kind, name), revision)
    wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
    handler.send(200, [commit.files[path].entry(path) for path in wanted if path in commit.files])


def list_refs(handler: Handler, body: bytes, kind: str, name: str) -> None:
    refs = handler.repository(kind, name).refs
    branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in refs.items()]
    handler.send(200, {"branches": branches, "tags": [], "converts": []})


def create_branch(handler: Handler, body: bytes, kind: str, name: str, branch: str) -> None:
    refs = handler.repository(kind, name).refs
    if branch in refs:
        raise HubError(409, "Reference already exists")
    start = (json.loads(body) if body else {}).get("startingPoint") or "main"
    refs[branch] = refs.get(start, start)
    handler.send(200, {})


def before_upload(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    """Tells the client which files go through LFS, and which are unchanged."""
    _, commit = handler.commit(handler.repository(kind, name), revision)
    answers = []
    for wanted in json.loads(body)["files"]:
        path, old = wanted["path"], commit.files.get(wanted["path"])
        is_lfs = wanted["size"] > LFS_BYTES or path.endswith(LFS_SUFFIXES)
        mode = "lfs" if is_lfs else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old.etag if old else None})
    handler.send(200, {"files": answers})


def lfs_batch(handler: Handler, body: bytes, name: str) -> None:
    base = f"http://{handler.headers['Host']}"
    objects = []
    for wanted in json.loads(body)["objects"]:
        described = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in handler.state.lfs:
            described["actions"] = {
                "upload": {"href": f"{base}/lfs-put/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{base}/lfs-verify/{wanted['oid']}", "header": {}},
            }
        objects.append(described)
    handler.send(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")


def lfs_put(handler: Handler, body: bytes, oid: str) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        raise HubError(400, "sha256 mismatch")
    handler.state.lfs[oid] = body
    handler.send(200)


def lfs_verify(handler: Handler, body: bytes, oid: str) -> None:
    handler.send(200 if oid in handler.state.lfs else 404, {})


def make_commit(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    """A commit is newline-delimited JSON: a header, then one line for each changed file."""
    repository = handler.repository(kind, name)
    sha, old = handler.commit(repository, revision)
    files, header = dict(old.files), {}
    for line in filter(None, map(bytes.strip, body.splitlines())):
        entry = json.loads(line)
        value = entry["value"]
        match entry["key"]:
            case "header":
                header = value
            case "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            case "lfsFile":
                if value["oid"] not in handler.state.lfs:
                    raise HubError(400, f"LFS object {value['oid']} missing")
                files[value["path"]] = File(handler.state.lfs[value["oid"]], is_lfs=True)
            case "deletedFile":
                files.pop(value["path"], None)
            case "deletedFolder":
                files = {
                    path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")
                }
    if header.get("parentCommit") not in (None, sha):
        raise HubError(412, "A commit has happened since.")
    new = Commit(files, sha, header.get("summary", ""))
    repository.commits[new.sha] = new
    repository.refs[revision] = new.sha
    url = f"http://{handler.headers['Host']}/{name}/commit/{new.sha}"
    handler.send(200, {"success": True, "commitOid": new.sha, "commitUrl": url, "hookOutput": ""})


def resolve(handler: Handler, body: bytes, prefix: str | None, name: str, revision: str, path: str) -> None:
    sha, commit = handler.commit(handler.repository((prefix or "models/").rstrip("/"), name), revision)
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
    file = commit.files[path]
    headers: dict[str, Any] = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.is_lfs:
        headers |= {"X-Linked-Size": len(file.content), "X-Linked-Etag": f'"{file.etag}"'}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if wanted and handler.command == "GET":
        start, stop = int(wanted[1]), int(wanted[2] or len(file.content) - 1)
        headers["Content-Range"] = f"bytes {start}-{stop}/{len(file.content)}"
        handler.send(206, file.content[start : stop + 1], headers, "application/octet-stream")
        return
    headers["Content-Length"] = len(file.content)
    handler.send(200, file.content, headers, "application/octet-stream")


def validate_card(handler: Handler, body: bytes) -> None:
    """The Hub's check of a card's metadata, as far as it is documented for model cards."""
    problems = card_problems(json.loads(body)["content"])
    if problems:
        handler.send(400, {"errors": [{"message": problem} for problem in problems], "warnings": []})
        return
    handler.send(200, {"errors": [], "warnings": []})


def card_problems(card: str) -> list[str]:
    """What the Hub would refuse in the YAML block of a model card."""
    block = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    if block is None:
        return ["no metadata block"]
    data, problems = yaml.safe_load(block[1]), []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    if data.get("license") not in LICENSES:
        problems.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not re.fullmatch(r"[a-z0-9.\-]+", data.get("license_name") or ""):
        problems.append('"license_name" must be a lower-case identifier when "license" is "other"')
    for key in ("tags", "datasets", "language"):
        if not isinstance(data.get(key, []), list) or not all(isinstance(item, str) for item in data.get(key, [])):
            problems.append(f'"{key}" must be a list of strings')
    if not isinstance(data.get("extra_gated_fields", {}), dict):
        problems.append('"extra_gated_fields" must be a mapping')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model["name"]:
            problems.append('"model-index[].name" must be a string')
        for result in model.get("results", []):
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                for key in keys:
                    if not isinstance(result.get(part, {}).get(key), str):
                        problems.append(f'"model-index[].results[].{part}.{key}" is required')
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    problems.append('"model-index[].results[].metrics[]" need type and value')
    return problems


REPO = r"([\w.\-]+/[\w.\-]+)"
KIND = r"(models|datasets|spaces)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", who_am_i),
    ("POST", r"/api/repos/create", create_repository),
    ("POST", r"/api/validate-yaml", validate_card),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/(.+)", before_upload),
    ("POST", rf"/api/{KIND}/{REPO}/commit/(.+)", make_commit),
    ("POST", rf"/api/{KIND}/{REPO}/paths-info/(.+)", paths_info),
    ("POST", rf"/api/{KIND}/{REPO}/branch/(.+)", create_branch),
    ("GET", rf"/api/{KIND}/{REPO}/tree/([^/]+)(/.*)?", list_tree),
    ("GET", rf"/api/{KIND}/{REPO}/refs", list_refs),
    ("GET", rf"/api/{KIND}/{REPO}/revision/(.+)", repository_info),
    ("GET", rf"/api/{KIND}/{REPO}", repository_info),
    ("POST", rf"/(?:datasets/|spaces/)?{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs-put/(\w+)", lfs_put),
    ("POST", r"/lfs-verify/(\w+)", lfs_verify),
    ("GET, HEAD", rf"/(datasets/|spaces/)?{REPO}/resolve/([^/]+)/(.+)", resolve),
]
