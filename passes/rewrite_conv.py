"""Convolutions become elastic sites."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from t3c.core.sites import ConvSite
from t3c.passes.base import AbstractPass, Log
from t3c.passes.fold_batch_norm import NORMALIZED
from t3c.passes.nodes import (
    argument,
    aten,
    constant,
    emit,
    is_call,
    key_of,
    path_of,
    shape_of,
    value_of,
)
from t3c.passes.sites import (
    EVERYTHING,
    Choice,
    MakeConv,
    install,
    readers,
    refusal,
    site_names,
    unique,
)

_PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_NAMED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_GENERAL = (aten.convolution.default,)
CONVS = (*_PLAIN, *_NAMED, *_TRANSPOSED, *_GENERAL)

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """The geometry of one call, in 2-D: pad first by `before` and `after`, then convolve.

    Attributes:
        stride: (height, width).
        padding: (height, width), both sides.
        dilation: (height, width).
        extra: Zeros to add before the convolution (left, right, top, bottom), for 'same'.
        groups: Groups.
        lift: Axes to add to x and remove from y: a 1-D convolution, or no batch axis.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    extra: tuple[int, int, int, int]
    groups: int
    lift: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class RewriteConv(AbstractPass):
    """Replace every 1-D and 2-D convolution with groups = 1 by a call of an elastic module.

    Before: y = conv2d(x, w, b, stride, padding, dilation)
    After:  y = sites.layer1_conv(x)

    Before: y = conv1d(x, w)
    After:  y = squeeze(sites.conv(unsqueeze(x, 2)), 2)       height 1
    """

    name: ClassVar[str] = "rewrite-conv"
    make: MakeConv
    choice: Choice = EVERYTHING

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Rewrite what can be; log all of them."""
        reads = readers(gm)
        done: set[fx.Node] = set()
        for node in list(gm.graph.nodes):
            if not is_call(node, *CONVS) or node in done:
                continue
            weight = constant(gm, node.args[1])
            if weight is None:
                where = str(node.meta.get("path") or node.name)
                log.kept(where, _op(node), "the weight is computed from the inputs")
                continue
            group = [user for _, user in reads[key_of(weight)]]
            done.update(user for user in group if is_call(user, *CONVS))
            self._group(gm, log, node, group, weight)

    def _group(
        self, gm: fx.GraphModule, log: Log, first: fx.Node, group: list[fx.Node], weight: Tensor
    ) -> None:
        """All readers of one weight: rewritten together or not at all."""
        where = path_of(gm, first, first.args[1])  # type: ignore[arg-type]
        ours = [u for u in group if is_call(u, *CONVS)]
        reason = self._refusal(gm, ours, group, weight)
        left_out = None if reason is not None else self.choice.why_not(where)
        for user in ours:
            if reason is not None:
                log.kept(where, _op(user), reason)
            elif left_out is not None:
                log.skipped(where, _op(user), left_out)
        if reason is not None or left_out is not None:
            return
        windows = [_window(u) for u in ours]
        window = windows[0]
        bias = constant(gm, argument(first, 2, "bias"))
        w = weight.unsqueeze(2) if weight.dim() == 3 else weight
        out, channels, kh, kw = w.shape
        h, wd = _size(first, window)
        site = ConvSite(
            name=unique(where, site_names(gm)),
            out_channels=out,
            in_channels=channels,
            kernel=(kh, kw),
            stride=window.stride,
            padding=window.padding,
            dilation=window.dilation,
            batch=sum(
                1 if 0 in x.lift else shape_of(u)[0] for u, x in zip(ours, windows, strict=True)
            ),
            in_size=(h, wd),
            out_size=_pair(shape_of(first)[-2:] if w is weight else (1, shape_of(first)[-1])),
            bias=bias is not None,
            normalized=all(NORMALIZED in u.meta for u in ours),
        )
        target = install(gm, site.name, self.make(site, w, bias))
        for user, own in zip(ours, windows, strict=True):
            _swap(gm, user, target, own, site)
            form = "rank" if site.pointwise else "ranks (in, out)"
            most = site.full_rank if site.pointwise else (channels, out)
            tied = f", shared by {len(ours)} calls" if len(ours) > 1 else ""
            log.did(where, _op(user), f"{out}x{channels}x{kh}x{kw}, {form} up to {most}{tied}")

    def _refusal(
        self, gm: fx.GraphModule, ours: list[fx.Node], group: list[fx.Node], weight: Tensor
    ) -> str | None:
        """Why these calls of one weight stay as they are; None if they can be rewritten."""
        others = [u for u in group if u not in ours]
        first = ours[0]
        if is_call(first, *_TRANSPOSED) or (is_call(first, *_GENERAL) and first.args[6]):
            return "transposed convolution; elastic sites are forward convolutions"
        if weight.dim() == 5:
            return "3-D convolution; elastic sites are 1-D and 2-D"
        general = refusal(weight, value_of(first.args[0]))
        if general is not None:
            return general
        groups = _window(first).groups
        if groups > 1:
            depthwise = groups == shape_of(first.args[0])[-weight.dim() + 1]
            return f"groups={groups}{' (depthwise)' if depthwise else ''}; elastic needs groups=1"
        if others:
            return f"the weight is tied: {_op(others[0])} reads it too"
        bias = argument(first, 2, "bias")
        if bias is not None and constant(gm, bias) is None:
            return "the bias is computed from the inputs"
        windows = [_window(u) for u in ours]
        if any(w != windows[0] for w in windows):
            return "calls that share this weight differ in stride, padding or dilation"
        if any(_size(u, w) != _size(first, windows[0]) for u, w in zip(ours, windows, strict=True)):
            return "calls that share this weight differ in image size"
        if any(not _same(gm, bias, argument(u, 2, "bias")) for u in ours):
            return "calls that share this weight differ in bias"
        return None


def _same(gm: fx.GraphModule, a: object, b: object) -> bool:
    first, second = constant(gm, a), constant(gm, b)
    if first is None or second is None:
        return a is b
    return torch.equal(first, second)


def _pair(values: Any, spread: bool = True) -> Pair:
    items = [int(v) for v in (values if isinstance(values, list | tuple) else [values])]
    if len(items) == 1:
        items = items * 2 if spread else [0, items[0]]
    return items[0], items[1]


def _window(node: fx.Node) -> Window:
    """Geometry of a forward convolution, 1-D given as height 1."""
    dims = len(shape_of(node.args[1])) - 2
    flat = dims == 1

    def read(index: int, name: str, default: int) -> Pair:
        value = argument(node, index, name, [default] * dims)
        if not flat:
            return _pair(value)
        width = int(value[0]) if isinstance(value, list | tuple) else int(value)
        return (1 if name != "padding" else 0), width

    groups = int(argument(node, 8 if is_call(node, *_GENERAL) else 6, "groups", 1))
    stride, dilation = read(3, "stride", 1), read(5, "dilation", 1)
    extra = (0, 0, 0, 0)
    if is_call(node, *_NAMED):
        padding, extra = _named(node, argument(node, 4, "padding", "valid"), dilation, flat)
    else:
        padding = read(4, "padding", 0)
    unbatched = len(shape_of(node.args[0])) == dims + 1
    lift = ((0,) if unbatched else ()) + ((2,) if flat else ())
    return Window(stride, padding, dilation, extra, groups, lift)


def _named(
    node: fx.Node, mode: str, dilation: Pair, flat: bool
) -> tuple[Pair, tuple[int, int, int, int]]:
    """Padding of 'valid' and 'same'; what is not symmetric is added before the convolution."""
    if mode == "valid":
        return (0, 0), (0, 0, 0, 0)
    window = shape_of(node.args[1])[2:]
    kh, kw = (1, window[0]) if flat else (window[0], window[1])
    th, tw = dilation[0] * (kh - 1), dilation[1] * (kw - 1)
    if th % 2 == 0 and tw % 2 == 0:
        return (th // 2, tw // 2), (0, 0, 0, 0)
    return (0, 0), (tw // 2, tw - tw // 2, th // 2, th - th // 2)


def _size(node: fx.Node, window: Window) -> Pair:
    """(height, width) that the elastic module sees."""
    shape = shape_of(node.args[0])
    left, right, top, bottom = window.extra
    height = 1 if 2 in window.lift else shape[-2]
    return height + top + bottom, shape[-1] + left + right


def _swap(gm: fx.GraphModule, node: fx.Node, target: str, window: Window, site: ConvSite) -> None:
    """Call the elastic module instead, with axes and zeros added around it."""
    graph = gm.graph
    with graph.inserting_before(node):
        x = node.args[0]
        for axis in window.lift:
            x = emit(graph, aten.unsqueeze.default, x, axis)
        if any(window.extra):
            x = emit(graph, aten.constant_pad_nd.default, x, list(window.extra), 0.0)
        new = graph.call_module(target, (x,))
        new.meta = dict(node.meta)
        batch = shape_of(x)[0]
        new.meta["val"] = torch.empty((batch, site.out_channels, *site.out_size), device="meta")
        for axis in reversed(window.lift):
            new = emit(graph, aten.squeeze.dim, new, axis)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _op(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]
