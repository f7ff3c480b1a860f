"""What engines and daemons call the full blocks of one prompt. Named when asked for, once: hashing takes time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdx.chain import block_hashes
from pdx.errors import Refused
from pdx.keys import ContentFingerprint, short_names, tenant_of

SPACES_MAX = 4  # kinds of blocks that one model's engines have; while weights roll there are two


class Blocks:
    """Of one tenant's prompt, in each space that its engines have (`keys.space_of`). One thread at a time."""

    def __init__(self, ids: Sequence[int], salt: str, contents: Mapping[bytes, ContentFingerprint]) -> None:
        """`contents`: of the engines, by space; more of them than SPACES_MAX are left out."""
        self._ids = ids
        self._salt = salt
        self._contents = dict(list(contents.items())[:SPACES_MAX])
        self._hashes: dict[bytes, list[bytes]] = {}
        self._names: dict[bytes, tuple[int, ...]] = {}

    @classmethod
    def called(cls, hashes: Mapping[bytes, Sequence[bytes]], *, salt: str = "") -> Blocks:
        """Of which is known what engines call them, by space."""
        blocks = cls((), salt, {})
        blocks._hashes = {space: list(each) for space, each in hashes.items()}
        return blocks

    def __repr__(self) -> str:
        return f"<Blocks of {len(self._ids)} tokens in {len(self._contents)} spaces>"

    @property
    def spaces(self) -> Sequence[bytes]:
        return tuple(self._contents or self._hashes)

    def hashes(self, space: bytes) -> Sequence[bytes]:
        """As its engines call them, in order; empty where those can't be told from tokens, and of other spaces."""
        if space not in self._hashes:
            self._hashes[space] = self._hashed(space, self._ids)
        return self._hashes[space]

    def names(self, space: bytes) -> tuple[int, ...]:
        """The same in short, under the tenant."""
        if space not in self._names:
            self._names[space] = self._short(space, self.hashes(space))
        return self._names[space]

    def first_name(self, space: bytes) -> tuple[int, ...]:
        """The first of `names`, if there are any, without those behind it."""
        if space in self._hashes:
            return self.names(space)[:1]
        content = self._contents.get(space)
        return self._short(space, self._hashed(space, self._ids[: content.block_tokens])) if content else ()

    def name_all(self) -> None:
        for space in self._contents:
            self.names(space)

    def _hashed(self, space: bytes, ids: Sequence[int]) -> list[bytes]:
        content = self._contents.get(space)
        try:
            return block_hashes(content, ids, salt=self._salt) if content else []
        except Refused:
            return []

    def _short(self, space: bytes, hashes: Sequence[bytes]) -> tuple[int, ...]:
        return tuple(short_names(space + tenant_of(self._salt), hashes))
