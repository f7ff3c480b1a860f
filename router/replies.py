"""The router's own answers to clients, in the shape that OpenAI clients and vLLM use for errors."""

from __future__ import annotations

import msgspec

_TYPES = {
    400: "BadRequestError",
    403: "ForbiddenError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestEntityTooLargeError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def error_body(status: int, message: str) -> bytes:
    """A JSON error object."""
    error = {"message": message, "type": _TYPES.get(status, "InternalServerError"), "param": None, "code": status}
    return msgspec.json.encode({"error": error})


def error_event(status: int, message: str) -> bytes:
    """The same as a server-sent event, for streams that have begun. No [DONE] may follow it."""
    return b"event: error\ndata: " + error_body(status, message) + b"\n\n"
