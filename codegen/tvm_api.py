"""The one door to TVM: every module of `t3c.codegen` reaches TVM's names through here.

TVM renames its modules between releases; then this file changes and no other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from t3c.codegen.kernels.family import Kernel
from t3c.core.errors import LoweringError


def make_target(config: Mapping[str, object]) -> Any:
    """A TVM target, for example of ``{"kind": "llvm", "mcpu": "icelake-server"}``."""
    return tvm.target.Target(dict(config))


def parse(source: str) -> Any:
    """The function that a TVMScript text describes.

    Raises:
        LoweringError: If the text does not parse.
    """
    try:
        return tvm.script.from_source(source)
    except Exception as err:
        raise LoweringError(
            f"kernel text does not parse: {err}; this is a defect of the kernel family, the text "
            f"begins with {source[:200]!r}"
        ) from err


def compile_source(name: str, source: str, target: Any) -> Any:
    """A compiled module with the one function `name`."""
    return tvm.compile(tvm.IRModule({name: parse(source)}), target=target)


def runner(kernel: Kernel, target: Any) -> Callable[..., tuple[NDArray[np.generic], ...]]:
    """Compile one kernel for this machine: a function of numpy inputs that gives its outputs."""
    function = compile_source(kernel.name, kernel.source, target)[kernel.name]

    def run(*inputs: NDArray[np.generic]) -> tuple[NDArray[np.generic], ...]:
        outs = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in kernel.outs]
        function(*[tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs], *outs)
        return tuple(out.numpy() for out in outs)

    return run
