"""In which type the demo model is computed: what this machine multiplies by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.model import dtype_flags


@pytest.mark.parametrize(
    ("flags", "has_gpu", "expected"),
    [
        ("fpu avx2 avx512f avx512_bf16 amx_tile", False, ()),
        ("fpu avx2 amx_bf16", False, ()),
        ("asimd bf16", False, ()),
        ("fpu avx2 avx512f", False, ("--dtype", "float32")),
        ("fpu avx2", True, ()),
    ],
)
def test_float32_where_the_cpu_knows_no_bfloat16(
    tmp_path: Path, flags: str, has_gpu: bool, expected: tuple[str, ...]
) -> None:
    cpu, gpu = tmp_path / "cpuinfo", tmp_path / "nvidia0"
    cpu.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    if has_gpu:
        gpu.touch()
    assert dtype_flags(cpu, gpu) == expected
