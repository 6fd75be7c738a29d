"""Elastic torch modules, factorizers and fake quantization."""
