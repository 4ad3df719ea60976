"""An object store that speaks as much of Google Cloud Storage's JSON API as gcsfs and tensorstore ask for."""

import email
import email.policy
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Store(ThreadingHTTPServer):
    """Objects by bucket and name; `with Store() as store` serves them at `store.url`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.generation, self.lock = 1, threading.Lock()
        self.url = f"http://localhost:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def keep(self, bucket, name, data):
        with self.lock:
            self.generation += 1
            self.objects[bucket, name] = (bytes(data), self.generation)
        return self.describe(bucket, name)

    def describe(self, bucket, name):
        data, generation = self.objects[bucket, name]
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)), "updated": time,
            "timeCreated": time, "generation": str(generation), "metageneration": "1", "storageClass": "STANDARD",
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *args):
        pass

    def _answer(self, status, body=b"", **headers):
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), headers | {"Content-Type": "application/json"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _asked(self):
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        found = re.search(r"/b/([^/]+)(?:/o(?:/(.*))?)?$", parts.path)
        bucket, name = (unquote(found[1]), unquote(found[2] or "")) if found else ("", "")
        return parts.path, query, bucket, name

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        _, query, bucket, name = self._asked()
        if not name:
            return self._answer(200, self._listed(bucket, query) if "/o" in self.path else {"name": bucket})
        if (bucket, name) not in self.server.objects:
            return self._answer(404, {"error": {"code": 404, "message": "No such object"}})
        if query.get("alt") != "media":
            return self._answer(200, self.server.describe(bucket, name))
        data, generation = self.server.objects[bucket, name]
        headers = {"X_Goog_Generation": str(generation), "Content_Type": "application/octet-stream"}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not data:
            return self._answer(200, data, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        return self._answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)

    def _listed(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for owner, name in sorted(self.server.objects):
            if owner != bucket or not name.startswith(prefix):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(self.server.describe(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def do_POST(self):
        path, query, bucket, name = self._asked()
        if "upload_id" in query:
            return self.do_PUT()
        body = self._body()
        if path.startswith("/batch"):
            return self._batch(body)
        copied = re.search(r"/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)$", path)
        if copied:
            source, was, target, becomes = map(unquote, copied.groups())
            made = self.server.keep(target, becomes, self.server.objects[source, was][0])
            return self._answer(200, {"done": True, "resource": made})
        kind = query.get("uploadType")
        if kind == "multipart":
            kinds = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
            said, data = email.message_from_bytes(kinds + body, policy=email.policy.HTTP).iter_parts()
            name = json.loads(said.get_payload(decode=True))["name"]
            return self._answer(200, self.server.keep(bucket, name, data.get_payload(decode=True)))
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            key = str(len(self.server.uploads))
            self.server.uploads[key] = (bucket, name, bytearray())
            return self._answer(200, {}, Location=f"{self.server.url}/resume?upload_id={key}")
        return self._answer(200, self.server.keep(bucket, query.get("name", name), body))

    def do_PUT(self):
        _, query, _, _ = self._asked()
        bucket, name, data = self.server.uploads[query["upload_id"]]
        data += self._body()
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(data) - 1}")
        return self._answer(200, self.server.keep(bucket, name, data))

    def do_DELETE(self):
        _, _, bucket, name = self._asked()
        known = self.server.objects.pop((bucket, name), None)
        return self._answer(204) if known else self._answer(404, {"error": {"code": 404, "message": "none"}})

    def _batch(self, body):
        """Deletions in one request."""
        answers = []
        for bucket, name in re.findall(rb"DELETE /storage/v1/b/([^/]+)/o/(\S+)", body):
            self.server.objects.pop((unquote(bucket.decode()), unquote(name.decode())), None)
            answers.append("--cut\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n\r\n")
        text = "".join(answers) + "--cut--\r\n"
        return self._answer(200, text.encode(), Content_Type="multipart/mixed; boundary=cut")
