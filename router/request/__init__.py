"""One request: its way through the engines. Start with `journey`, the pure machine; `conductor` plays it."""
