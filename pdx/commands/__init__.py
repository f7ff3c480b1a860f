"""The verbs of `pdx` that start nothing: they ask, steer, look and measure. Those that start things are in `launch`."""
