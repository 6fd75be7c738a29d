"""Profile chains: the search over per-layer formats."""
