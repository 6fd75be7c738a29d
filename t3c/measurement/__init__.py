"""Times layers and small networks on devices, for cost models to learn from."""
