"""The line before the engines: who waits, whose turn it is, who is turned away."""
