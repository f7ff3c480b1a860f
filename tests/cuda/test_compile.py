"""page_copy.cu compiles for every generation that vLLM runs on, with neither GPU nor driver; cubins are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdx.engine import kernels


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.prove) for arch in ("sm_80", "sm_100"))]
)
def test_nvrtc_compiles_every_kernel(arch: str) -> None:
    cubin = kernels.compile_for(arch)
    assert cubin.startswith(b"\x7fELF")
    for name in ("pdx_gather", "pdx_scatter_bytes", "pdx_gather_digest_large", "pdx_look_digest_bytes"):
        assert name.encode() in cubin


def test_a_cubin_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(kernels, "compile_for", lambda arch: compiled.append(arch) or b"cubin")
    folder = tmp_path / "cache"
    assert [kernels.cubin_for("sm_90", folder) for _ in range(2)] == [b"cubin"] * 2
    assert kernels.cubin_for("sm_80", folder) == b"cubin"
    assert compiled == ["sm_90", "sm_80"]
    monkeypatch.setattr(kernels, "source", lambda: "another text")
    kernels.cubin_for("sm_90", folder)
    assert compiled == ["sm_90", "sm_80", "sm_90"]
    assert folder.stat().st_mode & 0o077 == 0


def test_a_cubin_that_was_cut_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a power failure: it would be taken until somebody deletes it."""
    monkeypatch.setattr(kernels, "compile_for", lambda _: b"ours and long")
    kernels.cubin_for("sm_90", tmp_path)
    (kept,) = tmp_path.glob("*.cubin")
    whole = kept.read_bytes()
    for cut in (b"", whole[:10], whole[:-1]):
        kept.write_bytes(cut)
        assert kernels.cubin_for("sm_90", tmp_path) == b"ours and long"
        assert kept.read_bytes() == whole


def test_somebody_elses_cubin_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compile_for", lambda _: b"ours")
    kernels.cubin_for("sm_90", tmp_path)
    next(tmp_path.glob("*.cubin")).write_bytes(b"theirs")
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert kernels.cubin_for("sm_90", tmp_path) == b"ours"


def test_a_text_that_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "source", lambda: "not C++")
    with pytest.raises(kernels.Refused, match=r"page_copy\.cu for sm_90"):
        kernels.compile_for("sm_90")
