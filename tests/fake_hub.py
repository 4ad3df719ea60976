"""A stand-in of the Hugging Face Hub: as much of its API as `create_repo` and `upload_folder` ask for.

What it does not know it answers with an error and remembers, so that no test passes by it.

Reference: the calls of huggingface_hub.HfApi
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN, READ_TOKEN = "tok-of-tests-0123456789", "tok-that-only-reads"
LARGE = (".safetensors", ".png", ".msgpack")


class Hub(ThreadingHTTPServer):
    """Repositories by name; `with Hub() as hub` serves them at `hub.url`.

    Attributes:
        files: Content of the files of each repository, by path.
        commits: Message and paths of each commit, of all repositories.
        failures: Answers, as status and text, of the next commits in place of a commit.
        refused: Repositories that the user may not write to.
        hold: Commits wait until this is set.
        arrived: Is set when a commit arrives.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.url = f"http://localhost:{self.server_address[1]}"
        self.files, self.commits, self.private, self.objects = {}, [], {}, {}
        self.failures, self.refused, self.unknown, self.asked = [], set(), [], []
        self.broken = False
        self.hold, self.arrived = threading.Event(), threading.Event()
        self.hold.set()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.hold.set()
        self.shutdown()
        self.server_close()

    def use(self, monkeypatch, token=TOKEN):
        """Makes it the Hub of this process, with or without a log-in."""
        from huggingface_hub import constants

        for name, value in {"ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        return self

    def environment(self, token=TOKEN):
        """Variables that make it the Hub of another process."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": token,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def _answer(self, status, value=None):
        body = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status, message):
        self._answer(status, {"error": message})

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_GET(self):
        self._serve(b"")

    def do_POST(self):
        self._serve(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST

    def _serve(self, body):
        hub, path = self.server, urlsplit(self.path).path
        hub.asked.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        if path.startswith("/storage/"):
            hub.objects[words[1]] = body
            return self._answer(200)
        if hub.broken:
            return self._refuse(503, "the Hub is down")
        if self._token() not in (TOKEN, READ_TOKEN):
            return self._refuse(401, f"Invalid token {self._token()}")
        if path == "/api/whoami-v2":
            role = "read" if self._token() == READ_TOKEN else "write"
            return self._answer(200, {"name": "me", "orgs": [], "auth": {"accessToken": {"role": role}}})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        name = "/".join(words[2:4])
        if path == f"/api/models/{name}":
            return self._answer(200, {"id": name, "sha": "0" * 40}) if name in hub.files else self._refuse(404, "none")
        if path == f"/api/models/{name}/auth-check/write":
            return self._refuse(403, "no write access") if name in hub.refused else self._answer(200)
        if path == f"/api/models/{name}/preupload/main":
            asked = [one["path"] for one in json.loads(body)["files"]]
            modes = {one: "lfs" if one.endswith(LARGE) else "regular" for one in asked}
            files = [{"path": one, "uploadMode": mode, "shouldIgnore": False} for one, mode in modes.items()]
            return self._answer(200, {"files": files})
        if path == f"/api/models/{name}/commit/main":
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        hub.unknown.append(f"{self.command} {self.path}")
        return self._refuse(501, f"{self.command} {self.path}: the server of these tests does not know this call")

    def _create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.refused or not name.startswith("me/"):
            return self._refuse(403, f"You don't have the rights to create a model under the namespace of {name}")
        there = name in self.server.files
        self.server.files.setdefault(name, {})
        self.server.private.setdefault(name, asked.get("visibility") == "private")
        return self._answer(409 if there else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def _batch(self, asked):
        objects = []
        for one in asked["objects"]:
            upload = {"href": f"{self.server.url}/storage/{one['oid']}"}
            objects.append(one | {"actions": {"upload": upload}})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name, lines):
        hub = self.server
        hub.arrived.set()
        hub.hold.wait(60)
        if hub.failures:
            return self._refuse(*hub.failures.pop(0))
        header, written = "", {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value["summary"]
            elif line["key"] == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                written[value["path"]] = hub.objects[value["oid"]]
                assert hashlib.sha256(hub.objects[value["oid"]]).hexdigest() == value["oid"]
            else:
                return self._refuse(400, f"a {line['key']}")
        hub.files[name] |= written
        hub.commits.append((header, sorted(written)))
        return self._answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{len(hub.commits)}", "commitOid": "0" * 40})
