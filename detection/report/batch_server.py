"""The local web server of `tools/browse.py --serve`: one page per batch, created on request."""

import logging
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from detection.core import html
from detection.core.errors import UserError
from detection.report.batch_browser import BatchBrowser, navigation_links

log = logging.getLogger("detection")
ADDRESS = "127.0.0.1"


class BatchServer(ThreadingHTTPServer):
    """Serve the batches of a `BatchBrowser` as pages /0, /1, … at `address`, for this machine only.

    It uses threads, since browsers open idle connections that would block a single thread; it creates one batch at a
    time.

    Raises:
        UserError: the port is in use or not allowed.
    """

    daemon_threads = True

    def __init__(self, browser: BatchBrowser, port: int) -> None:
        self.browser = browser
        self.lock = threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--serve {port}: {reason}; pass another port, or 0 for any free port") from None

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def page(self, number: int) -> bytes:
        """The HTML page of a batch."""
        with self.lock, tempfile.TemporaryDirectory() as folder:
            section, _ = self.browser.section(number, html.Album(max_bytes=30_000_000))
            section = html.Section(section.title, [navigation_links(number), *section.blocks], section.lead)
            path = Path(folder) / "page.html"
            html.write_page(path, "Network input", [section], subtitle=self.browser.subtitle())
            return path.read_bytes()


class _Handler(BaseHTTPRequestHandler):
    server: BatchServer
    protocol_version = "HTTP/1.1"
    # Seconds until an idle connection frees its thread.
    timeout = 60

    def do_GET(self) -> None:
        # DNS rebinding: reject other host names, so that other sites cannot read the images.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (ADDRESS, "localhost"):
            self.send_error(403, "only requests from this machine are allowed")
            return
        name = self.path.split("?")[0].strip("/") or "0"
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            self.send_error(404, "the pages are /0, /1, ...")
            return
        try:
            body, status = self.server.page(int(name)), 200
        except UserError as error:
            body, status = str(error).encode(), 500
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8" if status == 200 else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def serve(browser: BatchBrowser, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises UserError like `BatchServer`."""
    with BatchServer(browser, port) as server:
        print(f"{server.address} (this machine only; press Ctrl-C to stop)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)
