"""The store's machine once more, with S3-FIFO as its policy."""

from __future__ import annotations

from hypothesis import settings
from test_store_machine import StoreMachine

from pdx.buffer.by_tenant import ByTenant
from pdx.buffer.policies import POLICIES


class S3StoreMachine(StoreMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store.policy = ByTenant(POLICIES["s3fifo"](), self.store.quotas, self.store.extents.pools)


TestS3Store = S3StoreMachine.TestCase
TestS3Store.settings = settings(max_examples=30, stateful_step_count=40)
