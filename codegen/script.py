"""Reads kernel text: the part of TVMScript that kernels use, thirty times faster than TVM's parser.

TVM's own parser evaluates every expression through several copies of the syntax tree, 4 ms a line;
a library has thousands of lines. Here Python compiles the text once, with every statement replaced
by the call of TVM's IR builder that the parser would have made in the end.

    for i in range(n): body      ->  with loop(("i",), T.serial(0, n)) as i: body
    x: T.let = value             ->  x = bind("x", value)
    a = T.alloc_buffer(...)      ->  a = named("a", T.alloc_buffer(...))
    a[i, j] = value              ->  store(a, value, (i, j))
    if condition: body           ->  with T.If(condition), T.Then(): body
    a and b                      ->  all_of(a, b)
"""

import ast
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from t3c.codegen.tvm_api import IRBuilder, script, tvm
from t3c.codegen.tvm_api import builder as B
from t3c.core.errors import LoweringError


def read_function(source: str) -> Any:
    """The function that the text of one ``T.prim_func(s_tir=True)`` describes.

    Raises:
        LoweringError: The text uses a statement that kernels must not use.
    """
    module = ast.parse(source)
    if len(module.body) != 1 or not isinstance(function := module.body[0], ast.FunctionDef):
        raise LoweringError("kernel text must hold one function")
    name = function.name
    params = [(a.arg, a.annotation) for a in function.args.args]
    body = [_Builder().visit(statement) for statement in function.body]
    head: list[ast.stmt] = [
        _assign(arg, _call("argument", ast.Constant(arg), _present(annotation, arg)))
        for arg, annotation in params
    ]
    program = ast.Module(head + _flat(body), type_ignores=[])
    ast.fix_missing_locations(program)
    with IRBuilder() as made:
        with B.prim_func(s_tir=True):
            B.func_name(name)
            exec(compile(program, f"<kernel {name}>", "exec"), dict(_NAMES))
    return made.get()


class _Builder(ast.NodeTransformer):
    """Replaces statements by builder calls; expressions stay as they are."""

    def visit_For(self, node: ast.For) -> Any:
        """A loop becomes a frame."""
        targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if len(names) != len(targets) or not isinstance(node.iter, ast.Call):
            raise LoweringError(f"kernel text: loop over {ast.unparse(node.target)} is not simple")
        frame = node.iter
        if isinstance(frame.func, ast.Name) and frame.func.id == "range":
            start = [] if len(frame.args) > 1 else [ast.Constant(0)]
            frame = ast.Call(_attribute("serial"), [*start, *frame.args], [])
        listed = ast.Tuple([ast.Constant(name) for name in names], ast.Load())
        item = ast.withitem(_call("loop", listed, frame), node.target)
        return ast.With([item], self._body(node.body))

    def visit_If(self, node: ast.If) -> Any:
        """A condition becomes one or two frames."""

        def branch(name: str, body: list[ast.stmt]) -> ast.stmt:
            return ast.With([ast.withitem(ast.Call(_attribute(name), [], []))], self._body(body))

        test = self.visit(node.test)
        parts = [branch("Then", node.body)]
        if node.orelse:
            parts.append(branch("Else", node.orelse))
        return ast.With([ast.withitem(ast.Call(_attribute("If"), [test], []))], parts)

    def visit_Assign(self, node: ast.Assign) -> Any:
        """A store into a buffer, or a new buffer."""
        target = node.targets[0]
        if isinstance(target, ast.Subscript):
            index = target.slice
            indices = index if isinstance(index, ast.Tuple) else ast.Tuple([index], ast.Load())
            return ast.Expr(_call("store", target.value, self.visit(node.value), indices))
        if not isinstance(target, ast.Name):
            raise LoweringError(f"kernel text: cannot assign to {ast.unparse(target)}")
        return _assign(target.id, _call("named", ast.Constant(target.id), node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        """A value that is computed once."""
        if not isinstance(node.target, ast.Name) or node.value is None:
            raise LoweringError(f"kernel text: cannot bind {ast.unparse(node.target)}")
        name = node.target.id
        return _assign(name, _call("bind", ast.Constant(name), node.value))

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        """Python's `and` and `or` would ask for the truth of an expression."""
        values = [self.visit(value) for value in node.values]
        return _call("all_of" if isinstance(node.op, ast.And) else "any_of", *values)

    def _body(self, body: list[ast.stmt]) -> list[ast.stmt]:
        return _flat([self.visit(statement) for statement in body])


def _flat(statements: list[Any]) -> list[ast.stmt]:
    return [s for s in statements if s is not None]


def _present(annotation: ast.expr | None, arg: str) -> ast.expr:
    if annotation is None:
        raise LoweringError(f"kernel text: parameter {arg!r} has no type")
    return annotation


def _attribute(name: str) -> ast.expr:
    return ast.Attribute(ast.Name("_B", ast.Load()), name, ast.Load())


def _call(name: str, *args: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(f"_{name}", ast.Load()), list(args), [])


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _argument(name: str, annotation: Any) -> Any:
    return B.arg(name, annotation if isinstance(annotation, tvm.ir.Expr) else annotation())


@contextmanager
def _loop(names: tuple[str, ...], frame: Any) -> Generator[Any]:
    with frame as variables:
        for name, variable in zip(names, variables if len(names) > 1 else [variables], strict=True):
            IRBuilder.name(name, variable)
        yield variables


def _named(name: str, value: Any) -> Any:
    IRBuilder.name(name, value)
    return value


def _bind(name: str, value: Any) -> Any:
    if not isinstance(value, tvm.ir.Expr):
        value = tvm.tirx.const(value)
    variable = B.let.as_var(rhs_dtype=value.ty)
    IRBuilder.name(name, variable)
    B.Bind(value, var=variable)
    return variable


def _store(target: Any, value: Any, indices: Any) -> None:
    B.buffer_store(target, value, list(indices))


_NAMES = {
    "T": script,
    "_B": B,
    "_argument": _argument,
    "_loop": _loop,
    "_named": _named,
    "_bind": _bind,
    "_store": _store,
    "_all_of": tvm.tirx.all,
    "_any_of": tvm.tirx.any,
}
