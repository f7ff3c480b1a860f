"""What operators say and hear: prompts as tokens, text or chat, and one report from every daemon. Values and checks.

The same shapes are the bodies of the router's admin port, the arguments of the Python clients (`kv`), and what
`pdx kv --format json` prints. What a single daemon is asked, and answers, is in `verbs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from pdx.chain import TOKENS_MAX, block_hashes
from pdx.errors import Refused
from pdx.keys import ContentFingerprint, space_of, tenant_of
from pdx.verbs import Clear, Lookup, Name, Pin, PinSeconds, Result, Seconds, Shape, SpaceInfo, Steer, TierName, Unpin

T = TypeVar("T")
Salt = Annotated[str, Meta(max_length=1024)]


class Prompt(Shape, frozen=True, kw_only=True):
    """One of `tokens`, `text` (as in /v1/completions) and `messages` (as in /v1/chat/completions)."""

    model: str = ""  # may be left out where there is only one
    tokens: Annotated[list[int], Meta(max_length=TOKENS_MAX)] | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None  # with messages
    chat_template_kwargs: dict[str, Any] | None = None  # with messages
    cache_salt: Salt = ""

    @property
    def given(self) -> int:
        return sum(way is not None for way in (self.tokens, self.text, self.messages))


class LookupRequest(Prompt, frozen=True, kw_only=True):
    """How much of this prompt would a request get that came now? Answered by Found."""


class PinRequest(Prompt, frozen=True, kw_only=True):
    """Keep what there is of this prompt. Answered by Pinned."""

    name: Name
    ttl_s: PinSeconds = 3600.0


class UnpinRequest(Shape, frozen=True, kw_only=True):
    """End the pins of this name. Answered by Unpinned."""

    name: Name
    cache_salt: Salt = ""


class ClearRequest(Prompt, frozen=True, kw_only=True):
    """Make unreachable what all given fields take. Answered by Cleared.

    A prompt means its own blocks: longer prompts that begin with it keep theirs, behind a gap. `cache_salt`: one
    tenant's; "" is everybody who has none. With nothing else given it must be said that `everything` is meant.
    """

    cache_salt: Salt | None = None  # type: ignore[assignment]
    tier: TierName = "all"
    older_s: Seconds = 0.0
    everything: bool = False
    dry_run: bool = False


class DrainRequest(Shape, frozen=True, kw_only=True):
    """Ask this engine nothing new, or (undrain) ask it again; without a name: the whole router. Answered by Drained."""

    engine_id: Annotated[str, Meta(max_length=256)] = ""


class DrainedEngine(Shape, frozen=True, kw_only=True):
    engine_id: str
    in_flight: int  # calls of this router that are still under way there


class Drained(Shape, frozen=True, kw_only=True):
    """What one router has been told to leave out. Nothing of it is known to other routers, nor survives this one."""

    router: bool
    under_way: int  # requests of clients, those that wait for an engine among them
    engines: list[DrainedEngine]

    def drains(self, engine_id: str) -> bool:
        """Whether that engine is told here; without a name: the router itself."""
        return any(e.engine_id == engine_id for e in self.engines) if engine_id else self.router

    def left(self, engine_id: str) -> int:
        """What has still to end; without a name: in the whole router."""
        return sum(e.in_flight for e in self.engines if e.engine_id == engine_id) if engine_id else self.under_way


class DaemonReport(Shape, frozen=True, kw_only=True):
    """One daemon's answer: results, one for each kind of blocks that it has of the model, or numbers, or an error."""

    daemon: str
    results: list[Result] = msgspec.field(default_factory=list)
    body: dict[str, Any] = msgspec.field(default_factory=dict)  # stats, health, check
    error: str = ""


class Report(Shape, frozen=True, kw_only=True):
    daemons: list[DaemonReport]
    model: str = ""
    prompt_tokens: int | None = None

    @property
    def errors(self) -> list[str]:
        return [f"{report.daemon}: {report.error}" for report in self.daemons if report.error]


def chosen(model: str, infos: Iterable[SpaceInfo], *, attached: bool = False) -> list[SpaceInfo]:
    """The kinds of blocks of this model, or of the only one; only those whose engines are `attached` now, if said so.

    Raises Refused, naming the models that there are.
    """
    infos = [info for info in infos if info.attached or not attached]
    models = sorted({info.content.model for info in infos})
    if not models:
        raise Refused("no engine is attached" if attached else "no engine has been attached")
    if not model and len(models) == 1:
        return infos
    if model not in models:
        raise Refused(f"name a model{f', not {model!r}' if model else ''}; there are {', '.join(models)}")
    return [info for info in infos if info.content.model == model]


