"""The router's own answers to clients, in the shape that OpenAI clients and vLLM use for errors."""

from __future__ import annotations

import msgspec

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "ForbiddenError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def error_body(status: int, message: str) -> bytes:
    """A JSON error object."""
    error = {"message": message, "type": _TYPES.get(status, "InternalServerError"), "param": None, "code": status}
    return msgspec.json.encode({"error": error})


def as_event(error: bytes) -> bytes:
    """An error object as a server-sent event, for streams that have begun. No [DONE] may follow it."""
    return b"event: error\ndata: " + error + b"\n\n"
