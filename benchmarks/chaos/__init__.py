"""Real engines, daemons and a router under random faults; then overload."""
