"""`tools/browse.py --serve`: one batch a page, made when it is asked for, on this machine alone."""

import logging
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from detection.core import html
from detection.core.errors import UserError
from detection.report.browse import Browser, serve_links

log = logging.getLogger("detection")
ADDRESS = "127.0.0.1"


class BatchServer(ThreadingHTTPServer):
    """Pages /0, /1, … of a `Browser`'s batches; `address` is where they are.

    Threads, since browsers open connections ahead that a single one would wait for; batches are made one at a time.

    Raises:
        UserError: the port is taken or not allowed.
    """

    daemon_threads = True

    def __init__(self, browser: Browser, port: int) -> None:
        self.browser = browser
        self.lock = threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--serve {port}: {reason}; give another port, or 0 for any that is free") from None

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def page(self, number: int) -> bytes:
        """The page of a batch."""
        with self.lock, tempfile.TemporaryDirectory() as folder:
            section, _ = self.browser.section(number, html.Album(max_bytes=30_000_000))
            section = html.Section(section.title, [serve_links(number), *section.blocks], section.lead)
            path = Path(folder) / "page.html"
            html.write_page(path, "What the network sees", [section], subtitle=self.browser.subtitle())
            return path.read_bytes()


class _Handler(BaseHTTPRequestHandler):
    server: BatchServer
    protocol_version = "HTTP/1.1"
    # A connection that a browser opened ahead does not hold a thread for ever.
    timeout = 60

    def do_GET(self) -> None:
        # A page of another site whose name was pointed at this machine must not read the images.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (ADDRESS, "localhost"):
            self.send_error(403, "only this machine may ask")
            return
        name = self.path.split("?")[0].strip("/") or "0"
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            self.send_error(404, "there are pages /0, /1, ... only")
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


def serve(browser: Browser, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises UserError, see `BatchServer`."""
    with BatchServer(browser, port) as server:
        print(f"{server.address} (this machine only; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)
