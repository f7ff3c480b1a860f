"""What a look at a machine finds of one item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "absent"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`missing`: pdx can't serve here as it is configured. `absent`: it serves without. `fix`: what would help."""

    item: str
    state: State
    line: str
    fix: str = ""
