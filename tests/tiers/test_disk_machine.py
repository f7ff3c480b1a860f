"""The disk tier against its own files: whatever is done to either, they agree and nothing wrong comes back."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tier_folder import FOLDER_BYTES, block_files, taken_bytes

from pdx.tiers import sealed
from pdx.tiers.conformance import User, key_of, payload_of
from pdx.tiers.disk import DiskTier
from pdx.tiers.tier import Loaded, Missed, Written

CAP_BYTES = 2 * FOLDER_BYTES  # ten blocks
NUMBERS = st.integers(0, 13)
PAYLOADS = [payload_of(key_of(number)) for number in range(14)]


class DiskMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "tier"
        self.spoilt: set[int] = set()
        self.open()

    def open(self) -> None:
        self.tier = DiskTier.open(self.path, cap_bytes=CAP_BYTES)
        self.user = User(self.tier)

    def teardown(self) -> None:
        self.tier.close(drain_s=5.0)
        ours = {self.file_of(number) for number in range(14)}
        assert set(block_files(self.path)) <= ours
        assert taken_bytes(self.path) <= CAP_BYTES
        self.folder.cleanup()

    def file_of(self, number: int) -> Path:
        name = sealed.name_of(key_of(number))
        return self.path / name[-2:] / name

    @rule(number=NUMBERS)
    def write(self, number: int) -> None:
        assert isinstance(self.user.write(key_of(number)), Written)

    @rule(number=NUMBERS)
    def read(self, number: int) -> None:
        found = self.tier.contains([key_of(number)])[0]
        end, payload = self.user.read(key_of(number))
        if found and number not in self.spoilt:
            assert isinstance(end, Loaded)
            assert payload == PAYLOADS[number]
        else:
            assert isinstance(end, Missed)
            self.settle()
            assert not self.file_of(number).exists()
            self.spoilt.discard(number)

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        self.tier.remove(key_of(number))
        self.settle()
        self.spoilt.discard(number)

    @rule(number=NUMBERS, position=st.integers(0, 1 << 16), is_cut=st.booleans())
    def spoil(self, number: int, position: int, is_cut: bool) -> None:
        path = self.file_of(number)
        if path.exists():
            content = bytearray(path.read_bytes())
            content[position % len(content)] ^= 1
            path.write_bytes(content[:4096] if is_cut else content)
            self.spoilt.add(number)

    @rule(number=NUMBERS)
    def lose(self, number: int) -> None:
        if self.file_of(number).exists():
            self.file_of(number).unlink()
            self.spoilt.add(number)

    @rule()
    def restart(self) -> None:
        self.tier.close(drain_s=5.0)
        self.open()
        self.spoilt = {number for number in self.spoilt if self.tier.contains([key_of(number)])[0]}

    def settle(self) -> None:
        assert self.tier._writes.wait_idle(5.0)
        self.tier.take_events()

    @invariant()
    def index_and_files_agree(self) -> None:
        self.spoilt = {number for number in self.spoilt if self.tier.contains([key_of(number)])[0]}
        self.tier.check_integrity()
        found = {number for number in range(14) if self.tier.contains([key_of(number)])[0]}
        there = {number for number in range(14) if self.file_of(number).exists()}
        assert found - self.spoilt <= there <= found
        assert len(found) == self.tier.stats().blocks
        assert self.tier.stats().used_bytes <= CAP_BYTES


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=10, stateful_step_count=25)
