"""pdx: LLM engines as one system, with the KV cache as its medium.

Importing this package loads neither torch nor vLLM; ARCHITECTURE.md is the map of what lives where.
"""

__version__ = "0.1.0"
