"""Who may ask: API keys, the tenants that they stand for, and the web origins whose pages may ask and read answers.

Keys are kept as digests and compared in constant time, all of them at every request, so that neither memory nor timing
tells one. A key may have a tenant: then its requests carry that tenant's `cache_salt`, whatever the client says, and
find only what the tenant has computed. Salts of clients without a tenant are changed where there are tenants, to what
no tenant is called by.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pdx.config import is_loopback
from pdx.errors import ConfigError

KEY_CHARS_MIN = 16  # shorter ones can be guessed
KEYS_MAX = 1000  # each is compared at each request: 0.3 ms
SALT_FIELD = "cache_salt"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Salts of clients that stay as they are behind a tenant. vLLM 0.32 takes 128 characters, and none of @, /, \ and NUL.
_PLAIN_SALT = re.compile(r"[A-Za-z0-9_.:=+-]{1,63}")


class Caller(msgspec.Struct, frozen=True):
    """Whose key it was: a name for metrics, and the tenant, if the key has one."""

    name: str
    tenant: str = ""
    is_apart: bool = False  # has no tenant, where others have: its salts must be none of theirs

    def salted(self, body: dict[str, Any]) -> bool:
        """Puts the request under the caller's tenant; true if that changed it.

        A salt that the client gives divides the tenant further, as it would divide the whole cache.
        """
        own = body.get(SALT_FIELD)
        behind = _behind(own) if isinstance(own, str) and own else ""
        if not self.tenant and not (self.is_apart and behind):
            return False
        body[SALT_FIELD] = self.tenant + behind
        return True


class ApiKeys:
    """The keys of one router. Without any, everybody is let in, and nothing is said about them."""

    def __init__(self, keys: Mapping[str, Caller]) -> None:
        self._callers = [(_digest(key), caller) for key, caller in keys.items()]

    def __repr__(self) -> str:
        return f"<ApiKeys of {', '.join(caller.name for _, caller in self._callers) or 'nobody'}>"

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, headers: Mapping[str, str]) -> Caller | None:
        """Whose key these headers bring, as OpenAI clients (Authorization) or Anthropic's (x-api-key) send it."""
        scheme, _, bearer = headers.get("Authorization", "").partition(" ")
        given = _digest(bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        found = None
        for digest, caller in self._callers:
            if hmac.compare_digest(given, digest):
                found = caller
        return found


def read_keys(given: Sequence[str], file: str) -> ApiKeys:
    """The keys of a command line, named after their places, and those of a file. Raises ConfigError.

    A line of the file is `NAME KEY` or `NAME KEY TENANT`; lines that begin with # are comments.
    """
    keys = {key: Caller(f"key{place}") for place, key in enumerate(given, start=1)}
    for number, line in enumerate(_lines(file), start=1) if file else ():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in (2, 3) or not all(_NAME.fullmatch(word) for word in (words[0], *words[2:])):
            raise ConfigError(f"{file}:{number}: write NAME KEY, or NAME KEY TENANT; names of [A-Za-z0-9_.-]")
        if words[1] in keys:
            raise ConfigError(f"{file}:{number}: this key is there already")
        keys[words[1]] = Caller(words[0], words[2] if len(words) == 3 else "")
    short = [caller.name for key, caller in keys.items() if len(key) < KEY_CHARS_MIN]
    if short:
        raise ConfigError(f"API keys have at least {KEY_CHARS_MIN} characters: {', '.join(short)} has not")
    if len(keys) > KEYS_MAX:
        raise ConfigError(f"{len(keys)} API keys; a router takes {KEYS_MAX}")
    has_tenants = any(caller.tenant for caller in keys.values())
    apart = {key: Caller(caller.name, is_apart=has_tenants) for key, caller in keys.items() if not caller.tenant}
    return ApiKeys({**keys, **apart})


class Origins:
    """Web pages of these origins may ask, and read answers (CORS); "*" is all of them."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(allowed)

    def may_ask(self, headers: Mapping[str, str]) -> bool:
        """A browser sends some requests of any page without a preflight, and says only whose they are. A page that was
        served under the name that it asks, by a proxy before both, is none of another's."""
        origin = headers.get("Origin", "")
        if not origin or self._allowed & {origin, "*"}:
            return True
        named = origin.partition("://")[2].lower()
        return bool(named) and named == headers.get("Host", "").lower()

    def headers(self, origin: str) -> dict[str, str]:
        """What an answer to a page of this origin says; nothing, unless it is allowed."""
        if not origin or not self._allowed & {origin, "*"}:
            return {}
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": "*"}

    def preflight(self, origin: str, wanted_headers: str) -> dict[str, str]:
        shown = self.headers(origin)
        if not shown:
            return {}
        allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
        return {**shown, **allowed, "Access-Control-Allow-Headers": wanted_headers or "Content-Type"}


def names_loopback(headers: Mapping[str, str]) -> bool:
    """Whether a client calls this host by a name of the loopback.

    A web page whose own name was made to lead here (DNS rebinding) does not: its browser says that name.
    """
    try:
        return is_loopback(urlsplit(f"//{headers.get('Host', '')}").hostname or "")
    except ValueError:
        return False


def _lines(file: str) -> list[str]:
    path = Path(file)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API keys {file}: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"API keys {file} are readable by others: chmod 600 {file}")
    return lines


def _behind(own: str) -> str:
    """What a client's own salt adds to its tenant's name, or to none: itself, for operators to say, or else its digest.

    Neither ":" nor "=" is in a tenant's name: nobody's salt within one tenant is another tenant.
    """
    if _PLAIN_SALT.fullmatch(own):
        return f":{own}"
    return "=" + hashlib.blake2b(own.encode(), digest_size=16, person=b"pdx-own-salt").hexdigest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
