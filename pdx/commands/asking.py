"""The flags by which commands find a router's admin port and show it a token."""

from __future__ import annotations

import argparse

from pdx import config

ADMIN_HELP = f"its admin port (default: PDX_ADMIN, or {config.ADMIN_URL})"


def add_admin_flags(parser: argparse.ArgumentParser, *, help_text: str) -> None:
    """Values are in `admin`, which is None where nothing was said, and `key_file`."""
    admin = parser.add_argument("--admin", metavar="URL", help=help_text)
    config.also_named(parser, admin, "--router")  # elsewhere that is a control endpoint
    parser.add_argument("--key-file", metavar="FILE", help="the cluster key, where the admin port wants its token")


def admin_of(options: argparse.Namespace) -> str:
    """Where the admin port is: as was said, else what PDX_ADMIN says, else this host's usual one."""
    return options.admin or config.admin_url() or config.ADMIN_URL
