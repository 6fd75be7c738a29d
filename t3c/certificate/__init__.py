"""Drift of profiles: statistics and bounds."""
