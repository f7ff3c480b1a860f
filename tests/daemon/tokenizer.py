"""A server with an engine's /tokenize: tokens are bytes, and a chat begins with one of its own."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from typing import Any

from http_server import serving


def tokens_of(body: dict[str, Any]) -> list[int]:
    if "messages" in body:
        return [1000, *"".join(message["content"] for message in body["messages"]).encode()]
    return list(body["prompt"].encode())


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"tokens": tokens_of(body), "count": 0, "max_model_len": 1}).encode()
        self.send_response(200 if self.path == "/tokenize" else 404)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        """/health"""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def tokenizer() -> AbstractContextManager[str]:
    """Its URL."""
    return serving(_Handler)
