"""From an elastic model and some calibration data to a chain of nested profiles for one target."""
