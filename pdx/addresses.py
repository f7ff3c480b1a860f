"""Hosts as they stand in addresses: a name, IPv4, or IPv6, which is in brackets there."""

from __future__ import annotations

import socket


def authority(host: str, port: int) -> str:
    """host:port as URLs have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family_of(host: str) -> socket.AddressFamily:
    """Of a socket that is to listen there."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def has_ipv6(endpoint: str) -> bool:
    """A ZeroMQ socket must be told before it goes there. Told always, it would write IPv4 addresses as IPv6 ones."""
    return "[" in endpoint
