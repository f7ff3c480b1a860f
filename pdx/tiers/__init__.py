"""Where blocks go that the arena has no room for: the contract of a tier, a disk, and a memory for tests."""
