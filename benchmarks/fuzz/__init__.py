"""Anything at all, fed to every decoder. `pdx bench fuzz`."""
