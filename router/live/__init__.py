"""The live page, and what it and `pdx top` are told."""
