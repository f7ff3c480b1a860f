"""Which kinds of blocks this daemon has met: content, layout and shape of every engine that was attached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from pdx.daemon.sessions import Engine
from pdx.errors import Refused
from pdx.keys import ContentFingerprint, LayoutFingerprint, space_of
from pdx.layout import PageLayout
from pdx.verbs import SpaceInfo, Spaces

SPACES_MAX = 256  # models and their versions on one host


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

    def __init__(self) -> None:
        self._kinds: OrderedDict[bytes, Kind] = OrderedDict()

    def met(self, engine: Engine) -> None:
        """Those met longest ago are forgotten first."""
        if engine.pages is None:
            return
        space = space_of(engine.info.content, engine.info.layout)
        self._kinds[space] = kind_of(engine)
        self._kinds.move_to_end(space)
        if len(self._kinds) > SPACES_MAX:
            self._kinds.popitem(last=False)

    def get(self, space: bytes) -> Kind:
        """Raises Refused for one that was never here."""
        kind = self._kinds.get(space)
        if kind is None:
            raise Refused("no engine with such blocks has been attached to this daemon")
        return kind

    def of_model(self, model: str) -> list[bytes]:
        return [space for space, kind in self._kinds.items() if kind.content.model == model]

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
