"""One value of every message, with every field set: golden bytes, fuzzing and round trips all start from these."""

from __future__ import annotations

from pdx import verbs, wire
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.layout import PageLayout, Place

ID = bytes(range(16))
SPACE = bytes(range(24))
CONTENT = ContentFingerprint(
    model="smol",
    weights="ab12",
    weight_epoch="ab" * 16,
    dtype="bfloat16",
    block_tokens=128,
    hash_algorithm="sha256_cbor/none",
)
LAYOUT = LayoutFingerprint(
    engine="vllm 0.32.0", attention="CPU_ATTN/vec", layers=30, page_bytes=98304, block_tokens=128,
    packing="LBHNC", kv_groups=1, ranks=1, chunk_blocks=4,
)  # fmt: skip
PAGES = PageLayout(layers=30, page_bytes=98304, chunk_blocks=2)
PLACE = Place(slot_offset=4096, slot_blocks=2, position=1, header_offset=1280, generation=7)
ENGINE = wire.EngineInfo(
    engine_id="prefill-0", role="prefill", model="smol", url="http://127.0.0.1:8101", data_parallel_rank=1,
    reasoning_parser="deepseek_r1", context_tokens=8192, sampling_defaults={"temperature": 0.6},
    adapters={"tuned": "00ff"},
    content=CONTENT, layout=LAYOUT,
)  # fmt: skip
DAEMON = wire.DaemonRef(
    daemon_id="d0", incarnation=99, control="tcp://127.0.0.1:7000",
    lanes=[wire.LaneOffer(endpoint="nixl://127.0.0.1:7001", devices=["mlx5_0"])],
)  # fmt: skip
PEER = {"handoff_id": ID, "attempt": 1, "lease_epoch": 5, "incarnation": 99}

SAMPLES: list[wire.Message] = [
    wire.Attach(kind="worker", engine=ENGINE, pages=PAGES, rank=1, router="tcp://127.0.0.1:5700"),
    wire.Attached(
        daemon=DAEMON, session=4, socket="ipc:///run/pdx/pdxd.ipc", arena_bytes=1 << 30, fence_offset=8,
        digest_mode=True, lease_s=30.0,
    ),
    wire.AttachRefused(reason="two engines of one name"),
    wire.OpenSend(
        request_id="r", handle="h", block_hashes=[b"a" * 32], prompt_tokens=200, tail_hash=b"t" * 32, tenant=ID
    ),
    wire.Filled(
        step=9, step_started_ns=1, layer=2, filled_ns=3, entries=[wire.FilledEntry(handoff_id=ID, blocks=[0, 1])]
    ),
    wire.OpenLoad(
        request_id="r", handle="h", block_hashes=[b"a" * 32], prompt_tokens=200, tail_hash=b"t" * 32, early=True,
        tenant=ID,
    ),
    wire.LookUp(request_id="r", handoff_id=ID, block_hashes=[b"a" * 32], tenant=ID, tokens_per_s=812.5),
    wire.Keep(request_id="r", handoff_id=ID, block_hashes=[b"a" * 32], tenant=ID, origin=ID),
    wire.Finished(handoff_id=ID),
    wire.LetGo(
        handoff_id=ID, side="load", fence=9, ok=True, reason="", pages=60, done_ns=6, seconds=0.25, spoilt=[2]
    ),
    wire.Renew(handoff_ids=[ID], running=1, waiting=2, tokens_per_s=812.5),
    wire.WeightEpoch(epoch="ab" * 16),
    wire.Reset(epoch=""),
    wire.SendOpened(request_id="r", handoff_id=ID, places=[PLACE, None]),
    wire.SendEnded(request_id="r", handoff_id=ID, reason="budget"),
    wire.LoadOpened(request_id="r", handoff_id=ID, status="granted", places=[PLACE], reason=""),
    wire.LoadEnded(handoff_id=ID, reason="peer died"),
    wire.Reserve(
        **PEER, handle="h", namespace=ID, layout_id="00ff", pages=PAGES, block_hashes=[b"a" * 32], tail_hash=b"t" * 32,
        tenant=ID, lane="nixl", spare=True,
    ),
    wire.Grant(**PEER, has=[0], wanted=[1], places=[PLACE], window=1 << 60),
    wire.Wait(**PEER, ahead=3),
    wire.Refuse(**PEER, reason="KV layouts differ"),
    wire.Commit(**PEER, pages=60, checksum=(1 << 64) - 1),
    wire.Committed(**PEER),
    wire.Alive(**PEER),
    wire.Fail(**PEER, reason="engine died"),
    wire.Cancel(**PEER, reason="client left"),
    wire.Landed(
        handoff_id=ID, attempt=1, lease_epoch=5, layer=2, blocks=[0, 1], checksums=bytes(16), digests=bytes(64)
    ),
    wire.Announce(
        daemon=DAEMON, engines=[ENGINE],
        loads=[wire.EngineLoad(engine_id="prefill-0", waiting=2, tokens_per_s=812.5)],
        links=[wire.LinkRate(daemon_id="b", bytes_per_s=1e9)], reservations_waiting=1, holdings=3, leaving=False,
    ),
    wire.Holdings(daemon_id="a", incarnation=7, number=0, names=bytes(range(16)), tiers=b"\x01\x00"),
    wire.Resync(),
    wire.Share(to=DAEMON, engine="prefill-1", space=SPACE, tenant=ID, block_hashes=[b"a" * 32]),
    wire.HandoffFailed(handoff_id=ID, attempt=1, reason="nothing landed for 15 s"),
    wire.Welcome(warnings=["no decode engine"]),
    wire.CancelHandoff(handoff_id=ID, attempt=1, reason="client left"),
    wire.Ask(verb="trace", handoff_id=ID, number=1),
    wire.Answer(number=1, body={"a": 1}, error=""),
    *(
        wire.Ask(verb=verb, number=2)
        for verb in (
            verbs.Lookup(space=SPACE, tenant=ID, block_hashes=[b"a" * 32]),
            verbs.Pin(name="manual", ttl_s=60.0, space=SPACE, tenant=ID, block_hashes=[b"a" * 32]),
            verbs.Unpin(name="manual", tenant=ID),
            verbs.Clear(
                model="smol", spaces=[SPACE], tenant=ID, block_hashes=[b"a" * 32], tier="disk", older_s=3600.0,
                dry_run=True,
            ),
        )
    ),
]  # fmt: skip


def name_of(sample: wire.Message) -> str:
    """A file's: the message's and, where its shapes are many, the shape's."""
    verb = getattr(sample, "verb", "")
    return type(sample).__name__ if isinstance(verb, str) else f"{type(sample).__name__}{type(verb).__name__}"
