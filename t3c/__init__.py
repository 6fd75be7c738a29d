"""T3C. Importing this package loads neither torch nor tvm."""
