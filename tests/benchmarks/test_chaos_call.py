"""A chaos client against a server that misbehaves: it always comes back in time, and with all that was said."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.chaos.call import Call, Heard

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DEADLINE_S = 10.0


def chunk(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


TOKEN = chunk('{"choices": [{"text": " one"}]}')


@contextmanager
def server(answer: bytes, *, then: Callable[[socket.socket], object] = lambda client: None) -> Iterator[str]:
    """Answers one request with these bytes, then does `then` before it closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.settimeout(DEADLINE_S)
                asked = b""
                while not asked.endswith(b"\r\n\r\n{}"):
                    asked += client.recv(65536)
                client.sendall(answer)
                then(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        thread.join(DEADLINE_S)


def until_closed(client: socket.socket) -> bytes:
    return client.recv(1)


def ask(answer: bytes, *, deadline_s: float = DEADLINE_S) -> Heard:
    with server(answer) as url:
        return Call(url, {}, deadline_s=deadline_s).run()


def test_a_whole_stream() -> None:
    heard = ask(STREAM + TOKEN + chunk("[DONE]") + b"0\r\n\r\n")
    assert (heard.status, heard.text, heard.done, heard.broken) == (200, " one", True, "")


def test_a_stream_cut_between_events_is_not_done() -> None:
    heard = ask(STREAM + TOKEN)
    assert (heard.text, heard.done, bool(heard.broken)) == (" one", False, True)


def test_a_stream_that_ends_without_done_is_broken() -> None:
    heard = ask(STREAM + TOKEN + b"0\r\n\r\n")
    assert (heard.text, heard.done, bool(heard.broken)) == (" one", False, True)


def test_an_error_event() -> None:
    heard = ask(STREAM + TOKEN + chunk('{"error": {"message": "gone"}}') + b"0\r\n\r\n")
    assert (heard.text, heard.error, heard.done) == (" one", "gone", False)


def test_an_error_body() -> None:
    body = b'{"error": {"message": "busy"}}'
    head = f"HTTP/1.1 429 Busy\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    heard = ask(head + body)
    assert (heard.status, heard.error, heard.done) == (429, "busy", True)


def test_a_body_cut_short_is_not_done() -> None:
    heard = ask(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{}")
    assert (heard.done, bool(heard.broken)) == (False, True)


def test_silence_ends_at_the_deadline() -> None:
    with server(STREAM + TOKEN, then=until_closed) as url:
        heard = Call(url, {}, deadline_s=0.3).run()
    assert (heard.text, heard.done, bool(heard.broken)) == (" one", False, True)
    assert 0.3 <= heard.seconds < DEADLINE_S


def test_leaving_from_another_thread_ends_the_call() -> None:
    with server(STREAM + TOKEN, then=until_closed) as url:
        call = Call(url, {}, deadline_s=DEADLINE_S, on_token=lambda: call.leave())
        heard = call.run()
    assert call.left
    assert (heard.text, heard.done) == (" one", False)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert Call(f"http://127.0.0.1:{port}/v1/completions", {}, deadline_s=DEADLINE_S).run().refused
