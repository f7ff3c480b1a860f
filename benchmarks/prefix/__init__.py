"""What a prefix that was computed before is worth: see `__main__`."""
