from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

from t3c.core.errors import PassError
from t3c.passes.capture import ROUTES, capture


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor, y: Tensor, *, flag: bool = True, extra: Any = None) -> Any:
        z = self.fc(x) + self.shift
        return {"a": z, "b": (z + y if flag else y, None)}


X, Y = torch.randn(2, 4), torch.randn(2, 3)


def test_call_has_the_structure_of_the_model() -> None:
    model = Two().eval()
    c = capture(model, (X, Y), {"flag": True, "extra": None})
    assert c.names == ("x", "y")
    out = c.unflatten(c.graph(*c.flatten((X, Y), {"flag": True, "extra": None})))
    want = model(X, Y)
    torch.testing.assert_close(out["a"], want["a"])
    torch.testing.assert_close(out["b"][0], want["b"][0])
    assert out["b"][1] is None


def test_structure_is_plain_and_drops_none() -> None:
    c = capture(Two().eval(), (X, Y))
    out = c.structure["outputs"]
    assert out["kind"] == "dict"
    assert out["keys"] == ["a", "b"]
    assert out["items"][1]["items"] == [
        {"kind": "leaf", "index": 1, "name": "b_0", "shape": [2, 3], "dtype": "float32"}
    ]
    assert c.output_names == ("a", "b_0")


def test_arguments_bind_by_name_and_by_place() -> None:
    c = capture(Two().eval(), (X, Y))
    by_name = c.flatten((), {"y": Y, "x": X})
    assert all(a is b for a, b in zip(by_name, c.flatten((X, Y), {}), strict=True))


def test_other_shape_dtype_or_value_is_refused() -> None:
    c = capture(Two().eval(), (X, Y), {"flag": True})
    with pytest.raises(ValueError, match=r"captured was \(2, 4\)"):
        c.flatten((torch.randn(3, 4), Y), {"flag": True})
    with pytest.raises(ValueError, match="float64"):
        c.flatten((X.double(), Y), {"flag": True})
    with pytest.raises(ValueError, match="fixed to True"):
        c.flatten((X, Y), {"flag": False})
    with pytest.raises(ValueError, match=r"the call has 1 value\(s\), captured were 3"):
        c.flatten((X,), {})
    with pytest.raises(ValueError, match="structure"):
        c.flatten(((X, Y), True), {})


def test_model_is_untouched_and_train_mode_is_noted() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    c = capture(model, (X,))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any("train mode" in note for note in c.notes)
    c.graph.get_parameter("0.weight").data.zero_()
    assert torch.equal(model[0].weight, before["0.weight"])  # type: ignore[arg-type]


def test_parameters_keep_the_users_names() -> None:
    c = capture(Two().eval(), (X, Y))
    assert {"fc.weight", "fc.bias", "shift"} == set(c.graph.state_dict())


def test_exported_program_and_graph_module_are_taken() -> None:
    model = Two().eval()
    program = torch.export.export(model, (X, Y))
    traced = fx.symbolic_trace(model, concrete_args={"flag": True, "extra": None})
    for given, args in ((program, ()), (program, (X, Y)), (traced, (X, Y))):
        c = capture(given, args)
        out = c.unflatten(c.graph(*c.flatten((X, Y), {})))
        torch.testing.assert_close(out["a"], model(X, Y)["a"])


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_graph(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two().eval()
    monkeypatch.setattr("t3c.passes.capture.ROUTES", {route: ROUTES[route]})
    c = capture(model, (X, Y))
    assert c.route == route
    torch.testing.assert_close(c.unflatten(c.graph(X, Y))["a"], model(X, Y)["a"])
    assert {"fc.weight", "fc.bias", "shift"} == set(c.graph.state_dict())


def test_fallback_says_why_the_first_way_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr("t3c.passes.capture.ROUTES", {"first": broken, **ROUTES})
    c = capture(Two().eval(), (X, Y))
    assert c.route == "torch.export"
    assert c.notes == ("first failed: RuntimeError: no luck",)


def test_untraceable_model_names_every_way() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(PassError) as caught:
        capture(Branch(), (X,))
    assert all(route in str(caught.value) for route in ROUTES)


def test_stateful_model_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            seen = self.get_buffer("seen").add_(1)
            return x + seen

    with pytest.raises(PassError, match="writes to seen"):
        capture(Counts(), (X,))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"write \(x,\)"):
        capture(Two(), X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Module or an ExportedProgram"):
        capture(lambda x: x, (X,))  # type: ignore[arg-type]


def test_inplace_operations_become_functional() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y += 1
            return y.relu_()

    c = capture(InPlace(), (X,))
    assert not [n for n in c.graph.graph.nodes if str(n.target).split(".")[1:2] == ["add_"]]
    kept = X.clone()
    torch.testing.assert_close(c.graph(X)[0], (X * 2 + 1).relu())
    assert torch.equal(kept, X)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_named_tuples_and_ordered_dicts_return() -> None:
    class Out(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return OrderedDict(p=Pair(x, x + 1))

    c = capture(Out(), (X,))
    out = c.unflatten(c.graph(X))
    assert isinstance(out["p"], Pair)
    torch.testing.assert_close(out["p"].second, X + 1)
