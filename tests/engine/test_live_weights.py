"""The digest of weights that a model computes with: every bit counts, on the host and by the sums of a device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: no model to digest")

from pdx.engine.vllm import live_weights  # noqa: E402
from pdx.engine.vllm.live_weights import PACKED, digest_of, sums_of, tensor_digest  # noqa: E402


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.one = torch.nn.Parameter(torch.randn(16, 9, generator=generator).to(torch.bfloat16))
        self.two = torch.nn.Parameter(torch.randn(7, 4, 3, generator=generator).permute(2, 0, 1))
        self.gaps = torch.nn.Parameter(torch.randn(6, 8, generator=generator)[:, :5])
        self.inner = torch.nn.Linear(4, 2, bias=False)
        self.inner.weight.data = torch.arange(8, dtype=torch.float32).view(2, 4)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.empty(0))


def test_equal_weights_have_equal_digests_and_any_change_shows() -> None:
    net = Net()
    first = digest_of(net)
    assert first is not None and len(first) == 32
    assert digest_of(Net()) == first
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        for place in range(tensor.numel()):
            changed = Net()
            other = dict([*changed.named_parameters(), *changed.named_buffers()])[name]
            index = tuple(torch.unravel_index(torch.tensor(place), other.shape))
            other.data[index] = ~other.data[index] if other.dtype is torch.bool else other.data[index] + 1
            assert digest_of(changed) != first, (name, place)


def test_names_shapes_and_types_count() -> None:
    tensor = torch.zeros(4, 6)
    others = (torch.zeros(6, 4), torch.zeros(24), torch.zeros(4, 6, dtype=torch.int32), torch.zeros(6, 4).t())
    assert tensor_digest(tensor) not in {tensor_digest(other) for other in others}
    one, two = torch.nn.Module(), torch.nn.Module()
    one.register_buffer("a", tensor)
    two.register_buffer("b", tensor)
    assert digest_of(one) != digest_of(two)


def test_weights_that_can_t_be_seen_have_no_digest() -> None:
    """A CPU engine's linear layers keep an empty parameter: to digest what is left would miss nearly every weight."""
    net = Net()
    net.inner.weight = torch.nn.Parameter(torch.empty(0))
    assert digest_of(net) is None
    setattr(net.inner, PACKED, b"one")
    noted = digest_of(net)
    assert noted is not None
    setattr(net.inner, PACKED, b"two")
    assert digest_of(net) not in (noted, None)
    assert digest_of(Net().to("meta")) is None
    assert tensor_digest(torch.eye(3).to_sparse()) is None


def test_sums_of_a_device_see_every_word_and_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_weights, "CHUNK_WORDS", 8)
    flat = torch.randint(0, 255, (4 * 21 + 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    first = sums_of(flat)
    assert len(first) == 16 * 4
    found = {first}
    for place in range(len(flat)):
        for bit in (0, 7):
            other = flat.clone()
            other[place] ^= 1 << bit
            found.add(sums_of(other))
    assert len(found) == 1 + 2 * len(flat)
    words = flat[:84].view(torch.int32).clone()
    words[0], words[1] = words[1].clone(), words[0].clone()
    assert sums_of(words.view(torch.uint8)) != sums_of(flat[:84])
    words = flat[:64].view(torch.int32).clone()
    assert sums_of(words.roll(8).view(torch.uint8)) != sums_of(flat[:64]), "whole chunks change places"
    words[0] += 1
    words[1] -= 1
    assert sums_of(words.view(torch.uint8)) != sums_of(flat[:64]), "the sum of all words is the same"
