"""A Hugging Face Hub for tests: on loopback, of the standard library, with faults on demand.

It speaks what huggingface_hub 2.4 and datasets 5.2 ask of dataset repositories where `HF_HUB_DISABLE_XET=1` is set before
their import: large files go through LFS with the "basic" transfer. The client must have `HF_ENDPOINT` set as early.
Models can be read: to this Hub they are repositories like any other.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
LFS_BATCH = re.compile(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
LFS_OBJECT = re.compile(r"/lfs/([0-9a-f]{64})(/verify)?")
IN_LFS = (".parquet", ".png")
DATE = "2026-01-01T00:00:00.000Z"


class MiniHub:
    """`with MiniHub() as hub:` serves at `hub.url`. `tokens`: token -> user; a user writes in its own namespace only.

    `repos[id]["commits"]` is the history of a repository, oldest first: each `{"id", "files": {path: {"key", "oid", "size",
    "lfs"}}}`; `blobs[key]` are contents; `log` is every request, as `(method, path)`.
    """

    def __init__(self):
        self.tokens = {"hf_writer": "user"}
        self.private = False  # what a new repository is that nobody asked a visibility for, as an organisation sets it
        self.repos, self.blobs, self.log, self.faults = {}, {}, [], []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, pattern: str, do: str, status: int = 500):
        """Spoil the next request that fits. `do`: `"status"`, answer with `status`; `"close"`, hang up; `"after"`, do the
        work and hang up instead of answering; `"corrupt"`, flip the first byte of what is sent."""
        self.faults.append((method, re.compile(pattern), do, status))

    def publish(self, repo_id: str, folder):
        """A new commit that holds the files of `folder`, as if somebody had pushed them."""
        files = {}
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            self.blobs[git_oid(data)] = data
            files[path.name] = {"key": git_oid(data), "oid": git_oid(data), "size": len(data), "lfs": False}
        repo = self.repos.setdefault(repo_id, {"private": False, "commits": []})
        commit = hashlib.sha1(json.dumps([files, len(repo["commits"])]).encode()).hexdigest()
        repo["commits"].append({"id": commit, "files": files})
        return commit

    def take_fault(self, method: str, path: str):
        """What to do to this request, and the status; each fault is used once."""
        for fault in self.faults:
            if fault[0] == method and fault[1].search(path):
                self.faults.remove(fault)
                return fault[2:]
        return None, None


class Refusal(Exception):
    """An answer other than 200: status, the Hub's error code, text."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silence."""

    def handle_any(self):
        self.hub, parts = self.server.hub, urlsplit(self.path)
        self.query, path = parse_qs(parts.query), unquote(parts.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append((self.command, path))
        self.fault, status = self.hub.take_fault(self.command, path)
        if self.fault == "close":
            return self.hang_up()
        try:
            if self.fault == "status":
                raise Refusal(status, "", "injected")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            self.user = self.hub.tokens.get(token)
            if token and self.user is None:
                raise Refusal(401, "", "Invalid user token.")
            with self.hub.lock:
                self.route(path, body)
        except Refusal as refusal:
            status, code, text = refusal.args
            self.send(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text} if code else {})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def send(self, status: int, answer, headers=None):
        """Answer with JSON, or with bytes as they are."""
        if self.fault == "after":
            return self.hang_up()
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(data),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str, body: bytes):
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := LFS_BATCH.fullmatch(path):
            return self.lfs_batch(json.loads(body))
        if match := LFS_OBJECT.fullmatch(path):
            return self.lfs_object(match[1], body, verify=bool(match[2]))
        if match := RESOLVE.fullmatch(path):
            return self.resolve(*match.groups())
        if match := API.fullmatch(path):
            return self.api(match[1], match[2] or "revision", match[3] or "main", body)
        raise Refusal(404, "", f"no such route: {self.command} {path}")

    def find(self, repo_id: str, *, write: bool = False):
        """The repository, if the user may know of it."""
        owner = self.user == repo_id.split("/")[0]
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo["private"] and not owner):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and not owner:
            raise Refusal(403, "", "Forbidden: no write access")
        return repo

    def commit_of(self, repo, revision: str):
        for commit in reversed(repo["commits"]):
            if revision in ("main", commit["id"]):
                return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def create(self, wish):
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        owner = wish.get("organization") or self.user
        repo_id = f"{owner}/{wish['name']}"
        answer = {"url": f"{self.hub.url}/datasets/{repo_id}", "name": repo_id}
        if owner != self.user:
            raise Refusal(403, "", "no right to write in this namespace")
        if repo_id in self.hub.repos:
            return self.send(409, {"error": "You already created this repo", **answer})
        visibility = wish.get("visibility")
        private = self.hub.private if visibility is None else visibility == "private"
        self.hub.repos[repo_id] = {"private": private, "commits": [{"id": f"{0:040x}", "files": {}}]}
        self.send(200, answer)

    def api(self, repo_id: str, what: str, revision: str, body: bytes):
        repo = self.find(repo_id, write=what in ("preupload", "commit"))
        revision, _, folder = revision.partition("/")
        commit = self.commit_of(repo, revision)
        if what == "revision":
            names = [{"rfilename": path} for path in sorted(commit["files"])]
            about = {"_id": "0", "id": repo_id, "sha": commit["id"], "siblings": names, "private": repo["private"]}
            rest = {"author": self.user, "downloads": 0, "likes": 0, "tags": [], "gated": False, "disabled": False}
            return self.send(200, about | rest | {"lastModified": DATE, "createdAt": DATE})
        if what == "preupload":
            return self.send(200, {"files": [self.upload_mode(file, commit) for file in json.loads(body)["files"]]})
        if what == "commit":
            return self.commit(repo_id, repo, [json.loads(line) for line in body.splitlines() if line.strip()])
        if what == "tree":
            return self.send(200, self.tree(commit["files"], folder))
        if what == "paths-info":
            given = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
            found = [path for path in given["paths"] if path in commit["files"]]
            return self.send(200, [entry(path, commit["files"][path]) for path in found])
        raise Refusal(404, "", f"no such route: {self.command} {self.path}")

    def upload_mode(self, file, commit):
        old = commit["files"].get(file["path"])
        mode = "lfs" if file["path"].endswith(IN_LFS) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | ({"oid": old["key"]} if old else {})

    def commit(self, repo_id: str, repo, lines):
        head = repo["commits"][-1]
        if lines[0]["value"].get("parentCommit") not in (None, head["id"]):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head["files"])
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "deletedFile":
                del files[path]
            elif line["key"] == "lfsFile":
                oid = line["value"]["oid"]
                size = len(self.hub.blobs[oid])
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
                files[path] = {"key": oid, "oid": git_oid(pointer), "size": size, "lfs": True}
            else:
                data = base64.b64decode(line["value"]["content"])
                self.hub.blobs[git_oid(data)] = data
                files[path] = {"key": git_oid(data), "oid": git_oid(data), "size": len(data), "lfs": False}
        new = hashlib.sha1(json.dumps([files, head["id"]]).encode()).hexdigest()
        repo["commits"].append({"id": new, "files": files})
        url = f"{self.hub.url}/datasets/{repo_id}/commit/{new}"
        self.send(200, {"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""})

    def tree(self, files, folder: str):
        inside = {path: file for path, file in files.items() if path.startswith(folder)}
        folders = sorted({path.rpartition("/")[0] for path in inside} - {"", folder.rstrip("/")})
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        listed = [{"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders]
        return [*listed, *(entry(path, file) for path, file in sorted(inside.items()))]

    def lfs_batch(self, wish):
        objects = []
        for item in wish["objects"]:
            href = f"{self.hub.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = item["oid"] in self.hub.blobs
            objects.append({"oid": item["oid"], "size": item["size"]} | ({} if known else {"actions": actions}))
        self.send(200, {"transfer": "basic", "objects": objects, "hash_algo": "sha256"})

    def lfs_object(self, oid: str, body: bytes, *, verify: bool):
        if verify:
            if len(self.hub.blobs.get(oid, b"")) != json.loads(body)["size"]:
                raise Refusal(422, "", "object missing or of another size")
        elif hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "content does not match its sha256")
        else:
            self.hub.blobs[oid] = body
        self.send(200, {})

    def resolve(self, repo_id: str, revision: str, path: str):
        commit = self.commit_of(self.find(repo_id), revision)
        headers = {"X-Repo-Commit": commit["id"]}
        if path not in commit["files"]:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, {"error": "Entry not found"}, headers | code)
        file = commit["files"][path]
        data, status = self.hub.blobs[file["key"]], 200
        headers |= {"ETag": f'"{file["key"]}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file["lfs"]:
            headers |= {"X-Linked-Etag": f'"{file["key"]}"', "X-Linked-Size": len(data)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last, size = int(wanted[1]), int(wanted[2] or len(data) - 1), len(data)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{size}"
        if self.fault == "corrupt":
            data = bytes([data[0] ^ 255]) + data[1:]
        self.send(status, data, headers)


def entry(path: str, file):
    """A file as the Hub lists it."""
    listed = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
    if file["lfs"]:
        listed["lfs"] = {"oid": file["key"], "size": file["size"], "pointerSize": 134}
    return listed


def git_oid(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
