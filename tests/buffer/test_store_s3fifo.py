"""The store's machine once more, with S3-FIFO as its policy."""

from __future__ import annotations

from hypothesis import settings
from test_store_machine import StoreMachine

from pdx.buffer.s3fifo import S3Fifo


class S3StoreMachine(StoreMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store.policy = S3Fifo(lambda slot: slot.keys)


TestS3Store = S3StoreMachine.TestCase
TestS3Store.settings = settings(max_examples=30, stateful_step_count=40)
