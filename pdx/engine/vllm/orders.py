"""In which order a page's dimensions lie in memory. Integers only: shapes and strides as any array library has them.

vLLM names its layouts by five dimensions, outermost first: L(ayers), B(locks), H(eads), N (tokens), C (a token's K and
V in one head). pdx moves a block of a layer whole, so H, N and C must lie together, in whatever order; where L and B
lie, before or between, is this engine's business alone.
"""

from __future__ import annotations

from pdx.errors import Refused


def announced(layout: str, *, heads: int) -> str:
    """The order inside one page: "HNC", "NHC", or "NC" where there is one head. Raises Refused if pages are scattered.

    >>> announced("BLNHC", heads=8), announced("LHBNC", heads=1)
    ('NHC', 'NC')
    """
    dimensions = layout if heads > 1 else layout.replace("H", "")
    inner = dimensions.lstrip("LB")
    if set(inner) & set("LB"):
        raise Refused(f"in KV layout {layout} a block of one layer is scattered: set VLLM_KV_CACHE_LAYOUT=LBHNC")
    return inner


def check(shape: tuple[int, ...], strides: tuple[int, ...], num_blocks: int, order: str) -> tuple[int, int]:
    """(distance of two blocks, size of a page), in elements, of a cache [B, H, N, C] or [B, N, C] in this order.

    A kernel may cut blocks into smaller ones: then B is so many times larger, and a page is that many dense pieces.
    Raises Refused if it is of another order, if a page has gaps, or if these are not `num_blocks` blocks.
    """
    names = {4: "HNC", 3: "NC"}.get(len(shape))
    if names is None or shape[0] % num_blocks:
        raise Refused(f"a KV cache of shape {shape} is not {num_blocks} blocks")
    pieces = shape[0] // num_blocks
    size = {name: (length, stride) for name, length, stride in zip(names, shape[1:], strides[1:], strict=True)}
    dense = 1
    for name in reversed(order):
        length, stride = size.pop(name, (0, 0))
        if length > 1 and stride != dense:
            raise Refused(f"pages of shape {shape[1:]} and strides {strides[1:]} are not dense in the order {order}")
        dense *= length
    if any(length != 1 for length, _ in size.values()) or not dense:
        raise Refused(f"pages of shape {shape[1:]} have other dimensions than {order}")
    if pieces > 1 and strides[0] != dense:
        raise Refused(f"the {pieces} pieces of a block are {strides[0]} apart, not {dense}")
    return strides[0] * pieces, dense * pieces
