"""A stand-in for Google Cloud Storage: its JSON API over buckets in memory, for gcsfs, google-cloud-storage and TensorStore.

What a bucket cannot do it cannot do either: no append, no rename, no folders but what names suggest. Processes reach it by
`environment(url)`, in which the three libraries' own variables name it, so that nothing in cv2jax knows of it.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import google_crc32c


def environment(url: str) -> dict[str, str]:
    """What a process must have to use the stand-in as gs://."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
        "FSSPEC_GCS_TOKEN": "anon",
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GOOGLE_CLOUD_PROJECT": "stand-in",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks by gRPC what kind of bucket it is
    }


class BucketServer(http.server.ThreadingHTTPServer):
    """Buckets by name: object name → bytes. `failing` is the HTTP status of every answer, for a cloud that is away."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *buckets: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, bytes]] = {name: {} for name in buckets}
        self.generations: dict[tuple[str, str], int] = {}
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytes]] = {}
        self.lock, self.counter, self.failing = threading.RLock(), 0, 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away."""

    def next(self) -> int:
        """A number that no object or upload has."""
        self.counter += 1
        return self.counter


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[BucketServer]:
    """A server of these buckets in a thread."""
    with BucketServer(*buckets) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: else small answers wait for the other side

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _respond(self) -> None:
        server, body = self.server, self._body()
        assert isinstance(server, BucketServer)
        try:
            if server.failing:
                raise _Refused(server.failing, "stand-in is told to fail")
            with server.lock:
                status, headers, answer = _answer(server, self.command, self.path, dict(self.headers), body)
        except _Refused as error:
            content = {"error": {"code": error.status, "message": str(error), "errors": [{"reason": "standIn"}]}}
            status, headers, answer = error.status, {"Content-Type": "application/json"}, json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _respond


Answer = tuple[int, dict[str, str], bytes]


def _json(value: Any, **headers: str) -> Answer:
    return 200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


def _answer(server: BucketServer, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    parsed = urllib.parse.urlsplit(path)
    query = dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))
    headers = {name.lower(): value for name, value in headers.items()}
    if parsed.path.startswith("/batch/"):
        return _batch(server, headers, body)
    found = re.fullmatch(r"(/upload|/download)?(?:/storage/v1)?/b/([^/]+)(?:/(o)(?:/(.+))?)?", parsed.path)
    if not found:
        raise _Refused(404, f"no such method: {method} {path}")
    kind, bucket, objects, name = found.groups()
    if bucket not in server.buckets:
        raise _Refused(404, "The specified bucket does not exist.")
    if kind == "/upload":
        return _upload(server, bucket, query, headers, body)
    if not objects:
        return _json({"kind": "storage#bucket", "name": bucket, "location": "NOWHERE"})
    if not name:
        return _list(server, bucket, query)
    copied = re.fullmatch(r"([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", name)
    source = urllib.parse.unquote(copied[1] if copied else name)
    if source not in server.buckets[bucket]:
        raise _Refused(404, f"No such object: {bucket}/{source}")
    content = server.buckets[bucket][source]
    if copied:
        meta = _put(server, copied[2], urllib.parse.unquote(copied[3]), content, {})
        if "rewriteTo" in name:
            size = str(len(content))
            return _json({"done": True, "resource": meta, "totalBytesRewritten": size, "objectSize": size})
        return _json(meta)
    if method == "DELETE":
        del server.buckets[bucket][source]
        return 204, {}, b""
    if query.get("alt") == "media" or kind == "/download":
        return _media(server, bucket, source, headers)
    return _json(_meta(server, bucket, source))


def _media(server: BucketServer, bucket: str, name: str, headers: dict[str, str]) -> Answer:
    content, meta = server.buckets[bucket][name], _meta(server, bucket, name)
    about = {
        "Content-Type": "application/octet-stream",
        "x-goog-generation": meta["generation"],
        "x-goog-hash": f"crc32c={meta['crc32c']},md5={meta['md5Hash']}",
        "ETag": meta["etag"],
    }
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
    if not asked:
        return 200, about, content
    size = len(content)
    first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if first >= size:
        raise _Refused(416, "range not satisfiable")
    return 206, about | {"Content-Range": f"bytes {first}-{last}/{size}"}, content[first : last + 1]