def check_prompt(prompt: Prompt) -> None:
    """Raises Refused unless it is given in exactly one way, and nothing is in it that tokens can't tell."""
    if prompt.given != 1:
        raise Refused("give a prompt as one of tokens, text and messages")
    if prompt.messages is None and (prompt.tools is not None or prompt.chat_template_kwargs is not None):
        raise Refused("tools and chat_template_kwargs belong to messages")
    for message in prompt.messages or ():
        content = message.get("content")
        parts = content if isinstance(content, list) else ()
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise Refused("only text can be looked up: images and audio have keys that tokens do not tell")


def tokenizer(infos: Iterable[SpaceInfo]) -> str:
    """The URL of an engine that tokenizes as requests are tokenized. Raises Refused if there is none."""
    url = next((url for info in infos for url in info.urls), None)
    if url is None:
        raise Refused("no engine of this model is there to tokenize a text: give tokens")
    return f"{url.rstrip('/')}/tokenize"


def tokenize_body(prompt: Prompt, model: str) -> bytes:
    """For an engine's /tokenize, whose defaults are those of its completions and chats."""
    fields: dict[str, Any] = {"model": model}
    if prompt.messages is None:
        fields["prompt"] = prompt.text
    else:
        given = {"tools": prompt.tools, "chat_template_kwargs": prompt.chat_template_kwargs}
        fields |= {"messages": prompt.messages} | {name: value for name, value in given.items() if value is not None}
    return msgspec.json.encode(fields)


def tokens_in(answer: bytes) -> list[int]:
    """Raises Refused if an engine's answer has none."""
    return parsed(answer, _Tokenized, what="the engine's answer").tokens


def reason_in(answer: bytes) -> str:
    """What an OpenAI-shaped error says; empty if it is none."""

    try:
        return msgspec.json.decode(answer, type=_Refusal).error.message
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ""


def parsed(raw: bytes, kind: type[T], *, what: str = "the body") -> T:
    """Raises Refused, naming the field that is wrong."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused(f"{what}: {error}") from error


class BlockNames:
    """A prompt's blocks, as the engines of each kind would name them. Hashes once for each content."""

    def __init__(self, tokens: list[int], salt: str) -> None:
        self.tokens = tokens
        self._salt = salt
        self._hashes: dict[ContentFingerprint, list[bytes]] = {}

    def of(self, info: SpaceInfo) -> dict[str, Any]:
        """The fields of a verb. Raises Refused where names can't be told from tokens."""
        if info.content not in self._hashes:
            self._hashes[info.content] = block_hashes(info.content, self.tokens, salt=self._salt)
        space, tenant = space_of(info.content, info.layout), tenant_of(self._salt)
        return {"space": space, "tenant": tenant, "block_hashes": self._hashes[info.content]}


ForPrompt = Callable[[list[SpaceInfo], BlockNames], Sequence[Steer]]  # what to ask of a prompt's blocks, by kind


def lookups(infos: Iterable[SpaceInfo], names: BlockNames) -> list[Lookup]:
    return [Lookup(**names.of(info)) for info in infos]


def pins(request: PinRequest, infos: Iterable[SpaceInfo], names: BlockNames) -> list[Pin]:
    return [Pin(name=request.name, ttl_s=request.ttl_s, **names.of(info)) for info in infos]


def unpin(request: UnpinRequest) -> Unpin:
    return Unpin(name=request.name, tenant=tenant_of(request.cache_salt))


def check_clear(request: ClearRequest) -> None:
    """Raises Refused unless it says what is meant."""
    if request.given:
        check_prompt(request)
    is_limited = bool(request.given or request.model or request.cache_salt is not None or request.older_s)
    if is_limited == request.everything:
        both = ", not both" if request.everything else ""
        raise Refused(f"say which blocks (a prompt, model, cache_salt or older_s), or that everything is meant{both}")


def clear(request: ClearRequest, infos: Iterable[SpaceInfo] = ()) -> Clear:
    """Without a prompt. `infos`: all that is known of its model; a disk may have what its daemon has not met."""
    tenant = None if request.cache_salt is None else tenant_of(request.cache_salt)
    spaces = sorted({space_of(info.content, info.layout) for info in infos}) if request.model else None
    return Clear(
        model=request.model or None, spaces=spaces, tenant=tenant, tier=request.tier, older_s=request.older_s,
        dry_run=request.dry_run,
    )  # fmt: skip


def prompt_clears(request: ClearRequest, infos: Iterable[SpaceInfo], names: BlockNames) -> list[Clear]:
    found = [names.of(info) for info in infos]
    return [
        Clear(
            spaces=[named["space"]], tenant=named["tenant"], block_hashes=named["block_hashes"], tier=request.tier,
            older_s=request.older_s, dry_run=request.dry_run,
        )
        for named in found
    ]  # fmt: skip


class _Tokenized(msgspec.Struct):
    """What is read of an engine's answer."""

    tokens: list[int]


class _Error(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    error: _Error
