"""Proven bounds on drift over a stated domain of inputs."""

from t3c.certificate.sound.bounds import certify, sound_bounds
from t3c.certificate.sound.domain import Ball, Box, Domain

__all__ = ["Ball", "Box", "Domain", "certify", "sound_bounds"]
