"""Which lane a pair takes, by what both ends have, and what it says of it."""

from __future__ import annotations

import pytest

from pdx.errors import UnknownTransport
from pdx.transport.choice import choose
from pdx.wire import LaneOffer

TCP = LaneOffer(endpoint="tcp://10.0.0.2:1")
NIXL = LaneOffer(endpoint="nixl://10.0.0.2:2")
NIXL_RDMA = LaneOffer(endpoint="nixl://10.0.0.2:2", devices=["mlx5_0"])
UCX_RDMA = LaneOffer(endpoint="ucx://10.0.0.2:3", devices=["mlx5_1"])


@pytest.mark.parametrize(
    ("ours", "theirs", "about", "scheme", "reason"),
    [
        ([NIXL_RDMA, TCP], [NIXL_RDMA, TCP], {}, "nixl", "RDMA at both ends"),
        ([UCX_RDMA, TCP], [NIXL_RDMA, UCX_RDMA, TCP], {}, "ucx", "RDMA at both ends"),
        ([NIXL_RDMA, TCP], [UCX_RDMA, TCP], {}, "tcp", "the peer has no nixl"),
        ([NIXL_RDMA, TCP], [NIXL, TCP], {}, "tcp", "nixl has no RDMA at the peer"),
        ([NIXL, TCP], [NIXL_RDMA, TCP], {}, "tcp", "nixl has no RDMA here"),
        ([TCP], [NIXL_RDMA, TCP], {"absent": ["no RDMA device here"]}, "tcp", "no RDMA device here"),
        ([NIXL, TCP], [NIXL, TCP], {"transport": "nixl"}, "nixl", "asked for"),
        ([NIXL, TCP], [TCP], {"transport": "nixl"}, "tcp", "the peer has no nixl"),
        ([TCP], [NIXL_RDMA, TCP], {"transport": "tcp"}, "tcp", "asked for"),
        ([NIXL_RDMA], [NIXL_RDMA, TCP], {"require_rdma": True}, "nixl", "RDMA at both ends"),
        ([NIXL, TCP], [NIXL, TCP], {"transport": "nixl", "resting": [NIXL.endpoint]}, "tcp",
         "nixl failed between the two"),
        ([NIXL_RDMA], [NIXL_RDMA], {"require_rdma": True, "resting": [NIXL.endpoint]}, "nixl",
         "nixl failed between the two, there is no other"),
        ([NIXL, TCP], [NIXL, TCP], {"transport": "nixl", "resting": [NIXL.endpoint, TCP.endpoint]}, "nixl",
         "nixl failed between the two, tcp failed between the two, there is no other"),
    ],
)  # fmt: skip
def test_the_lane_of_a_pair(
    ours: list[LaneOffer], theirs: list[LaneOffer], about: dict, scheme: str, reason: str
) -> None:
    choice = choose(ours, theirs, **about)
    assert (choice.scheme, choice.reason) == (scheme, reason)
    assert choice.endpoint in [offer.endpoint for offer in theirs]


@pytest.mark.parametrize(
    ("ours", "theirs", "about", "says"),
    [
        ([], [TCP], {}, "we have none"),
        ([NIXL_RDMA], [TCP], {"require_rdma": True}, "the peer has no nixl"),
        ([NIXL_RDMA], [NIXL, TCP], {"require_rdma": True}, "nixl has no RDMA at the peer"),
        ([TCP], [NIXL_RDMA], {"transport": "tcp"}, "the peer has no tcp"),
    ],
)
def test_no_lane_is_an_error_that_says_why(
    ours: list[LaneOffer], theirs: list[LaneOffer], about: dict, says: str
) -> None:
    with pytest.raises(UnknownTransport, match=f"no common lane: {says}"):
        choose(ours, theirs, **about)
