"""Daemons and connectors that leave out one idea of pdx each. A bar counts only if its naive variant misses it."""
