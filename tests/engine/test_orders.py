"""Orders of a page's dimensions, recognized by strides: every layout of vLLM, on integers."""

from __future__ import annotations

import itertools

import pytest

from pdx.engine.vllm.orders import announced, check
from pdx.errors import Refused

LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
LAYERS, BLOCKS, TOKENS, CONTENT = 3, 5, 4, 6


def strides_in(layout: str, heads: int) -> dict[str, int]:
    """Of five dimensions that lie in memory in this order."""
    sizes = {"L": LAYERS, "B": BLOCKS, "H": heads, "N": TOKENS, "C": CONTENT}
    strides, stride = {}, 1
    for dimension in reversed(layout):
        strides[dimension] = stride
        stride *= sizes[dimension]
    return strides


@pytest.mark.parametrize(("layout", "heads"), [*itertools.product(LAYOUTS, [1, 2, 8])])
def test_every_layout_of_vllm_is_taken_or_refused_by_name(layout: str, heads: int) -> None:
    strides = strides_in(layout, heads)
    shape, given = (BLOCKS, heads, TOKENS, CONTENT), tuple(strides[dimension] for dimension in "BHNC")
    if heads > 1 and layout in ("LHBNC", "BHLNC"):
        with pytest.raises(Refused, match=layout):
            announced(layout, heads=heads)
        for order in ("HNC", "NHC"):
            with pytest.raises(Refused, match="not dense"):
                check(shape, given, BLOCKS, order)
        return
    order = announced(layout, heads=heads)
    assert order == ("NC" if heads == 1 else "NHC" if "NHC" in layout else "HNC")
    assert check(shape, given, BLOCKS, order) == (strides["B"], heads * TOKENS * CONTENT)
    if heads > 1:
        with pytest.raises(Refused, match="not dense"):
            check(shape, given, BLOCKS, "NHC" if order == "HNC" else "HNC")


def test_latents_have_three_dimensions_or_one_head() -> None:
    assert check((BLOCKS, TOKENS, CONTENT), (24, 6, 1), BLOCKS, "NC") == (24, 24)
    assert check((BLOCKS, 1, TOKENS, CONTENT), (72, 999, 6, 1), BLOCKS, "NC") == (72, 24)


def test_blocks_that_a_kernel_cuts_smaller_are_dense_pieces() -> None:
    assert check((BLOCKS * 2, 3, TOKENS, CONTENT), (72, 24, 6, 1), BLOCKS, "HNC") == (144, 144)
    with pytest.raises(Refused, match="apart"):
        check((BLOCKS * 2, 3, TOKENS, CONTENT), (80, 24, 6, 1), BLOCKS, "HNC")


@pytest.mark.parametrize(
    ("shape", "strides", "order"),
    [
        ((BLOCKS + 1, 2, 4, 6), (48, 24, 6, 1), "HNC"),  # another number of blocks
        ((BLOCKS, 2, 4, 6), (48, 24, 6, 1), "NC"),  # heads where none are announced
        ((BLOCKS, 4, 6), (24, 6, 1), "HNC"),
        ((BLOCKS, 24), (24, 1), "NC"),
        ((2, BLOCKS, 2, 4, 6), (240, 48, 24, 6, 1), "HNC"),  # K and V apart, as in older versions
        ((BLOCKS, 2, 4, 6), (96, 48, 12, 2), "HNC"),  # every second element
        ((BLOCKS, 2, 4, 6), (64, 32, 8, 1), "HNC"),  # rows with gaps
        ((BLOCKS, 2, 4, 0), (1, 1, 1, 1), "HNC"),
    ],
)
def test_everything_else_is_refused(shape: tuple[int, ...], strides: tuple[int, ...], order: str) -> None:
    with pytest.raises(Refused):
        check(shape, strides, BLOCKS, order)
