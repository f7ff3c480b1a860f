"""The front door: pairs each request with its engines. Start with `journey`, one request as a pure machine."""

if __name__ != "pdx.router":
    raise ImportError("import this package as pdx.router; the name 'router' is not ours to take")
