"""A web site on the loopback address, for downloads."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import save

CONTENT = save({"unet.x.lora_A.weight": torch.arange(5000.0)}, {"format": "pt"})


class Site:
    """A site on the loopback address.

    `files` holds by path (status, headers, body), `requests` what was asked (path, headers); only
    `sent` bytes of a body are sent, all where it is None, after a `pause` in seconds.
    """

    def __init__(self):
        self.files, self.requests, self.sent, self.pause = {}, [], None, 0

    def __enter__(self):
        site = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                site.requests.append((self.path, dict(self.headers)))
                status, headers, body = site.files.get(self.path, (404, {}, b"no"))
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                time.sleep(site.pause)
                self.wfile.write(body[: site.sent])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def give(self, path, body=CONTENT, *, name=None, status=200, **headers):
        told = {"Content-Disposition": f'attachment; filename="{name}"'} if name else {}
        self.files[path] = status, told | headers, body
        return self.url + path

    def send_on(self, path, target):
        return self.give(path, b"", status=307, Location=target)
