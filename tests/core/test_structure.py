"""Nested inputs and outputs survive as plain JSON."""

import json
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t3c.core.structure import LEAF, Output, describe, flatten, leaves, names, problem, unflatten

X = np.zeros(1)


class Pair(NamedTuple):
    left: object
    right: object


nested = st.recursive(
    st.just(X) | st.none() | st.integers() | st.text(max_size=3),
    lambda part: (
        st.lists(part, max_size=3)
        | st.lists(part, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=8,
)


@given(nested)
def test_a_nested_value_comes_back_through_json(value: Any) -> None:
    tree = json.loads(json.dumps(describe(value)))
    assert problem(tree, "t") is None
    flat = flatten(tree, value)
    assert len(flat) == leaves(tree)
    rebuilt = unflatten(tree, iter(flat))
    assert rebuilt == value
    assert type(rebuilt) is type(value) or isinstance(rebuilt, Output)


def test_a_named_tuple_keeps_its_fields() -> None:
    tree = describe(Pair(X, None))
    assert tree["fields"] == ["left", "right"]
    rebuilt = unflatten(tree, iter([1]))
    assert (rebuilt.left, rebuilt.right) == (1, None)


def test_any_mapping_is_a_dict_with_attributes_and_positions() -> None:
    tree = describe(OrderedDict(logits=X, hidden=(X, X)))
    assert names(tree) == ("logits", "hidden.0", "hidden.1")
    out = unflatten(tree, iter([1, 2, 3]))
    assert (out.logits, out["hidden"], out[1]) == (1, (2, 3), (2, 3))
    with pytest.raises(AttributeError, match="no output 'loss'; there are logits, hidden"):
        _ = out.loss


def test_a_single_tensor_has_a_name() -> None:
    assert names(LEAF) == ("0",)


@pytest.mark.parametrize(
    ("value", "message"), [({1: X}, "not a string"), ([object()], r"v\[0\] is a")]
)
def test_what_json_cannot_hold_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        describe(value, "v")


@pytest.mark.parametrize(
    ("example", "value", "error", "message"),
    [
        ({"a": X}, {"b": X}, TypeError, r"expected a dict with keys \['a'\], got a mapping"),
        ([X, X], [X], TypeError, "expected a list of 2, got a list of 1"),
        ((X,), X, TypeError, "expected a tuple of 1, got a ndarray"),
        ([None], [X], TypeError, r"inputs\[0\] was compiled as None, got ndarray"),
        ([True], [False], ValueError, r"inputs\[0\] was compiled as True, got False"),
    ],
)
def test_another_nesting_names_the_place(
    example: Any, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        flatten(describe(example), value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (3, "t: expected an object, got int"),
        ({"kind": "set"}, r"t\.kind: 'set' is none of"),
        ({"kind": "const"}, "t: a const needs a value"),
        ({"kind": "list"}, r"t\.items: expected a list"),
        ({"kind": "dict", "items": []}, r"t\.items: expected an object"),
        ({"kind": "tuple", "items": [{"kind": "leaf"}, 1]}, r"t\.1: expected an object"),
        ({"kind": "tuple", "items": [LEAF], "fields": ["a b"]}, "one identifier per item"),
    ],
)
def test_a_damaged_tree_names_the_place(tree: object, message: str) -> None:
    found = problem(tree, "t")
    assert found is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)
