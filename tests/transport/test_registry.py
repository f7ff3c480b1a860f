"""Finding a lane by its URL."""

from __future__ import annotations

import pytest

from pdx.errors import ClosedTransport, ConfigError, UnknownTransport
from pdx.transport.api import Lane
from pdx.transport.rdma import Rdma
from pdx.transport.registry import check_known, known_schemes, offer_of, open_lane, open_lanes
from pdx.wire import LaneOffer


def test_tcp_binds_a_free_port_and_publishes_it() -> None:
    lane = open_lane("tcp://127.0.0.1:0", key=None, name="test")
    try:
        assert lane.scheme == "tcp"
        assert lane.endpoint.startswith("tcp://127.0.0.1:")
        assert not lane.endpoint.endswith(":0")
    finally:
        lane.close(drain_s=0.0)


@pytest.mark.parametrize("url", ["carrier-pigeon://roof", "loopback://roof"])
def test_unknown_scheme_lists_the_known(url: str) -> None:
    with pytest.raises(UnknownTransport, match=r"known: nixl, tcp, ucx"):
        open_lane(url, key=None, name="test")
    assert "tcp" in known_schemes()


def test_what_operators_may_ask_for_is_known_before_anything_is_opened() -> None:
    for transport in ("auto", "tcp", "nixl", "ucx"):
        check_known(transport)
    with pytest.raises(UnknownTransport, match="no lane for scheme 'loopback'; known: nixl, tcp, ucx"):
        check_known("loopback")


@pytest.mark.parametrize(
    "url", ["tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:1/x", "tcp://[::1"]
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(ConfigError):
        open_lane(url, key=None, name="test")


def test_off_loopback_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="cluster key"):
        open_lane("tcp://192.0.2.1:0", key=None, name="test")


def test_an_address_of_another_host_names_the_flag() -> None:
    with pytest.raises(
        ConfigError, match=r"can't listen at tcp://192\.0\.2\.1:0: .*; --host must be an address of this"
    ):
        open_lane("tcp://192.0.2.1:0", key=bytes(32), name="test")


def test_a_taken_port_is_a_configuration_error() -> None:
    lane = open_lane("tcp://127.0.0.1:0", key=None, name="test")
    try:
        with pytest.raises(ConfigError, match="--lane-port"):
            open_lane(lane.endpoint, key=None, name="test")
    finally:
        lane.abort()


NO_RDMA = Rdma((), "no RDMA device here")
ONE_DEVICE = Rdma(("mlx5_0",))


class Machine:
    """Opens tcp, and under other names what is installed here: by scheme, with the RDMA devices that it uses."""

    def __init__(self, **devices: tuple[str, ...]) -> None:
        self.devices = devices
        self.opened: list[Lane] = []
        self.urls: list[str] = []

    def open(self, url: str) -> Lane:
        self.urls.append(url)
        scheme = url.partition("://")[0]
        if scheme != "tcp" and scheme not in self.devices:
            raise UnknownTransport(f"{scheme}:// is not installed")
        lane = open_lane("tcp://127.0.0.1:0", key=None, name="test")
        self.opened.append(lane)
        if scheme != "tcp":
            lane.scheme = scheme
            lane.devices = self.devices[scheme]  # type: ignore[attr-defined]
        return lane


def opened(machine: Machine, rdma: Rdma, transport: str = "auto", *, require_rdma: bool = False) -> tuple[str, str]:
    """The schemes, and the reasons."""
    try:
        lanes, reasons = open_lanes(
            "127.0.0.1", transport=transport, require_rdma=require_rdma, rdma=rdma, open_one=machine.open
        )
        assert lanes == machine.opened
        return " ".join(lane.scheme for lane in lanes), ", ".join(reasons)
    finally:
        for lane in machine.opened:
            lane.abort()


@pytest.mark.parametrize(
    ("devices", "rdma", "transport", "schemes", "reason"),
    [
        ({"nixl": ("mlx5_0",), "ucx": ("mlx5_0",)}, ONE_DEVICE, "auto", "nixl tcp", ""),
        ({"ucx": ("mlx5_0",)}, ONE_DEVICE, "auto", "ucx tcp", "nixl:// is not installed"),
        ({}, ONE_DEVICE, "auto", "tcp", "nixl:// is not installed, ucx:// is not installed"),
        ({"nixl": ()}, NO_RDMA, "auto", "tcp", "no RDMA device here"),
        ({"nixl": ()}, NO_RDMA, "nixl", "nixl tcp", ""),
        ({"nixl": ("mlx5_0",)}, ONE_DEVICE, "tcp", "tcp", ""),
    ],
)
def test_the_lanes_that_a_daemon_opens(
    devices: dict[str, tuple[str, ...]], rdma: Rdma, transport: str, schemes: str, reason: str
) -> None:
    assert opened(Machine(**devices), rdma, transport) == (schemes, reason)


def test_each_lane_has_the_port_after_the_last_ones() -> None:
    machine = Machine(nixl=())
    open_lanes(
        "10.0.0.1", port=7000, transport="nixl", require_rdma=False, rdma=NO_RDMA, open_one=machine.open
    )  # fmt: skip
    for lane in machine.opened:
        lane.abort()
    assert machine.urls == ["nixl://10.0.0.1:7000", "tcp://10.0.0.1:7001"]


def test_required_rdma_leaves_tcp_out() -> None:
    assert opened(Machine(nixl=("mlx5_0",)), ONE_DEVICE, require_rdma=True) == ("nixl", "")


@pytest.mark.parametrize(
    ("devices", "rdma", "transport", "says"),
    [
        ({"nixl": ()}, NO_RDMA, "auto", "can't be met: no RDMA device here"),
        ({"nixl": ()}, NO_RDMA, "nixl", "can't be met: no RDMA device here"),
        ({}, ONE_DEVICE, "auto", "can't be met: nixl:// is not installed, ucx:// is not installed"),
        ({"cma": ()}, ONE_DEVICE, "cma", "can't be met: the cma lane uses none"),
    ],
)
def test_required_rdma_that_is_not_there(
    devices: dict[str, tuple[str, ...]], rdma: Rdma, transport: str, says: str
) -> None:
    machine = Machine(**devices)
    with pytest.raises(ConfigError, match=says):
        open_lanes("127.0.0.1", transport=transport, require_rdma=True, rdma=rdma, open_one=machine.open)
    for lane in machine.opened:  # whatever was opened before is closed again
        with pytest.raises(ClosedTransport):
            lane.register(memoryview(bytearray(1)))


def test_a_lane_that_is_asked_for_and_not_there() -> None:
    with pytest.raises(UnknownTransport, match="nixl:// is not installed"):
        opened(Machine(), NO_RDMA, "nixl")


def test_what_peers_are_told_of_a_lane() -> None:
    machine = Machine(nixl=("mlx5_0",))
    lanes = [machine.open("nixl://"), machine.open("tcp://")]
    try:
        assert [offer_of(lane).devices for lane in lanes] == [["mlx5_0"], []]
        assert offer_of(lanes[1]) == LaneOffer(endpoint=lanes[1].endpoint)
    finally:
        for lane in lanes:
            lane.abort()
