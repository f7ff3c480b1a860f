"""Which engines serve a request: policies, and what they know of prompts, prefixes and paces."""
