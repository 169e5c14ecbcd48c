"""A hub on loopback: the endpoints that huggingface_hub's client uploads by and that clients load from, over sockets.

It keeps what a hub keeps: repositories with commits, large files by their sum, which survive an upload that ends before
its commit. `faults` is asked before each request and may answer instead, or cut the connection.
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
from urllib.parse import parse_qs, unquote, urlparse

import yaml

TOKEN, READER, OTHER = "hf_write_token", "hf_read_token", "hf_of_another"
USERS = {TOKEN: ("me", "write"), READER: ("me", "read"), OTHER: ("you", "write")}
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "other"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGE = (".safetensors", ".parquet", ".gguf", ".bin", ".arrow")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
PART = 64 * 1024  # larger files go up in parts


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)  # (sha, name -> content)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def at(self, revision: str) -> dict[str, bytes] | None:
        wanted = self.head if revision == "main" else revision
        return next((files for sha, files in self.commits if sha == wanted), None)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha


class Answer(Exception):
    """What a fault, or the hub, says in place of the usual."""

    def __init__(self, status: int, message: str = "", code: str = "", body: dict | None = None):
        self.status, self.body = status, body or {"error": message}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Cut(Exception):
    """The connection is cut after so many bytes of the request's body."""

    def __init__(self, after: int):
        self.after = after


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}  # sha256 -> content
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        repo = self.repos[kind, name] = Repo(private)
        repo.commit({".gitattributes": ATTRIBUTES} | files)
        return repo

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        return {file: data for file, data in self.repos[kind, name].commits[-1][1].items() if file != ".gitattributes"}

    def sent(self, method: str, pattern: str) -> list[str]:
        return [path for verb, path in self.requests if verb == method and re.search(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do(self):
        url = urlparse(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        try:
            with self.server.lock:
                self.server.requests.append((self.command, path))
            try:
                self.server.faults(self.command, path)
            except Cut as cut:
                self.rfile.read(min(cut.after, int(self.headers.get("Content-Length", cut.after))))
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.body = self.read_body()
            with self.server.lock:
                self.route(path)
        except Answer as answer:
            self.read_body()
            self.reply(answer.body, answer.status, answer.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def read_body(self) -> bytes:
        if "body" not in self.__dict__:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                self.body = b""
                while size := int(self.rfile.readline(), 16):
                    self.body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.body

    def reply(self, body, status: int = 200, headers: dict | None = None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.__dict__.pop("body", None)

    def user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Answer(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def json(self) -> dict:
        return json.loads(self.body)

    # -- endpoints ----------------------------------------------------------------------------------------------------

    def route(self, path: str):
        for method, pattern, endpoint in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                return endpoint(self, **found.groupdict())
        raise Answer(404, f"no endpoint {self.command} {path}")

    def whoami(self):
        if not (user := self.user()):
            raise Answer(401, "Invalid username or password.")
        self.reply({"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": user[1]}}})

    def create(self):
        given, user = self.json(), self.user()
        owner = given.get("organization") or user[0]
        kind, name = f"{given.get('type') or 'model'}s", f"{owner}/{given['name']}"
        if user is None or owner != user[0] or user[1] != "write":
            raise Answer(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        if (kind, name) in self.server.repos:
            raise Answer(409, "You already created this repo", body={"url": f"{self.server.url}/{name}"})
        self.server.add(kind, name, {}, private=given.get("visibility") == "private")
        self.reply({"url": f"{self.server.url}/{'datasets/' * (kind == 'datasets')}{name}"})

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.server.repos.get((kind, name))
        mine = user is not None and name.startswith(f"{user[0]}/")
        if repo is None or (repo.private and not mine):
            raise Answer(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not (mine and user[1] == "write"):
            raise Answer(403, "You have read access but not the required permissions for this operation")
        return repo

    def tree_at(self, kind: str, name: str, revision: str) -> tuple[Repo, dict[str, bytes]]:
        repo = self.repo(kind, name)
        files = repo.at(revision)
        if files is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, files

    def info(self, kind: str, name: str, revision: str = "main"):
        repo, files = self.tree_at(kind, name, revision)
        sha = repo.head if revision == "main" else revision
        blobs = "blobs" in self.query
        siblings = [{"rfilename": file} | (_blob(file, data) if blobs else {}) for file, data in files.items()]
        self.reply({"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def validate(self):
        given = self.json()
        front = re.match(r"---\n(.*?)\n---\n", given["content"], re.DOTALL)
        data, errors = yaml.safe_load(front[1]) if front else {}, []
        if "license" in data and data["license"] not in LICENCES:
            errors.append(f'"license" must be one of {sorted(LICENCES)}')
        for key in ("base_model", "datasets", "source_datasets"):
            given_ids = data.get(key) or []
            for each in [given_ids] if isinstance(given_ids, str) else given_ids:
                if not HUB_ID.fullmatch(each):
                    errors.append(f'"{key}" with value "{each}" is not valid. Use an id from the hub')
        for model in data.get("model-index", ()):
            for result in model["results"]:
                if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                    errors.append('"model-index[0].results[0]" needs task and dataset')
                if not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                    errors.append('"model-index[0].results[0].metrics" need type and value')
        if errors:
            told = {"errors": [{"message": each} for each in errors], "warnings": []}
            raise Answer(400, "invalid metadata", body=told)
        self.reply({"errors": [], "warnings": [] if front else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, kind: str, name: str, revision: str):
        files = self.repo(kind, name, write=True).at(revision)
        told = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _oid(each["path"], files[each["path"]]) if each["path"] in files else None,
            }
            for each in self.json()["files"]
        ]
        self.reply({"files": told})

    def batch(self, kind: str | None, name: str):
        self.repo(kind or "models", name, write=True)
        objects = []
        for each in self.json()["objects"]:
            told, oid = {"oid": each["oid"], "size": each["size"]}, each["oid"]
            if oid not in self.server.large:
                up = {"href": f"{self.server.url}/lfs/{oid}"}
                if each["size"] > PART:
                    count = -(-each["size"] // PART)
                    parts = {f"{n + 1:05}": f"{self.server.url}/lfs/{oid}/{n}" for n in range(count)}
                    up = {"href": f"{self.server.url}/lfs/{oid}/done", "header": parts | {"chunk_size": str(PART)}}
                told["actions"] = {"upload": up, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append(told)
        self.reply({"transfer": "basic", "objects": objects})

    def put(self, oid: str, part: str | None = None):
        if part is None:
            self.keep(oid, self.body)
        else:
            self.server.parts[oid, int(part)] = self.body
        self.reply(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def keep(self, oid: str, data: bytes):
        if hashlib.sha256(data).hexdigest() != oid:
            raise Answer(400, "the content's sum is another")
        self.server.large[oid] = data

    def done(self, oid: str):
        given = self.json()
        self.keep(oid, b"".join(self.server.parts.pop((oid, n)) for n in range(len(given["parts"]))))
        self.reply({})

    def verify(self):
        self.user()
        given = self.json()
        if len(self.server.large.get(given["oid"], b"")) != given["size"]:
            raise Answer(404, "not uploaded")
        self.reply({})

    def commit(self, kind: str, name: str, revision: str):
        repo = self.repo(kind, name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        assert lines[0]["key"] == "header"
        if lines[0]["value"].get("parentCommit", repo.head) != repo.head:
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(revision))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Answer(400, f"LFS pointer of {value['path']} points to nothing")
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        sha = repo.commit(files)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def settings(self, kind: str, name: str):
        self.repo(kind, name, write=True).private = self.json()["visibility"] == "private"
        self.reply({})

    def resolve(self, name: str, revision: str, file: str, kind: str | None = None):
        repo, files = self.tree_at(kind or "models", name, revision)
        if file not in files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        data, etag = files[file], _oid(file, files[file])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.head, "Content-Type": "application/octet-stream"}
        if given := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(given[1]), int(given[2]) + 1 if given[2] else len(data)
            return self.reply(data[start:end], 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})
        self.reply(data, headers=headers)

    def tree(self, kind: str, name: str, revision: str, folder: str | None):
        _, files = self.tree_at(kind, name, revision)
        under = f"{(folder or '').strip('/')}/".lstrip("/")
        inside = {file: data for file, data in files.items() if file.startswith(under)}
        if under and not inside:
            raise Answer(404, "Entry not found", "EntryNotFound")
        self.reply(_entries(inside, under, deep=self.query.get("recursive", [""])[0].lower() == "true"))

    def paths(self, kind: str, name: str, revision: str):
        _, files = self.tree_at(kind, name, revision)
        form = self.json() if self.body.startswith(b"{") else parse_qs(self.body.decode())
        wanted = {path.strip("/") for path in form["paths"]}
        self.reply([each for each in _entries(files, "", deep=True) if each["path"] in wanted])


def _entries(files: dict[str, bytes], under: str, deep: bool) -> list[dict]:
    found, folders = [], set()
    for file, data in files.items():
        rest = file.removeprefix(under)
        *above, _ = rest.split("/")
        folders |= {under + "/".join(above[: n + 1]) for n in range(len(above) if deep else min(1, len(above)))}
        if deep or not above:
            blob = _blob(file, data)
            large = {"lfs": blob["lfs"] | {"oid": blob["lfs"]["sha256"]}} if "lfs" in blob else {}
            found.append({"type": "file", "path": file, "oid": blob["blobId"], "size": len(data)} | large)
    return [{"type": "directory", "path": each, "oid": "0" * 40, "size": 0} for each in sorted(folders)] + found


def _oid(file: str, data: bytes) -> str:
    """As the hub names content: by sha256 if large, else as git does."""
    large = file.endswith(LARGE)
    return hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _blob(file: str, data: bytes) -> dict:
    oid = _oid(file, data)
    if not file.endswith(LARGE):
        return {"size": len(data), "blobId": oid}
    return {
        "size": len(data),
        "blobId": hashlib.sha1(oid.encode()).hexdigest(),
        "lfs": {"size": len(data), "sha256": oid, "pointerSize": 134},
    }


REPO = r"/api/(?P<kind>models|datasets)/(?P<name>[\w.-]+/[\w.-]+)"
FILES = r"/(?:(?P<kind>datasets)/)?(?P<name>[\w.-]+/[\w.-]+?)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", REPO, Handler.info),
    ("GET", REPO + r"/revision/(?P<revision>\w+)", Handler.info),
    ("PUT", REPO + "/settings", Handler.settings),
    ("POST", REPO + r"/preupload/(?P<revision>\w+)", Handler.preupload),
    ("POST", REPO + r"/commit/(?P<revision>\w+)", Handler.commit),
    ("GET", REPO + r"/tree/(?P<revision>\w+)(?P<folder>/.*)?", Handler.tree),
    ("POST", REPO + r"/paths-info/(?P<revision>\w+)", Handler.paths),
    ("POST", FILES + r"\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", Handler.put),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/done", Handler.done),
    ("POST", "/lfs/verify", Handler.verify),
    *((verb, FILES + r"/resolve/(?P<revision>\w+)/(?P<file>.+)", Handler.resolve) for verb in ("GET", "HEAD")),
]
