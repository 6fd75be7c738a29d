"""The fallback: every block for itself, vectors along the contiguous axis, outer axes in threads.

Before: for i, j: block(i, j)
After:  parallel for i: for j by vectors: block(i, j)
"""

from typing import Any

from t3c.codegen.rules.nests import Writer, sequence
from t3c.codegen.rules.program import Program
from t3c.targets.base import TargetSpec


def schedule(program: Program, spec: TargetSpec) -> Any:
    """Takes everything."""
    writer = Writer(spec.vector, {})
    body = sequence([writer.threads(block) for block in program.blocks])
    return program.finish(body, program.scratch)
