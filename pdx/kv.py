"""Python clients of the verbs: on this host's daemon, and on all daemons of a router. Same methods, same reports.

    with LocalKv.open(config.load()) as kv:
        print(kv.lookup(LookupRequest(text="The manual begins")).daemons[0].results)
    kv = RouterKv("http://127.0.0.1:8001")
    kv.pin(PinRequest(name="manual", text="The manual begins", ttl_s=600))

Nothing here starts a daemon. One thread for each client.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol, Self

import msgspec

from pdx import admin
from pdx.admin import (
    BlockNames,
    ClearRequest,
    DaemonReport,
    ForPrompt,
    LookupRequest,
    PinRequest,
    Prompt,
    Report,
    UnpinRequest,
)
from pdx.client import DaemonClient
from pdx.config import Config, chooser_of
from pdx.errors import DaemonGone, Refused
from pdx.verbs import Result, SpaceInfo, Spaces, Steer
from pdx.wire import Ask, Attach

ATTACH_S = 2.0
ANSWER_S = 15.0  # a router gives its daemons five seconds, and an engine five for tokenizing
ANSWER_BYTES_MAX, ERROR_BYTES_MAX = 64 << 20, 1 << 20
Question = Literal["stats", "health", "check"]


class Kv(Protocol):
    """Each method raises Refused for what can't be meant, DaemonGone if nobody answers in time.

    A daemon that could not answer is in the report, with its error: see Report.errors.
    """

    def lookup(self, request: LookupRequest) -> Report: ...
    def pin(self, request: PinRequest) -> Report: ...
    def unpin(self, request: UnpinRequest) -> Report: ...
    def clear(self, request: ClearRequest) -> Report: ...
    def ask(self, question: Question) -> Report: ...


class LocalKv:
    """See Kv. Asks the daemon of this host; texts are tokenized by an engine that is attached to it."""

    def __init__(self, client: DaemonClient) -> None:
        self._client = client

    @classmethod
    def open(cls, config: Config) -> LocalKv:
        """Raises DaemonGone if no daemon runs there."""
        if not os.path.isdir(config.run_path):  # nor one that may not be looked into
            raise DaemonGone(f"no daemon runs in {config.run_path} ({chooser_of(config.run_path)})")
        return cls(DaemonClient.attach(config, Attach(kind="tool"), deadline_s=ATTACH_S, start=False))

    def lookup(self, request: LookupRequest) -> Report:
        return self._of_prompt(request, admin.lookups)

    def pin(self, request: PinRequest) -> Report:
        return self._of_prompt(request, partial(admin.pins, request))

    def unpin(self, request: UnpinRequest) -> Report:
        return self._steered([admin.unpin(request)])

    def clear(self, request: ClearRequest) -> Report:
        admin.check_clear(request)
        if request.given:
            return self._of_prompt(request, partial(admin.prompt_clears, request), attached=False)
        infos = admin.chosen(request.model, self._spaces()) if request.model else []
        return self._steered([admin.clear(request, infos)], infos)

    def ask(self, question: Question) -> Report:
        answer = self._client.ask(Ask(verb=question))
        return Report(daemons=[DaemonReport(daemon=self._name, body=answer.body, error=answer.error)])

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _name(self) -> str:
        return self._client.attached.daemon.daemon_id

    def _spaces(self) -> list[SpaceInfo]:
        return msgspec.convert(self._client.ask(Ask(verb="spaces")).body, Spaces).spaces

    def _of_prompt(self, prompt: Prompt, verbs: ForPrompt, *, attached: bool = True) -> Report:
        admin.check_prompt(prompt)
        infos = admin.chosen(prompt.model, self._spaces(), attached=attached)
        names = self._names(prompt, infos)
        return self._steered(verbs(infos, names), infos, names)

    def _names(self, prompt: Prompt, infos: Sequence[SpaceInfo]) -> BlockNames:
        tokens = prompt.tokens
        if tokens is None:
            url, body = admin.tokenizer(infos), admin.tokenize_body(prompt, infos[0].content.model)
            tokens = admin.tokens_in(post(url, body))
        return BlockNames(tokens, prompt.cache_salt or "")

    def _steered(
        self, verbs: Sequence[Steer], infos: Sequence[SpaceInfo] = (), names: BlockNames | None = None
    ) -> Report:
        answers = [self._client.ask(Ask(verb=verb)) for verb in verbs]
        results = [msgspec.convert(answer.body, Result) for answer in answers if not answer.error]
        error = next((answer.error for answer in answers if answer.error), "")
        return Report(
            daemons=[DaemonReport(daemon=self._name, results=results, error=error)],
            model=infos[0].content.model if infos else "",
            prompt_tokens=None if names is None else len(names.tokens),
        )


class RouterKv:
    """See Kv. Asks a router's admin port, and by it every daemon that has announced an engine to that router."""

    def __init__(self, url: str, *, token: str = "") -> None:
        """`token`: keys.admin_token of the cluster key; needed off loopback, and where the router has a key file."""
        self._url = url.rstrip("/")
        self._headers = bearer(token)

    def lookup(self, request: LookupRequest) -> Report:
        return self._ask("lookup", request)

    def pin(self, request: PinRequest) -> Report:
        return self._ask("pin", request)

    def unpin(self, request: UnpinRequest) -> Report:
        return self._ask("unpin", request)

    def clear(self, request: ClearRequest) -> Report:
        return self._ask("clear", request)

    def ask(self, question: Question) -> Report:
        return self._ask(question, None)

    def _ask(self, verb: str, request: msgspec.Struct | None) -> Report:
        body = None if request is None else msgspec.json.encode(request)
        answer = post(f"{self._url}/admin/kv/{verb}", body, self._headers)
        return admin.parsed(answer, Report, what=f"{self._url} gave no report")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """An answer that redirects is an error like others."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())


def bearer(token: str) -> dict[str, str]:
    """The headers that show this token; none if it is empty."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def post(url: str, body: bytes | None, headers: dict[str, str] | None = None) -> bytes:
    """The answer; without a body it is got. Raises Refused with the reason that an error answer gives, DaemonGone.

    Tokens and prompts are for who listens at `url`: neither for a proxy of the environment nor for where it redirects.
    """
    if url.startswith("tcp://"):
        raise Refused(f"{url} is not an http url: it is where daemons find a router, operators use its --admin-port")
    if not url.startswith(("http://", "https://")):
        raise Refused(f"{url} is not an http url")
    given = {"Content-Type": "application/json", **(headers or {})}
    try:
        request = urllib.request.Request(url, data=body, headers=given)  # noqa: S310 - its scheme was checked
        with _OPENER.open(request, timeout=ANSWER_S) as answer:
            raw: bytes = answer.read(ANSWER_BYTES_MAX)
            return raw
    except urllib.error.HTTPError as error:
        with error:
            reason = admin.reason_in(error.read(ERROR_BYTES_MAX)) or f"{url}: HTTP {error.code}"
            if "Location" in error.headers:
                reason += f", which sends us to {error.headers['Location']!r}: name that if it is meant"
            if error.code == http.client.UNAUTHORIZED and "/admin/" in url:
                if headers:
                    reason = "that is not the token of the cluster key that this router has: look at"
                else:
                    reason += ": name it by"
                reason += " --key-file or PDX_KEY_FILE"
            raise Refused(reason) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise Refused(f"{url} is not an http url: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        opened = "as an admin port does, which pdx-router --admin-port opens"
        raise DaemonGone(f"{url} does not answer {opened}: {error!r}") from error
