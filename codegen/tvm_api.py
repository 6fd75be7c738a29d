"""The one door to TVM: every module of `t3c.codegen` reaches TVM's names through here.

TVM renames its modules between releases; then this file changes and no other.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm as _tvm
from numpy.typing import NDArray
from tvm import relax as _relax
from tvm import rpc as _rpc
from tvm.relax import expr_functor as _functor
from tvm.relax.frontend import torch as _frontend
from tvm.s_tir import meta_schedule as _meta_schedule
from tvm.script import tirx as _script  # pyright: ignore[reportMissingModuleSource]
from tvm.script.ir_builder import base as _base
from tvm.tirx.script import builder as _builder

from t3c.codegen.kernels.family import Kernel
from t3c.core.errors import LoweringError

__all__ = [
    "IRBuilder",
    "aligned_stack",
    "builder",
    "compile_source",
    "from_exported_program",
    "make_target",
    "meta_schedule",
    "parse_function",
    "relax",
    "rpc",
    "runner",
    "script",
    "substitute",
    "tvm",
]

# TVM's own annotations are not what its functions take and give; to type checkers it is Any.
tvm: Any = _tvm
relax: Any = _relax
rpc: Any = _rpc
script: Any = _script
builder: Any = _builder
meta_schedule: Any = _meta_schedule
IRBuilder: Any = _base.IRBuilder
from_exported_program: Any = _frontend.from_exported_program
_ATTRIBUTES = re.compile(r"^attributes #\d+ = \{(?=.*target-cpu)", re.MULTILINE)
_PyExprMutator: Any = _functor.PyExprMutator
_mutator: Any = _functor.mutator


def make_target(config: Mapping[str, object]) -> Any:
    """A TVM target, for example of ``{"kind": "llvm", "mcpu": "icelake-server"}``."""
    return tvm.target.Target(dict(config))


def parse_function(source: str) -> Any:
    """The scheduled function that a TVMScript text describes.

    Raises:
        LoweringError: If the text does not parse.
    """
    try:
        return tvm.script.from_source(source).with_attr("tirx.is_scheduled", True)
    except Exception as err:
        raise LoweringError(
            f"kernel text does not parse: {err}; this is a defect of the kernel family, the text "
            f"begins with {source[:200]!r}"
        ) from err


@_mutator
class _Substitute(_PyExprMutator):  # type: ignore[misc]
    """Replaces variables."""

    def __init__(self, values: Mapping[Any, Any]) -> None:
        super().__init__()
        self.values = values

    def visit_var_(self, var: Any) -> Any:
        return self.values.get(var, var)

    def visit_dataflow_var_(self, var: Any) -> Any:
        return self.values.get(var, var)


def substitute(expr: Any, values: Mapping[Any, Any]) -> Any:
    """The Relax expression with every variable that is a key of `values` replaced."""
    return _Substitute(values).visit_expr(expr)


def compile_source(name: str, source: str, target: Any) -> Any:
    """A compiled module with the one function `name`."""
    return aligned_stack(tvm.tirx.build(tvm.IRModule({name: parse_function(source)}), target))


def aligned_stack(compiled: Any) -> Any:
    """The same LLVM module, its functions aligning their stack to the vectors that they spill.

    LLVM decides before it knows of a spill whether a function may realign its stack; where it may
    not, a spilled 64-byte register crosses two cache lines, or does not, by the length of the
    process's environment: a GELU kernel took 67 or 98 us, and takes 72 now.
    """
    text = _ATTRIBUTES.sub(r'\g<0> "stackrealign"', compiled.inspect_source("ll"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.ll"
        path.write_text(text)
        return tvm.runtime.load_module(str(path))


def runner(kernel: Kernel, target: Any) -> Callable[..., tuple[NDArray[np.generic], ...]]:
    """Compile one kernel for this machine: a function of numpy inputs that gives its outputs."""
    function = compile_source(kernel.name, kernel.source, target)[kernel.name]

    def run(*inputs: NDArray[np.generic]) -> tuple[NDArray[np.generic], ...]:
        outs = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in kernel.outs]
        function(*[tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs], *outs)
        return tuple(out.numpy() for out in outs)

    return run
