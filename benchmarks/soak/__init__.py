"""A pair of page engines under load and faults for as long as you like."""
