"""The store's machine once more, with S3-FIFO as its policy, and all that is done in parts done in the smallest."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import rule
from test_store_machine import StoreMachine

from pdx.buffer import by_layout, store
from pdx.buffer.by_tenant import ByTenant
from pdx.buffer.policies import POLICIES


class S3StoreMachine(StoreMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store.policy = ByTenant(POLICIES["s3fifo"](), self.store.quotas, self.store.extents.pools)

    @rule()
    def drop_cleared(self) -> None:
        self.store.drop_cleared()


@pytest.fixture(autouse=True)
def in_the_smallest_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DROPPED_AT_ONCE", 1)
    monkeypatch.setattr(by_layout, "OTHERS_MAX", 1)


TestS3Store = S3StoreMachine.TestCase
TestS3Store.settings = settings(max_examples=30, stateful_step_count=40)