def _list(server: BucketServer, bucket: str, query: dict[str, str]) -> Answer:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items, prefixes = [], set()
    for name in sorted(server.buckets[bucket]):
        inside = name.startswith(prefix) and name >= query.get("startOffset", "")
        if not inside or ("endOffset" in query and name >= query["endOffset"]):
            continue
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
        else:
            items.append(_meta(server, bucket, name))
    return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})


def _meta(server: BucketServer, bucket: str, name: str) -> dict[str, Any]:
    content, generation = server.buckets[bucket][name], str(server.generations[bucket, name])
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{generation}",
        "name": name,
        "bucket": bucket,
        "size": str(len(content)),
        "generation": generation,
        "metageneration": "1",
        "etag": generation,
        "crc32c": base64.b64encode(google_crc32c.Checksum(content).digest()).decode(),
        "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        "updated": "2026-01-01T00:00:00.000Z",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "storageClass": "STANDARD",
    }


def _put(server: BucketServer, bucket: str, name: str, content: bytes, query: dict[str, str]) -> dict[str, Any]:
    if "ifGenerationMatch" in query:
        present = server.generations[bucket, name] if name in server.buckets[bucket] else 0
        if int(query["ifGenerationMatch"]) != present:
            raise _Refused(412, "conditionNotMet")
    server.buckets[bucket][name], server.generations[bucket, name] = content, server.next()
    return _meta(server, bucket, name)


def _upload(server: BucketServer, bucket: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
    if "upload_id" in query:
        place, name, asked, before = server.uploads[query["upload_id"]]
        content, total = before + body, headers.get("content-range", "*/*").rpartition("/")[2]
        if total == "*" or len(content) < int(total):
            server.uploads[query["upload_id"]] = (place, name, asked, content)
            return 308, {"Range": f"bytes=0-{len(content) - 1}"}, b""
        return _json(_put(server, place, name, content, asked))
    if query["uploadType"] == "resumable":
        name, number = query.get("name") or json.loads(body)["name"], str(server.next())
        server.uploads[number] = (bucket, name, query, b"")
        return _json(
            {}, Location=f"{server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
        )
    if query["uploadType"] == "multipart":
        boundary = _boundary(headers).encode()
        _, about, media, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary) + rb"(?:--)?", body, maxsplit=3)
        described, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, media))
        return _json(_put(server, bucket, json.loads(described)["name"], content, query))
    return _json(_put(server, bucket, query["name"], body, query))


def _boundary(headers: dict[str, str]) -> str:
    found = re.search(r"boundary=['\"]?([^'\";]+)", headers["content-type"])
    assert found
    return found[1]


def _batch(server: BucketServer, headers: dict[str, str], body: bytes) -> Answer:
    boundary = _boundary(headers)
    answers = []
    for part in body.decode().split(f"--{boundary}")[1:-1]:
        asked = re.search(r"(GET|DELETE|POST|PATCH) (\S+)", part)
        assert asked
        method, path = asked.groups()
        number = re.search(r"Content-ID: *<?([^>\r\n]*)", part, re.I)
        try:
            status, _, content = _answer(server, method, re.sub(r"^https?://[^/]+", "", path), {}, b"")
        except _Refused as error:
            status, content = (
                error.status,
                json.dumps({"error": {"code": error.status, "message": str(error)}}).encode(),
            )
        answers.append(
            f"--batch_answer\r\nContent-Type: application/http\r\nContent-ID: <response-{number[1] if number else ''}>\r\n\r\n"
            f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n\r\n{content.decode()}\r\n"
        )
    text = "".join(answers) + "--batch_answer--"
    return 200, {"Content-Type": "multipart/mixed; boundary=batch_answer"}, text.encode()
