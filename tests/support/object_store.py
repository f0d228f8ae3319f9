"""An S3 server of this machine (moto's, over real HTTP), and a proxy before it that fails as real ones do."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("error", "throttled", "cut before", "cut after")
"""500; 503 SlowDown; the connection closed before the request is served, or after it was and before the answer."""
_KEPT_HEADERS = {"transfer-encoding", "connection", "content-length"}


class FaultyProxy:
    """Forwards every request to the server at `port`; each `every`-th one meets the next of the faults."""

    def __init__(self, port: int, *, every: int = 0, faults: tuple[str, ...] = FAULTS) -> None:
        self.every = every
        """0 = none of them."""
        self.met: list[str] = []
        """Faults so far."""
        self.faults: Iterator[str] = itertools.cycle(faults)
        """Those that come next; no more after its end."""
        counter, lock, proxy = itertools.count(1), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body are sent apart: the second part would wait 40 ms for the receipt of the first.
            disable_nagle_algorithm = True

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    is_due = proxy.every and next(counter) % proxy.every == 0
                    fault = next(proxy.faults, "") if is_due else ""
                    proxy.met += [fault] if fault else []
                if fault == "error":
                    return self.answer(500, b"<Error><Code>InternalError</Code></Error>")
                if fault == "throttled":
                    return self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
                if fault != "cut before":
                    upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    upstream.request(self.command, self.path, body=body, headers=dict(self.headers))
                    found = upstream.getresponse()
                    content = found.read()
                if fault.startswith("cut"):
                    self.close_connection = True
                    return self.connection.close()
                return self.answer(found.status, content, dict(found.getheaders()))

            def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    if name.lower() not in _KEPT_HEADERS:
                        self.send_header(name, value)
                length = (headers or {}).get("Content-Length", len(content)) if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Connections that were cut on purpose."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
