"""A Hub in one HTTP server: it records commits and serves the files of the last one."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml


class RecordingHub:
    """Serves on a free local port while used as a context manager.

    Attributes:
        commits: (repository, summary, paths, description) of each commit, in order; a branch other than main shows as
            "repository@branch".
        files: {repository or "repository@branch": {path: content}}.
        endpoint: URL for HF_ENDPOINT.
    """

    def __init__(self):
        self.commits: list[tuple[str, str, list[str], str]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: RecordingHub

    def log_message(self, *_):
        """Says nothing."""

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path), self.read_body()
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'someone'}/{request['name']}"
            self.state.files.setdefault(repo, {})
            self.answer_json({"url": f"{self.state.endpoint}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            errors = [] if isinstance(header, dict) else [{"message": "the card has no header"}]
            self.answer_json({"errors": errors, "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{self.state.endpoint}/upload/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.answer_json({"transfer": "basic", "objects": objects})
        elif "/branch/" in path:
            repo, branch = path.removeprefix("/api/models/").split("/branch/")
            if self.known(repo, branch) in self.state.files:
                return self.answer_json({"error": "the branch exists"}, 409)
            self.state.files[self.known(repo, branch)] = dict(self.state.files[repo])
            return self.answer_json({})
        elif "/commit/" in path:
            self.record(self.known(*path.removeprefix("/api/models/").split("/commit/")), body)
        else:
            self.answer_json({"error": f"not built: POST {path}"}, 404)
        return None

    @staticmethod
    def known(repo: str, revision: str) -> str:
        """What a branch of a repository is called in `files`; every commit counts as main's."""
        return repo if revision == "main" or len(revision) == 40 else f"{repo}@{revision}"

    def record(self, repo: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        summary, description, paths = "", "", []
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary, description = value["summary"], value["description"]
                continue
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            else:
                content = self.state.large[value["oid"]]
            self.state.files[repo][value["path"]] = content
            paths.append(value["path"])
        self.state.commits.append((repo, summary, paths, description))
        url = f"{self.state.endpoint}/{repo}/commit/{'0' * 40}"
        self.answer_json({"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def do_PUT(self):
        body, oid = self.read_body(), self.path.rsplit("/", 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, b"the content does not have this hash")
        self.state.large[oid] = body
        return self.answer(200, b"")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if "/resolve/" in path:
            repo, rest = path.strip("/").split("/resolve/")
            revision, name = rest.split("/", 1)
            if self.known(repo, revision) not in self.state.files:
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            commit = f"{sum(self.known(repo, revision) == each[0] for each in self.state.commits):040x}"
            content = self.state.files[self.known(repo, revision)].get(name)
            if content is not None:
                etag = hashlib.sha256(content).hexdigest()
                return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.answer(404, b"", missing)
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").split("/revision/")[0].split("/tree/")[0]
            names = [{"rfilename": name} for name in self.state.files.get(repo, {})]
            if "/tree/" in path:
                sizes = self.state.files.get(repo, {}).items()
                tree = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in sizes]
                return self.answer_json(tree)
            return self.answer_json({"id": repo, "sha": "0" * 40, "siblings": names})
        return self.answer_json({"error": f"not built: GET {path}"}, 404)
