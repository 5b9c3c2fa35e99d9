"""A Hub on the loopback address, for the real huggingface_hub client: repositories, commits, LFS
uploads, downloads.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OWNER, TOKEN = "someone", "hf_LoopbackTokenForTests"


class LoopbackHub:
    """A context manager; `url` is its address.

    `repos` holds the files by repository, `requests` what was asked (method, path, body),
    `refusals` the status to answer where a path holds a text, for example {"/commit/": 500}.
    """

    def __init__(self):
        self.repos, self.stored, self.requests, self.messages, self.refusals = {}, {}, [], [], {}
        self.private = None

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, self.path, body))
        status = next(
            (status for text, status in self.hub.refusals.items() if text in self.path), None
        )
        if status:
            return self.reply({"error": "refused by the test"}, status)
        if (
            not self.path.startswith("/stored/")
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.reply(
                {"error": f"Invalid credentials: {self.headers.get('Authorization')}"}, 401
            )
        steps = {
            "/repos/create": self.create,
            "/validate-yaml": self.validate,
            "/preupload/": self.preupload,
            "/objects/batch": self.batch,
            "/stored/": self.store,
            "/verify": self.verify,
            "/commit/": self.commit,
        }
        return next(step for text, step in steps.items() if text in self.path)(body)

    do_PUT = do_POST

    def do_GET(self):
        self.hub.requests.append((self.command, self.path, b""))
        for repo, files in self.hub.repos.items():
            if self.path.startswith(f"/api/models/{repo}"):
                return self.reply(
                    {
                        "id": repo,
                        "sha": "0" * 40,
                        "siblings": [{"rfilename": name} for name in files],
                    }
                )
            name = self.path.partition(f"/{repo}/resolve/")[2].partition("/")[2]
            if name in files:
                return self.reply(files[name])
        return self.reply({"error": "not found"}, 404)

    do_HEAD = do_GET

    def reply(self, content, status=200):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization'] or OWNER}/{asked['name']}"
        self.hub.private = asked.get("visibility") == "private" or asked.get("private", False)
        there = repo in self.hub.repos
        self.hub.repos.setdefault(repo, {})
        self.reply({"url": f"{self.hub.url}/{repo}", "name": repo}, 409 if there else 200)

    def validate(self, body):
        self.reply({"errors": [], "warnings": []})

    def preupload(self, body):
        self.reply(
            {
                "files": [
                    {
                        "path": file["path"],
                        "shouldIgnore": False,
                        "oid": None,
                        "uploadMode": "regular" if file["path"].endswith(".md") else "lfs",
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, body):
        actions = [
            {
                **wanted,
                "actions": {
                    "upload": {"href": f"{self.hub.url}/stored/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                },
            }
            for wanted in json.loads(body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": actions})

    def store(self, body):
        self.hub.stored[hashlib.sha256(body).hexdigest()] = body
        self.reply(b"")

    def verify(self, body):
        wanted = json.loads(body)
        self.reply(
            {}, 200 if len(self.hub.stored.get(wanted["oid"], b"")) == wanted["size"] else 422
        )

    def commit(self, body):
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.stored[value["oid"]]
            else:
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
        self.reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})
