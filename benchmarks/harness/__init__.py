"""What the benchmarks share: real programs to start and stop, systems to compare, measuring, reports."""
