"""Makes a request's `Prompt`: its token ids, what engines call its blocks, and who has them.

A completion that comes as token ids is read as it is. A text or a chat is tokenized by an engine that a daemon
announces: the ids are remembered under its content and the tenant, and stand for the text only at engines of that
content, for others may have another tokenizer. That takes a request's time, so it is asked for only where it can be
worth that, and not for longer than `patience_s` says; who gets no ids is chosen for by the length of the text alone.

What can't be named from its tokens (adapters, images, prompts that are cut, engines with hashes of their own) has no
names, and is placed by its length too. One event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import msgspec

from pdx.admin import tokens_in
from pdx.chain import TOKENS_MAX
from pdx.errors import Refused
from pdx.keys import ContentFingerprint
from pdx.router.choice.blocks import Blocks
from pdx.router.choice.forecast import NOMINAL_TOKENS_PER_S
from pdx.router.choice.knowledge import Found, Knowledge
from pdx.router.choice.policy import Candidate, Snapshot
from pdx.router.choice.prompt import Prompt
from pdx.router.engines.upstream import Call, Upstream, UpstreamError
from pdx.router.request.servable import CHAT, COMPLETIONS, alone_reason

# English has four letters a token, code three: a guess that is too long only makes a prompt weigh more.
LETTERS_A_TOKEN = 3
IDS_MAX = 1 << 22  # remembered, of four bytes: 16 MiB
TOKENS_AT_ONCE = 16_384  # to hash on the loop, some 8 ms; more of them on another thread, beside everybody's streams
# Tokenizing is worth a twentieth of what the prompt takes to compute: choosing well saves more of that than so much.
LAST = 5  # answers, of which the middle one says how long asking takes: a first one, or one behind a burst, is no rule
FORGIVEN_AFTER = 50  # prompts for which nobody was asked: who was slow then is asked again
PATIENCE_SHARE, PATIENCE_MIN_S, PATIENCE_MAX_S = 0.05, 0.01, 0.5
# What of a body makes a text of tokens. A chat with other ways into its prompt is named wrong, and so found nowhere.
TEXT_FIELDS = ("add_special_tokens",)
CHAT_FIELDS = (
    "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "add_special_tokens", "mm_processor_kwargs",
)  # fmt: skip


class Prompts:
    """Owned by the event loop's thread."""

    def __init__(
        self, upstream: Upstream, knowledge: Knowledge, *, count: Callable[[str], None] = lambda ids: None
    ) -> None:
        """`count` hears of each prompt where its token ids are from: given, asked, remembered, late
        (asked for, and not answered in time or not with tokens) or unasked."""
        self._count = count
        self._upstream = upstream
        self._knowledge = knowledge
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()  # the one used last comes last
        self._ids_kept = 0
        self._took_s: deque[float] = deque(maxlen=LAST)
        self._unasked = 0  # since

    def __repr__(self) -> str:
        return f"<Prompts {len(self._ids)} remembered>"

    def ask(
        self,
        path: str,
        body: Mapping[str, Any],
        model: str,
        snapshot: Snapshot,
        *,
        turn: int,
        headers: Mapping[str, str],
    ) -> Reading | None:
        """Has the ids asked for now, if they are worth it; `read` then waits for them, or `drop` the reading. None for
        what is no prompt of one sequence of tokens. Never raises for what a client says."""
        if path not in (COMPLETIONS, CHAT) or alone_reason(path, body):
            return None
        engines = [c for c in snapshot if model in c.info.models]
        salt, adapters = body.get("cache_salt") or "", _adapters(engines)
        # Engines cut a text otherwise than its tokens: of the text, special tokens stay.
        whole = body.get("truncate_prompt_tokens") is None
        has_names = isinstance(salt, str) and model not in adapters and whole
        given = _only(body.get("prompt")) if path == COMPLETIONS else None
        if isinstance(given, list):
            self._count("given")
            ids = given if given and all(type(token) is int for token in given) else None
            return Reading(engines, salt, len(given), has_names, ids)
        guess = 1 + _letters(given if path == COMPLETIONS else body.get("messages")) // LETTERS_A_TOKEN
        reading = Reading(engines, salt, guess, has_names)
        pairable = [engine for engine in engines if engine.pairable]
        patience_s = patience_for(guess, pairable, takes_s=self._takes_s())
        if not patience_s or not has_names:
            self._unasked += 1
            self._count("unasked")
            return reading
        asked = pairable[turn % len(pairable)]
        reading.tokenizer = asked.info.content
        question = tokenize_question(path, body)
        # Under the tenant: how soon an answer comes must not tell one what another has asked.
        named = b"%b%d %b" % (asked.space, len(salt), salt.encode("utf-8", "surrogatepass"))
        key = hashlib.blake2b(named + question, digest_size=16).digest()
        kept = self._ids.get(key)
        if kept is not None:
            self._ids.move_to_end(key)
            self._count("remembered")
            reading.ids = list(kept)
            return reading
        url = asked.info.url.rstrip("/") + "/tokenize"
        reading.asked = _Asked(key, patience_s, time.monotonic(), self._upstream.call(url, question, headers))
        reading.asked.call.begin()
        return reading

    async def read(self, reading: Reading, now: float) -> Prompt:
        """Never raises for what an engine says."""
        if reading.asked is not None:
            reading.ids = await self._answer(reading.asked)
            reading.asked = None  # the question is as long as the prompt
        ids, engines, tokenizer = reading.ids, reading.engines, reading.tokenizer
        if ids is None:
            return Prompt(tokens=reading.guess)
        if not reading.has_names or _too_long(ids, engines):
            return Prompt(tokens=len(ids), token_ids=ids, tokenizer=tokenizer)
        blocks = Blocks(ids, reading.salt, {engine.space: engine.info.content for engine in engines})
        if len(ids) > TOKENS_AT_ONCE:  # also what nobody has: it would be named on the loop when it is sent
            await asyncio.to_thread(blocks.name_all)
        return self.refreshed(Prompt(tokens=len(ids), token_ids=ids, tokenizer=tokenizer, blocks=blocks), now)

    def refreshed(self, prompt: Prompt, now: float) -> Prompt:
        """With what daemons have of it now: it may have waited in a line."""
        if prompt.blocks is None or prompt.generation == self._knowledge.generation:
            return prompt
        found = {space: self._found(prompt.blocks, space, now) for space in prompt.blocks.spaces}
        return msgspec.structs.replace(prompt, found=found, generation=self._knowledge.generation)

    def _found(self, blocks: Blocks, space: bytes, now: float) -> dict[str, Found]:
        """Of a prompt whose first block nobody has, the others needn't be named before it is on its way."""
        known = self._knowledge.found(blocks.first_name(space), now)
        return self._knowledge.found(blocks.names(space), now) if known else {}

    async def _answer(self, asked: _Asked) -> list[int] | None:
        try:
            async with asyncio.timeout(asked.at + asked.patience_s - time.monotonic()), asked.call as reply:
                ids = tokens_in(await reply.read()) if reply.status == 200 else None
        except (UpstreamError, TimeoutError, Refused):
            ids = None
        self._took_s.append(time.monotonic() - asked.at)
        self._unasked = 0
        if not ids or len(ids) > TOKENS_MAX or not self._remember(asked.key, ids):
            self._count("late")
            return None
        self._count("asked")
        return ids

    def _takes_s(self) -> float:
        """To ask, as a rule; 0 if nobody can say."""
        return median(self._took_s) if self._took_s and self._unasked < FORGIVEN_AFTER else 0.0

    def _remember(self, name: bytes, ids: list[int]) -> bool:
        """Whether they are numbers that tokens can have."""
        try:
            kept = array("I", ids)
        except OverflowError:
            return False
        self._ids_kept += len(kept) - len(self._ids.pop(name, ()))
        self._ids[name] = kept
        while self._ids_kept > IDS_MAX:
            self._ids_kept -= len(self._ids.popitem(last=False)[1])
        return True


