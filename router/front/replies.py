"""The router's own answers to clients, in the shape that OpenAI's clients, Anthropic's and vLLM use for errors."""

from __future__ import annotations

import msgspec

from pdx.router.line.admission import TurnedAwayWhy

WORDS_MAX = 500

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

REFUSALS: dict[TurnedAwayWhy, tuple[int, str]] = {
    "queue_full": (429, "every engine is full and so is the queue before them; ask again later"),
    "queue_timeout": (504, "no engine had room in the time that this request was given to wait"),
    "long_wait": (429, "every engine has more to do than this router lets a request wait for; ask again later"),
    "draining": (503, "this router is about to stop; ask another, or again later"),
}


def error_body(status: int, message: str) -> bytes:
    """A JSON error object."""
    error = {"message": message, "type": _TYPES.get(status, "InternalServerError"), "param": None, "code": status}
    return msgspec.json.encode({"type": "error", "error": error})  # the first is Anthropic's


def words_of(refusal: bytes) -> str:
    """An engine's, to be told within ours."""
    return refusal[:WORDS_MAX].decode(errors="replace")


def as_event(error: bytes) -> bytes:
    """An error object as a server-sent event, for streams that have begun. No [DONE] may follow it."""
    return b"event: error\ndata: " + error + b"\n\n"
