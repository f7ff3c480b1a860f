"""A digest of the weights that a model computes with at this moment, whoever put them there: names, shapes and bytes.

In a CPU's memory bytes are hashed where they lie. On a device they are reduced there, to two sums a chunk: only these
come to the host. A CPU engine packs linear layers' weights where nothing can read them; what they were is noted when
they are packed (see `workers`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch

PACKED = "pdx_packed"  # of a module: `tensor_digest` of the weight that was packed away
CHUNK_WORDS = 4 << 20  # at a time, on a device: 32 MiB as 64-bit words, some five times over while they are mixed


def digest_of(model: torch.nn.Module) -> str | None:
    """32 hex digits. Equal weights in equal layouts have equal digests, in whatever process.

    None: some weights can't be seen, so that nobody could tell whether they have changed.
    """
    whole = hashlib.blake2b(digest_size=16, person=b"pdx-live")
    for name, part in _parts(model):
        if part is None:
            return None
        whole.update(len(name).to_bytes(4, "little") + name.encode() + part)
    return whole.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> bytes | None:
    """Of one tensor's type, shape and bytes; 32 bytes. None for one whose bytes can't be seen."""
    import torch

    plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized or not tensor.numel():
        return None
    whole = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode(), digest_size=32)
    for flat in _flat(tensor.detach()):
        whole.update(xxhash.xxh3_128(flat.numpy()).digest() if flat.device.type == "cpu" else sums_of(flat))
    return whole.digest()


def sums_of(flat: torch.Tensor) -> bytes:
    """Of bytes in one row, on any device: 16 bytes a chunk. Each word counts by where it is, times an odd number that
    its place alone decides: a word that changes always shows, several but for chances of 2 ** -64."""
    import torch

    words, rest = flat[: flat.numel() // 4 * 4].view(torch.int32), flat[flat.numel() // 4 * 4 :]
    pieces = [*words.split(CHUNK_WORDS), *([rest] if rest.numel() else [])]
    at = torch.arange(min(CHUNK_WORDS, flat.numel()), dtype=torch.int64, device=flat.device)
    factors = [_mixed(at + start) | 1 for start in (1, 1 << 40)]
    sums = [(piece.long() * factor[: piece.numel()]).sum() for piece in pieces for factor in factors]
    return torch.stack(sums).cpu().numpy().tobytes()


def _parts(model: torch.nn.Module) -> Iterator[tuple[str, bytes | None]]:
    packed = {name: noted for name, module in model.named_modules() if (noted := vars(module).get(PACKED)) is not None}
    for name, parameter in model.named_parameters():
        module, _, own_name = name.rpartition(".")
        away = own_name == "weight" and not parameter.numel()
        yield name, packed.get(module) if away else tensor_digest(parameter)
    for name, buffer in model.named_buffers():
        if buffer.numel():  # an empty one says nothing; an empty parameter is one that lies elsewhere
            yield name, tensor_digest(buffer)


def _flat(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """All bytes in rows, in the order in which memory has them: without a copy, if the tensor has no gaps."""
    import torch

    order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim))
    dense = tensor.permute(order)
    for piece in [dense] if dense.is_contiguous() or dense.dim() < 2 else dense.unbind():
        yield piece.contiguous().view(-1).view(torch.uint8)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """A number without a pattern for each (after splitmix64, whose arithmetic wraps as int64's does)."""
    numbers = numbers * -7046029254386353131
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)
