"""Kernel families: one file per operator and ISA, each emitting scheduled TIR for given shapes."""
