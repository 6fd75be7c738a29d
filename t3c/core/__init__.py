"""Values and contracts that every other package shares: standard library and numpy only."""
