"""Lanes beside what the libraries under them, and bare sockets, do with the same bytes. `pdx bench transport`."""
