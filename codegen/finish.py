"""The last passes of a library: from calls of kernels to the virtual machine's instructions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from t3c.codegen.tvm_api import relax, tvm


def finish(planned: dict[str, int], target: Any) -> Any:
    """What remains after expansion; notes the planned activation bytes of each function."""

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def count(module: Any, _: Any) -> Any:
        planned.update(
            (gv.name_hint, _planned_bytes(f))
            for gv, f in module.functions_items()
            if isinstance(f, relax.Function)
        )
        return module

    passes: Sequence[Any] = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        count,
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def pipeline(module: Any, _: Any) -> Any:
        with target:
            return tvm.transform.Sequential(list(passes))(module)

    return pipeline


def _planned_bytes(function: Any) -> int:
    """Sum of the storages that the memory planner allocates for one call."""
    total = 0
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
                continue
            if call.op.name == "relax.memory.alloc_storage":
                total += int(call.args[0].values[0])
            elif call.op.name == "relax.builtin.alloc_tensor":
                shape, dtype = call.args[0].values, call.args[1].value
                total += int(np.prod([int(n) for n in shape])) * np.dtype(str(dtype)).itemsize
    return total
