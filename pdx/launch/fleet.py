"""What `pdx up` starts: names, pins, flags and folders of a router, daemons and engines. Pure: starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdx.config import FLAGS
from pdx.launch.engine import EngineSpec, memory_flags
from pdx.launch.shares import shares

# `pdx up` ends its daemons itself; until then one that waits for slow engines must not take itself for left alone.
LINGER_S = 1e9


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the operator asked for."""

    model: str
    prefill: int
    decode: int
    hosts: int  # run directories, each with a daemon of its own; with 2, handoffs go over a lane
    settings: Mapping[str, str]  # of the daemons, by pdx.config's keys; and of engines only
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the machine offers."""

    base: Path  # an empty private folder
    cores: tuple[int, ...]  # to pin to; empty: pin nothing
    gpus: tuple[str, ...]
    ports: tuple[int, ...]  # one per engine


@dataclass(frozen=True, kw_only=True)
class DaemonSpec:
    name: str
    run_dir: Path
    settings: Mapping[str, str]
    cpus: str

    def command(self) -> list[str]:
        flags = ["--run-dir", str(self.run_dir), "--linger-s", str(LINGER_S)]
        flags += [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()]
        return [sys.executable, "-m", "pdx.daemon.main", *flags]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Everything to start, in order; engines still lack the router's endpoint, which is known once it listens."""

    base: Path
    daemons: tuple[DaemonSpec, ...]
    engines: tuple[EngineSpec, ...]
    router_cpus: str

    def __str__(self) -> str:
        specs = [(daemon.name, daemon.cpus) for daemon in self.daemons]
        specs += [(spec.name, spec.cpus) for spec in self.engines]
        specs.append(("router", self.router_cpus))
        return ", ".join(f"{name} on {f'core {cpus}' if cpus else 'any core'}" for name, cpus in specs)


def design(wish: Wish, ground: Ground) -> Fleet:
    """Prefill engines and their daemon on the first cores, decode engines, the router and theirs on the last."""
    roles = ["prefill"] * wish.prefill + ["decode"] * wish.decode
    cpus = [",".join(map(str, share)) for share in shares(ground.cores, len(roles))]
    gpus = [",".join(share) for share in shares(ground.gpus, len(roles))]
    daemons = tuple(
        DaemonSpec(
            name=f"pdxd-{'ab'[index]}",
            run_dir=ground.base / "ab"[index],
            settings=_of_daemon(wish, "ab"[index]),
            cpus=cpus[0 if index == 0 else -1],
        )
        for index in range(wish.hosts)
    )
    hosting = {"prefill": daemons[0], "decode": daemons[-1]}
    engines = tuple(
        EngineSpec(
            name=f"{role}-{index if role == 'prefill' else index - wish.prefill}",
            role=role,
            model=wish.model,
            port=ground.ports[index],
            cpus=cpus[index],
            gpus=gpus[index],
            settings={
                **wish.settings,
                **hosting[role].settings,
                "run_dir": str(hosting[role].run_dir),
                "start_daemon": False,  # of one that an engine has started nobody here would know
            },
            flags=(*memory_flags(wish.flags, gpus=len(ground.gpus), engines=len(roles)), *wish.flags),
        )
        for index, role in enumerate(roles)
    )
    return Fleet(base=ground.base, daemons=daemons, engines=engines, router_cpus=cpus[-1])


def _of_daemon(wish: Wish, name: str) -> dict[str, str]:
    """Of two, each has a folder of its own on the disk."""
    settings = {key: value for key, value in wish.settings.items() if key in FLAGS}
    if wish.hosts > 1 and "disk" in settings:
        settings["disk"] = str(Path(settings["disk"]) / name)
    return settings
