"""Lanes: how KV bytes travel between two daemons. Start with `api`, the contract."""

if __name__ != "pdx.transport":
    raise ImportError("import this package as pdx.transport; the name 'transport' is not ours to take")
