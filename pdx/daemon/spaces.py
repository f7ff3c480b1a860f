"""Which kinds of blocks this daemon has met: content, layout and shape of every engine that was attached."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdx.daemon.sessions import Engine
from pdx.errors import Refused
from pdx.keys import ContentFingerprint, LayoutFingerprint, space_of
from pdx.layout import PageLayout
from pdx.verbs import SpaceInfo, Spaces
from pdx.whole import write_whole

SPACES_MAX = 256  # models and their versions on one host

log = logging.getLogger("pdxd")


@dataclass(frozen=True)
class Kind:
    content: ContentFingerprint
    layout: LayoutFingerprint
    pages: PageLayout


def kind_of(engine: Engine) -> Kind:
    """Of one whose workers have attached."""
    assert engine.pages is not None
    return Kind(engine.info.content, engine.info.layout, engine.pages)


class KnownSpaces:
    """Remembers them when their engines have left: their blocks are still there. Owned by the control thread."""

    def __init__(self, file: Path | None = None) -> None:
        """`file`: remembers them for the daemon's next life, as its disk does their blocks, which tell no model."""
        self._file = file
        self._kinds: OrderedDict[bytes, Kind] = OrderedDict()
        for kind in _kinds_in(file) if file is not None else ():
            self._kinds[space_of(kind.content, kind.layout)] = kind

    def met(self, engine: Engine) -> None:
        """Those met longest ago are forgotten first."""
        if engine.pages is None:
            return
        space, kind = space_of(engine.info.content, engine.info.layout), kind_of(engine)
        is_news = self._kinds.get(space) != kind
        self._kinds[space] = kind
        self._kinds.move_to_end(space)
        if len(self._kinds) > SPACES_MAX:
            self._kinds.popitem(last=False)
        if is_news:
            self._save()

    def get(self, space: bytes) -> Kind:
        """Raises Refused for one that was never here."""
        kind = self._kinds.get(space)
        if kind is None:
            raise Refused("no engine with such blocks has been attached to this daemon")
        return kind

    def all(self) -> frozenset[bytes]:
        return frozenset(self._kinds)

    def of_model(self, model: str) -> frozenset[bytes]:
        return frozenset(space for space, kind in self._kinds.items() if kind.content.model == model)

    def describe(self, engines: Iterable[Engine]) -> Spaces:
        attached: dict[bytes, list[str]] = {}
        for engine in engines:
            if engine.complete:
                attached.setdefault(space_of(engine.info.content, engine.info.layout), []).append(engine.info.url)
        infos = []
        for space, kind in self._kinds.items():
            urls = attached.get(space, [])
            served = [url for url in urls if url]
            infos.append(SpaceInfo(content=kind.content, layout=kind.layout, attached=len(urls), urls=served))
        return Spaces(spaces=infos)

    def _save(self) -> None:
        if self._file is None:
            return
        try:
            write_whole(self._file, msgspec.json.encode(list(self._kinds.values())))
        except OSError as error:  # a later life clears less by model, and says so
            log.warning("kinds of blocks are not remembered: %s", error)


def _kinds_in(file: Path) -> list[Kind]:
    """Those met longest ago first; none from a file that can't be read."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Kind])
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("kinds of blocks that were remembered can't be read: %s: %s", file, error)
        return []
