"""How much memory may still be taken: by this machine's account and by its cgroup's. Reads files, changes nothing."""

from __future__ import annotations

from pathlib import Path

_LIMIT_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # v2, v1


def memory_available(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated now without swapping or meeting a cgroup limit (v1 or v2).

    A file that does not exist limits nothing. 0 means that a limit is already exceeded.
    """
    limits = [_machine_available(proc)]
    limits += [_below_limit(folder) for folder in _own_cgroups(proc, cgroups)]
    return max(0, min((limit for limit in limits if limit is not None), default=0))


def _machine_available(proc: Path) -> int | None:
    for line in _lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _own_cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's memory cgroup and all above it: the tightest of them rules.

    Inside a container the path may name folders of the host that are not mounted here; their files are just absent,
    and the walk ends at the mount's root, which then is the container's own group.
    """
    folders = []
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroups
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
        else:
            continue
        own = root / path.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return folders


def _below_limit(folder: Path) -> int | None:
    for limit_name, usage_name in _LIMIT_FILES:
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            return limit - usage + _droppable_cache(folder)
    return None


def _droppable_cache(folder: Path) -> int:
    """File cache is charged to the group, but is given up before the limit hurts: machine totals count it as free."""
    values = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
