"""Scripts that measure pdx and print what they measured. Each is run as `python -m benchmarks.<name>`."""
