"""Machine code of kernels and of the functions that call them: object files, linked by need.

TVM gives every function a packed interface: checks of every argument at every call, half a library
of text for their messages. Here only the functions that a host calls have it. A kernel is a plain C
function of pointers, and nothing outside the library sees it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t3c.codegen.entries import PREFIX
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import aligned_stack, tvm

tirx = tvm.tirx
_EXPORTS = "{ global: __tvm_ffi_*; __TVM*; local: *; };\n"
_CPU = 1
_BYTES = 64
"""Alignment that kernels may assume of every pointer."""

# TVM's own list for processors, as far as MakePackedAPI, without the passes for graphics cards.
_LOWER = (
    tvm.s_tir.transform.CanonicalizeLoop(),
    tvm.s_tir.transform.LowerInitBlock(),
    tvm.s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
    tvm.s_tir.transform.ConvertBlocksToOpaque(),
    tvm.s_tir.transform.CompactBufferAllocation(),
    tvm.s_tir.transform.LowerMatchBuffer(),
    tvm.s_tir.transform.StmtSimplify(),
    tvm.s_tir.transform.AnnotateIrregularLoop(),
    tvm.s_tir.transform.LowerOpaqueBlock(),
    tirx.transform.FlattenBuffer(),
    tirx.transform.BF16ComputeLegalize(),
    tirx.transform.NarrowDataType(32),
    tvm.s_tir.transform.LoopPartition(),
    tirx.transform.VectorizeLoop(True),
    tirx.transform.StorageRewrite(),
    tvm.s_tir.transform.HoistIfThenElse(),
    tirx.transform.UnrollLoop(),
    tvm.s_tir.transform.RenormalizeSplitPattern(),
    tirx.transform.StmtSimplify(),
    tirx.transform.RemoveNoOp(),
    tvm.s_tir.transform.RewriteUnsafeSelect(),
)
_FINISH = (
    tirx.transform.BF16StorageLegalize(),
    tirx.transform.LowerTVMBuiltin(),
    tirx.transform.LowerIntrin(),
)


def kernels(functions: Mapping[str, Any], target: Any) -> Any:
    """Compile kernels to one object.

    Args:
        functions: Name -> scheduled function of buffers.
        target: TVM's target of the processor.
    """
    bound = target.with_host(target)
    private = {
        name: f.without_attr("global_symbol").with_attr("target", bound)
        for name, f in functions.items()
    }
    lowered = tvm.transform.Sequential(list(_LOWER))(tvm.IRModule(private))
    plain = {gv.name_hint: _of_pointers(gv.name_hint, f) for gv, f in lowered.functions_items()}
    final = tvm.transform.Sequential(list(_FINISH))(tvm.IRModule(plain))
    return aligned_stack(_compile(final, target))


def entries(sources: Sequence[str], target: Any) -> Any:
    """Compile functions that a host calls, given as text, to one object."""
    functions = [read_function(source) for source in sources]
    module = tvm.IRModule({str(f.attrs["global_symbol"]): f for f in functions})
    pipeline, finalize, _ = tirx.get_default_tir_pipeline(target)
    lowered = pipeline(tirx.transform.BindTarget(target.with_host(target))(module))
    return _compile(finalize()(lowered), target)


def link(objects: Sequence[Any], path: Path, compiler: str | None) -> None:
    """Write a shared library that shows only the functions that a host calls.

    Args:
        objects: Results of `kernels` and `entries`.
        path: The library.
        compiler: Cross compiler; None: this machine's own.
    """
    cc = tvm.support.cc
    make = cc.cross_compiler(compiler) if compiler else cc.create_shared
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, item in enumerate(objects):
            files.append(str(Path(folder) / f"{i}.o"))
            item.write_to_file(files[-1], "o")
        exports = Path(folder) / "exports"
        exports.write_text(_EXPORTS)
        # strip: a third of the file is symbols
        make(str(path), files, options=["-s", f"-Wl,--version-script={exports}"])


def _compile(module: Any, target: Any) -> Any:
    return tvm.get_global_func("target.build.llvm")(module, target)


def _of_pointers(name: str, function: Any) -> Any:
    """Before: f(x: Buffer, y: Buffer). After: int32 f(x_data: pointer, y_data: pointer)."""
    params = []
    body = function.body  # scratch that does not fit the stack asks which device it is for
    for key, value in (("device_type", _CPU), ("device_id", 0)):
        body = tirx.AttrStmt("default", key, tirx.const(value, "int32"), body)
    for buffer in reversed(function.params):
        pointer = tirx.Var(f"{buffer.name}_data", tvm.ir.PointerType(tvm.ir.PrimType(buffer.dtype)))
        declared = tirx.SeqStmt([tirx.DeclBuffer(buffer, data=pointer), body])
        body = tirx.AttrStmt(pointer, "storage_alignment", tirx.const(_BYTES, "int32"), declared)
        params.append(pointer)
    made = tirx.PrimFunc(params[::-1], body, tvm.ir.PrimType("int32"), function.attrs)
    return made.with_attr("global_symbol", PREFIX + name)
