"""May an engine join the pdxd that runs already? Not if that lacks what the engine's operator insists on.

A daemon's settings are those of whoever started it, and it outlives its engines: the next ones may be told others.
Lanes, and whatever decides who can read or reach the daemon, must be as asked for; of the rest the operator is told.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from pdx import config as configuration
from pdx.config import Config
from pdx.errors import ConfigError
from pdx.wire import DaemonRef

FILES = ("tls_cert", "tls_key", "tls_ca", "key_file")
SECURITY = (*FILES, "host")

log = logging.getLogger("pdx.client")


def check(config: Config, daemon: DaemonRef) -> None:
    """Raises ConfigError, saying what differs, for lanes and for settings of security that are not as asked for.

    What the engine's operator says nothing of may be as it is: to say nothing of TLS is not to forbid it.
    """
    schemes = [offer.scheme for offer in daemon.lanes]
    if config.require_rdma and not all(offer.devices for offer in daemon.lanes):
        raise _refusal(config, f"without require_rdma: it has {', '.join(schemes)}")
    if config.transport not in ("auto", schemes[0] if schemes else ""):
        raise _refusal(config, f"without transport {config.transport}: it has {', '.join(schemes)}")
    # Without word of how it was started nothing is proved: then it has none of them.
    theirs = _by_name(configuration.left_flags(config.run_path) or [])
    if theirs and not theirs.get("key_file"):
        theirs["key_file"] = str(config.run_path / configuration.KEY_NAME)
    wrong = [name for name in SECURITY if not _is_met(name, getattr(config, name), theirs.get(name, ""))]
    if wrong:
        wanted = ", ".join(f"{name} {getattr(config, name)}" for name in wrong)
        has = ", ".join(f"{name} {theirs.get(name) or 'none'}" for name in wrong)
        raise _refusal(config, f"without {wanted}: it has {has}")


def warn(config: Config) -> None:
    """The settings are the daemon's from its start on: what this engine's operator asks for besides is not had."""
    theirs = configuration.left_flags(config.run_path)
    if theirs is None:
        return
    usual = configuration.flags_of(Config())
    ours = [flag for flag in configuration.flags_of(config) if flag not in usual and flag not in theirs]
    missed = [flag for flag in ours if not _by_name([flag]).keys() & set(SECURITY)]  # those have been checked
    if missed:
        told = [flag for flag in theirs if flag not in usual]
        log.warning("the pdxd of %s was started without %s, which has no effect now (it runs with: %s)",
                    config.run_path, " ".join(missed), " ".join(told) or "defaults")  # fmt: skip


def _by_name(flags: list[str]) -> dict[str, str]:
    """What such flags as config.flags_of makes say, by the settings' names."""
    parts = (flag.removeprefix("--").partition("=") for flag in flags)
    return {name.replace("-", "_"): value for name, _, value in parts}


def _is_met(name: str, ours: str, theirs: str) -> bool:
    if ours in (getattr(Config(), name), theirs):
        return True
    return name in FILES and bool(theirs) and _same_content(Path(ours), Path(theirs))


def _same_content(ours: Path, theirs: Path) -> bool:
    """One file has several names where it is linked, or mounted into several places."""
    try:
        return ours.read_bytes() == theirs.read_bytes()
    except OSError:
        return False


def _refusal(config: Config, problem: str) -> ConfigError:
    return ConfigError(
        f"the pdxd of {config.run_path} was started {problem}; end it{_by_kill(config)}, and the next engine starts it "
        "so, or start it so yourself; or choose another run_dir"
    )


def _by_kill(config: Config) -> str:
    """How, if it has written down which process it is."""
    try:
        pid = msgspec.json.decode((config.run_path / configuration.INFO_NAME).read_bytes())["pid"]
        return f" (kill {int(pid)})"
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return ""
