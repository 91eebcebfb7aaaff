"""A small Hub on the loopback: repositories with commits and branches, LFS objects, tokens, gates, and failures on demand.

It answers what huggingface_hub asks to create, upload, list and download, keeps everything in memory, and records every
request. A failure is `hub.fail(...)`: a status or a cut connection, for requests that match, as often as asked.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MAX_REGULAR = 4096
LARGE = (".safetensors", ".png", ".bin")


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)

    def files(self, revision):
        """path -> bytes, or None for no such revision."""
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch, files):
        name = json.dumps([branch, len(self.commits), sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())])
        sha = hashlib.sha1(name.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


@dataclass
class Failure:
    method: str
    pattern: str
    status: int
    headers: dict
    times: int
    cut: int | None


class LoopbackHub:
    """Use as a context manager; `url` is its endpoint."""

    def __init__(self):
        self.repos, self.objects = {}, {}
        self.tokens = {}
        """Token -> {"name": user, "write": bool}."""
        self.requests, self.failures, self.put_bytes = [], [], {}
        self.last_range = None
        self.echo = False
        """Whether errors repeat the Authorization header, as no server should."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo, files, **kinds):
        """A repository with one commit on main; its sha."""
        found = self.repos.setdefault(repo, Repo(**kinds))
        return found.commit("main", files)

    def fail(self, method, pattern, status=500, times=10**6, cut=None, **headers):
        """Answer requests whose path matches `pattern` with a status, or break off after `cut` bytes of the body."""
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        self.failures.append(Failure(method, pattern, status, names, times, cut))

    def asked(self, method, pattern):
        """How many requests there were."""
        return sum(seen == method and re.search(pattern, path) is not None for seen, path in self.requests)


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self._serve("GET")

        def do_HEAD(self):
            self._serve("HEAD")

        def do_POST(self):
            self._serve("POST")

        def do_PUT(self):
            self._serve("PUT")

        def _serve(self, method):
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            hub.requests.append((method, path))
            failure = next(
                (f for f in hub.failures if f.times > 0 and f.method == method and re.search(f.pattern, path)), None
            )  # fmt: skip
            if failure is not None:
                failure.times -= 1
                if failure.cut is None or method in ("POST", "HEAD"):
                    self._body()
                    return self._error(failure.status, failure.headers.get("X-Error-Code"), failure.headers)
                if method == "PUT":
                    # Part of the object came; nothing of it is kept.
                    self.rfile.read(min(failure.cut, int(self.headers.get("Content-Length") or failure.cut)))
                    return self._hang_up()
            self.cut = failure.cut if failure is not None else None
            word = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.user = hub.tokens.get(word)
            if word and self.user is None and not path.startswith("/lfs/"):
                self._body()
                return self._error(401, None, {"X-Error-Message": "Invalid credentials in Authorization header"})
            for pattern, route in ROUTES:
                if match := re.fullmatch(pattern, f"{method} {path}"):
                    return getattr(self, route)(*match.groups(), **{k: v[0] for k, v in parse_qs(parts.query).items()})
            self._body()
            self._error(501, None, {"X-Error-Message": f"no route for {method} {path}"})

        # What goes out.

        def _send(self, status, data=b"", headers=None, kind="application/json"):
            data = json.dumps(data).encode() if not isinstance(data, bytes) else data
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.cut is not None and len(data) > self.cut:
                self.wfile.write(data[: self.cut])
                self.wfile.flush()
                return self._hang_up()
            self.wfile.write(data)

        def _error(self, status, code=None, headers=None):
            said = {"X-Error-Code": code} if code else {}
            if hub.echo:
                word = self.headers.get("Authorization", "nothing")
                said |= {"X-Error-Message": f"you sent {word}", "X-HF-Warning": f"{word}; you sent {word}"}
            self.cut = None
            self._send(status, {"error": said.get("X-Error-Message", "failed")}, {**(headers or {}), **said})

        def _hang_up(self):
            self.close_connection = True
            self.connection.close()

        def _body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        # Who may what.

        def _may(self, repo, write=False):
            """The repository, or None after an error was sent."""
            found = hub.repos.get(repo)
            owner = self.user is not None and self.user["name"] == repo.split("/")[0]
            if found is None or (found.private and not owner):
                return self._error(404 if self.user else 401, "RepoNotFound")
            if found.gated and not owner and self.command in ("GET", "HEAD") and "/resolve/" in self.path:
                return self._error(403 if self.user else 401, "GatedRepo")
            if write and not (owner and self.user["write"]):
                return self._error(403)
            return found

        # Routes.

        def whoami(self):
            return self._send(200, {"type": "user", "name": self.user["name"], "orgs": []}) if self.user else self._error(401)

        def nothing(self):
            self._send(200, {"standardEnvVars": [], "harnesses": []})

        def validate(self):
            self._body()
            self._send(200, {"errors": [], "warnings": []})

        def create(self):
            asked = json.loads(self._body())
            if self.user is None:
                return self._error(401)
            owner = asked.get("organization") or self.user["name"]
            if owner != self.user["name"] or not self.user["write"]:
                return self._error(403)
            name = f"{owner}/{asked['name']}"
            if name in hub.repos:
                return self._send(409, {"error": "there already", "url": f"{hub.url}/{name}"})
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repos[name] = Repo(private=private)
            hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._send(200, {"url": f"{hub.url}/{name}"})

        def info(self, repo, _=None, revision="main", **query):
            if found := self._may(repo):
                if (files := found.files(revision)) is None:
                    return self._error(404, "RevisionNotFound")
                sha = found.branches.get(revision, revision)
                self._send(200, {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "gated": found.gated,
                                 "tags": [], "siblings": [{"rfilename": name} for name in sorted(files)]})  # fmt: skip

        def tree(self, repo, revision, **query):
            if found := self._may(repo):
                if (files := found.files(revision)) is None:
                    return self._error(404, "RevisionNotFound")
                self._send(200, [_entry(name, data) for name, data in sorted(files.items())])

        def branch(self, repo, name):
            self._body()
            if found := self._may(repo, write=True):
                if name in found.branches:
                    return self._error(409)
                found.branches[name] = found.branches["main"]
                self._send(200, {})

        def preupload(self, repo, revision):
            asked = json.loads(self._body())
            if found := self._may(repo, write=True):
                there = found.files(revision) or {}
                files = []
                for file in asked["files"]:
                    mode = "lfs" if file["path"].endswith(LARGE) or file["size"] > 10 * MAX_REGULAR else "regular"
                    entry = _entry(file["path"], there[file["path"]]) if file["path"] in there else {}
                    oid = entry.get("lfs", {}).get("oid") or entry.get("oid")
                    files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
                self._send(200, {"files": files})

        def batch(self, repo):
            asked = json.loads(self._body())
            if self._may(repo, write=True):
                objects = []
                for each in asked["objects"]:
                    known = {} if each["oid"] in hub.objects else {
                        "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}  # fmt: skip
                    objects.append({"oid": each["oid"], "size": each["size"], **known})
                self._send(200, {"transfer": "basic", "objects": objects})

        def put(self, oid):
            data = self._body()
            hub.put_bytes[oid] = hub.put_bytes.get(oid, 0) + len(data)
            if hashlib.sha256(data).hexdigest() != oid:
                return self._error(400)
            hub.objects[oid] = data
            self._send(200)

        def commit(self, repo, revision):
            lines = [json.loads(line) for line in self._body().decode().splitlines()]
            if found := self._may(repo, write=True):
                if revision not in found.branches:
                    return self._error(404, "RevisionNotFound")
                parent = lines[0]["value"].get("parentCommit")
                if parent is not None and parent != found.branches[revision]:
                    return self._error(412)
                files = dict(found.files(revision))
                for line in lines[1:]:
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        if value["oid"] not in hub.objects:
                            return self._error(400)
                        files[value["path"]] = hub.objects[value["oid"]]
                    elif line["key"] == "deletedFile":
                        files.pop(value["path"])
                sha = found.commit(revision, files)
                self._send(200, {"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})

        def resolve(self, repo, revision, name):
            if found := self._may(repo):
                if (files := found.files(revision)) is None:
                    return self._error(404, "RevisionNotFound")
                if name not in files:
                    return self._error(404, "EntryNotFound")
                data = files[name]
                entry = _entry(name, data)
                headers = {"X-Repo-Commit": found.branches.get(revision, revision), "Accept-Ranges": "bytes",
                           "ETag": f'"{entry.get("lfs", {}).get("oid") or entry["oid"]}"'}  # fmt: skip
                status = 200
                hub.last_range = self.headers.get("Range", hub.last_range)
                if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                    data, status = data[start : end + 1], 206
                self._send(status, data, headers, "application/octet-stream")

    return Handler


def _entry(name, data):
    """A file of a tree as the Hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if name.endswith(LARGE) or len(data) > 10 * MAX_REGULAR:
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


REPO = r"([^/]+/[^/]+?)"
ROUTES = [
    (r"GET /api/agent-harnesses", "nothing"),
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/validate-yaml", "validate"),
    (r"POST /api/repos/create", "create"),
    (rf"GET /api/models/{REPO}", "info"),
    (rf"GET /api/models/{REPO}/(revision)/(.+)", "info"),
    (rf"GET /api/models/{REPO}/tree/(.+)", "tree"),
    (rf"POST /api/models/{REPO}/branch/(.+)", "branch"),
    (rf"POST /api/models/{REPO}/preupload/(.+)", "preupload"),
    (rf"POST /api/models/{REPO}/commit/(.+)", "commit"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "put"),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", "resolve"),
]
