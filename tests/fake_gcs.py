"""An object store that speaks as much of Google Cloud Storage's JSON API as gcsfs and tensorstore ask for.

What it does not know it answers with an error and remembers, so that no test passes by it.

Reference: https://cloud.google.com/storage/docs/json_api/v1
"""

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
        self.unknown: list[str] = []  # calls that were not answered
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

    def _error(self, status, message):
        self._answer(status, {"error": {"code": status, "message": message}})

    def _unknown(self):
        self.server.unknown.append(f"{self.command} {self.path}")
        self._error(501, f"{self.command} {self.path}: the server of these tests does not know this call")

    def _asked(self):
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return parts.path, query

    def _matched(self, pattern):
        """The decoded groups of a pattern that the whole path after /storage/v1 or /upload/storage/v1 has, or None."""
        path = urlsplit(self.path).path
        found = re.fullmatch(rf"(?:/upload)?(?:/download)?/storage/v1{pattern}", path)
        return found and [unquote(group) for group in found.groups()]

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
        _, query = self._asked()
        if found := self._matched(r"/b/([^/]+)"):
            return self._answer(200, {"kind": "storage#bucket", "name": found[0]})
        if found := self._matched(r"/b/([^/]+)/o/?"):
            return self._answer(200, self._listed(found[0], query))
        if found := self._matched(r"/b/([^/]+)/o/([^/]+)"):
            return self._get(*found, query)
        return self._unknown()

    def _get(self, bucket, name, query):
        if (bucket, name) not in self.server.objects:
            return self._error(404, f"No such object: {bucket}/{name}")
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
        """One page of the objects and, with a delimiter, of the prefixes up to it, in the order of their names."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found = {}
        for owner, name in sorted(self.server.objects):
            if owner == bucket and name.startswith(prefix):
                head, more, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                found[prefix + head + more if more else name] = bool(more)
        names = sorted(name for name in found if name > query.get("pageToken", ""))
        most = int(query.get("maxResults", 1000))
        page = names[:most]
        answer = {
            "kind": "storage#objects",
            "items": [self.server.describe(bucket, name) for name in page if not found[name]],
            "prefixes": [name for name in page if found[name]],
        }
        return answer | ({"nextPageToken": page[-1]} if len(names) > most else {})

    def do_POST(self):
        path, query = self._asked()
        if "upload_id" in query:
            return self.do_PUT()
        body = self._body()
        if path == "/batch/storage/v1":
            return self._batch(body)
        if found := self._matched(r"/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)"):
            return self._copy(*found)
        if found := self._matched(r"/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)"):
            bucket, was, becomes = found
            return self._copy(bucket, was, bucket, becomes, moves=True)
        if found := self._matched(r"/b/([^/]+)/o/?"):
            return self._upload(found[0], query, body)
        return self._unknown()

    def _copy(self, source, was, target, becomes, *, moves=False):
        if (source, was) not in self.server.objects:
            return self._error(404, f"No such object: {source}/{was}")
        made = self.server.keep(target, becomes, self.server.objects[source, was][0])
        if moves:
            del self.server.objects[source, was]
            return self._answer(200, made)
        size = made["size"]
        answer = {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True}
        return self._answer(200, answer | {"resource": made})

    def _upload(self, bucket, query, body):
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
        if kind == "media" and "name" in query:
            return self._answer(200, self.server.keep(bucket, query["name"], body))
        return self._unknown()

    def do_PUT(self):
        _, query = self._asked()
        if query.get("upload_id") not in self.server.uploads:
            return self._unknown()
        bucket, name, data = self.server.uploads[query["upload_id"]]
        data += self._body()
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(data) - 1}")
        return self._answer(200, self.server.keep(bucket, name, data))

    def do_DELETE(self):
        found = self._matched(r"/b/([^/]+)/o/([^/]+)")
        if not found:
            return self._unknown()
        known = self.server.objects.pop(tuple(found), None)
        return self._answer(204) if known else self._error(404, f"No such object: {'/'.join(found)}")

    def do_PATCH(self):
        return self._unknown()

    def _batch(self, body):
        """Deletions in one request."""
        answers = []
        for method, path in re.findall(rb"^(GET|POST|PUT|PATCH|DELETE) (\S+)", body, re.MULTILINE):
            found = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)", path.decode().partition("?")[0])
            if method != b"DELETE" or not found:
                return self._unknown()
            known = self.server.objects.pop((unquote(found[1]), unquote(found[2])), None)
            status = "204 No Content" if known else "404 Not Found"
            answers.append(f"--cut\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        text = "".join(answers) + "--cut--\r\n"
        return self._answer(200, text.encode(), Content_Type="multipart/mixed; boundary=cut")
