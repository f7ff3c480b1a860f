"""The seeded simulator: production state machines over a virtual clock and a network that loses and reorders."""
