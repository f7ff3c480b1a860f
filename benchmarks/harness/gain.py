"""When does a pair pay? Waiting saved by handing a prompt over, from constants that were measured. Pure.

Baseline: one plain engine with the cores of both engines. A prompt costs people time in two ways: its own asker waits
for it (until the second token, for the first alone can't tell whether the KV has come), and everybody who is decoding
stands still while it is computed. A pair makes its asker wait longer, since only one of its engines computes, and then
for what of the transfer computing did not hide; those who decode pause only while pages are loaded. The speed of
decoding itself is not in it: a pair decodes on fewer cores, but without prefills in between.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Constants of one machine and model. The mappings are by prompt tokens, in seconds, on an idle machine."""

    plain_first_s: Mapping[int, float]
    plain_second_gap_s: float
    pair_first_s: Mapping[int, float]
    pair_second_gap_s: Mapping[int, float]  # over loopback: nothing but fixed costs
    pair_pause_s_per_token: float  # of those who decode where the pages of a prompt are loaded
    kv_bytes_per_token: float
    layers: int
    chunk_tokens: int

    def exposed_s(self, tokens: int, link_bytes_per_s: float) -> float:
        """What computing does not hide: the last layer's pages of the last chunk, or what a slow link is behind."""
        last_bytes = min(tokens, self.chunk_tokens) * self.kv_bytes_per_token / self.layers
        behind_s = tokens * self.kv_bytes_per_token / link_bytes_per_s - between(self.pair_first_s, tokens)
        return max(last_bytes / link_bytes_per_s, behind_s)

    def gain_s(self, tokens: int, link_bytes_per_s: float, *, streams: int) -> float:
        """Seconds of waiting that a pair saves for one prompt, all people together. Negative: it loses."""
        plain_s = between(self.plain_first_s, tokens) + self.plain_second_gap_s
        pair_s = between(self.pair_first_s, tokens) + between(self.pair_second_gap_s, tokens)
        others_s = between(self.plain_first_s, tokens) - tokens * self.pair_pause_s_per_token
        return plain_s - pair_s - self.exposed_s(tokens, link_bytes_per_s) + streams * others_s


def between(points: Mapping[int, float], tokens: int) -> float:
    """The value at `tokens`, on straight lines between measured points and on from the outermost ones."""
    xs = sorted(points)
    if len(xs) == 1:
        return points[xs[0]]
    right = min(max(bisect_left(xs, tokens), 1), len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    return points[low] + (points[high] - points[low]) * (tokens - low) / (high - low)