class Reading:
    """One prompt, while its ids may be on their way."""

    __slots__ = ("asked", "engines", "guess", "has_names", "ids", "prompt", "salt", "tokenizer")

    def __init__(
        self, engines: Sequence[Candidate], salt: Any, guess: int, has_names: bool, ids: list[int] | None = None
    ) -> None:
        self.engines = engines
        self.salt = salt
        self.guess = guess  # how many tokens
        self.has_names = has_names  # whether ids would tell what engines call its blocks
        self.ids = ids
        self.tokenizer: ContentFingerprint | None = None  # of who is asked for the ids
        self.asked: _Asked | None = None
        self.prompt: Prompt | None = None  # for who has read it

    def drop(self) -> None:
        """Nobody will read it. Nothing if somebody has."""
        if self.asked is not None:
            self.asked.call.drop()


class _Asked(NamedTuple):
    key: bytes  # under which the ids are remembered
    patience_s: float
    at: float
    call: Call


def _too_long(ids: Sequence[int], engines: Sequence[Candidate]) -> bool:
    """Whether every engine will refuse it anyway."""
    contexts = [engine.info.context_tokens for engine in engines]
    return all(contexts) and len(ids) > max(contexts, default=0)


def tokenize_question(path: str, body: Mapping[str, Any]) -> bytes:
    """For /tokenize, whose defaults are those of completions and of chats."""
    first = {"messages": body.get("messages")} if path == CHAT else {"prompt": _only(body.get("prompt"))}
    others = ("model", *(CHAT_FIELDS if path == CHAT else TEXT_FIELDS))
    return msgspec.json.encode(first | {field: body[field] for field in others if body.get(field) is not None})


def patience_for(tokens: int, engines: Sequence[Candidate], *, takes_s: float = 0.0) -> float:
    """How long to wait for a prompt's ids, in seconds; 0: not at all, for there is nothing to choose, or to save.

    `takes_s`: which asking for ids takes, as a rule.
    """
    prefills = sum(engine.info.role != "decode" for engine in engines)
    decodes = sum(engine.info.role != "prefill" for engine in engines)
    if prefills < 2 and decodes < 2:
        return 0.0
    if not any(tokens >= engine.info.content.block_tokens for engine in engines):
        return 0.0
    paces = [engine.tokens_per_s for engine in engines if engine.tokens_per_s]
    worth_s = PATIENCE_SHARE * tokens / (max(paces) if paces else NOMINAL_TOKENS_PER_S)
    return min(max(worth_s, PATIENCE_MIN_S), PATIENCE_MAX_S) if worth_s >= takes_s else 0.0


def _only(prompt: Any) -> Any:
    """The prompt of a completion, which may be given as a list of one."""
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int) else prompt


def _adapters(engines: Sequence[Candidate]) -> set[str]:
    return {name for engine in engines for name in engine.info.adapters}


def _letters(prompt: object) -> int:
    """Of a text, or of all texts in a chat."""
    letters, left = 0, [prompt]  # not by recursion: JSON may be as deep as Python's stack
    while left:
        each = left.pop()
        if isinstance(each, str):
            letters += len(each)
        elif isinstance(each, list):
            left.extend(each)
        elif isinstance(each, dict):
            left.append(each.get("content") or each.get("text"))
    return letters
