"""What the daemon and the engines would refuse only when they have been started, asked before anything is.

Loading an engine takes minutes, and its log is long. Each question is asked by the function that the daemon asks by.
"""

from __future__ import annotations

import argparse
import math
import os

from pdx import config
from pdx.config import Config
from pdx.errors import ConfigError
from pdx.transport.registry import check_known
from pdx.transport.sockets import parse_endpoint
from pdx.transport.tls import lane_tls


def seconds(text: str) -> float:
    """A flag's. Raises ArgumentTypeError for what no wait could last."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write seconds, e.g. 900")
    return value


def check_model(model: str) -> None:
    """Raises ConfigError for a path that leads nowhere. Whatever else it is, the engine must find it."""
    if model.startswith((".", "/")) and not os.path.exists(model):
        raise ConfigError(f"MODEL {model}: there is no such file or folder, or it can't be looked at")


def check_daemon(settings: Config) -> None:
    """Raises PdxError for lanes that no daemon could open, and files of TLS or a key that it could not use."""
    check_known(settings.transport)
    lane_tls(settings)
    if settings.key_file:
        config.cluster_key(settings)


def check_engines(settings: Config) -> None:
    """The same, if these engines may have to start their daemon, and where they are to be announced."""
    for endpoint in filter(None, settings.router.split(",")):
        try:
            parse_endpoint(endpoint.strip())
        except ConfigError as error:
            raise ConfigError(f"router: {error}") from error
    if settings.start_daemon:
        check_daemon(settings)
        # On loopback it would make a key, and nothing is to be written yet. A key file has been read by now.
        if not (settings.key_file or config.is_loopback(settings.host)):
            config.cluster_key(settings)
