"""What the GPU data path costs, in parts; `__main__` runs them."""
