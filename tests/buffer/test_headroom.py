from __future__ import annotations

from pathlib import Path

import pytest

from pdx.buffer.headroom import memory_available

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    return tmp_path / "proc"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def v2(folder: Path, *, limit: object, usage: int, cache: int = 0) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", usage)
    write(folder / "memory.stat", f"anon 1\ninactive_file {cache}")


def test_without_cgroups_the_machine_decides(proc: Path, tmp_path: Path) -> None:
    assert memory_available(proc=proc, cgroups=tmp_path / "none") == 8 * GIB


def test_the_tightest_group_above_us_rules(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/cgroup", "0::/team/job")
    v2(tmp_path / "cg/team/job", limit="max", usage=GIB)
    v2(tmp_path / "cg/team", limit=4 * GIB, usage=3 * GIB)
    assert memory_available(proc=proc, cgroups=tmp_path / "cg") == GIB


def test_file_cache_counts_as_free(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/cgroup", "0::/")
    v2(tmp_path / "cg", limit=4 * GIB, usage=3 * GIB, cache=2 * GIB)
    assert memory_available(proc=proc, cgroups=tmp_path / "cg") == 3 * GIB


def test_version_one_groups_and_paths_that_are_not_mounted(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/cgroup", "8:memory:/docker/abc\n3:cpu,cpuacct:/\n0::/")
    write(tmp_path / "cg/memory/memory.limit_in_bytes", 2 * GIB)
    write(tmp_path / "cg/memory/memory.usage_in_bytes", GIB // 2)
    write(tmp_path / "cg/memory/memory.stat", "inactive_file 5\ntotal_inactive_file 0")
    assert memory_available(proc=proc, cgroups=tmp_path / "cg") == 3 * GIB // 2


def test_an_exceeded_limit_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/cgroup", "0::/")
    v2(tmp_path / "cg", limit=GIB, usage=2 * GIB)
    assert memory_available(proc=proc, cgroups=tmp_path / "cg") == 0


def test_this_machine_has_memory() -> None:
    assert memory_available() > 0
