"""The manifest of what was built, as far as it is known before the library runs."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor

from t3c.calls import digest
from t3c.codegen.build import Built
from t3c.controller.plan import Plan
from t3c.core.certificate import Certificate
from t3c.core.conservative import increasing
from t3c.core.errors import LoweringError
from t3c.core.manifest import CompiledProfile, Manifest, Stages, TargetInfo, TensorSpec
from t3c.core.structure import LEAF, Tree
from t3c.elastic.model import ElasticModel
from t3c.passes.capture import Captured
from t3c.proof import Batch
from t3c.targets import TargetSpec


def with_certificates(manifest: Manifest, found: Mapping[str, Certificate]) -> Manifest:
    """The manifest with a certificate for each profile, by name."""
    profiles = tuple(
        replace(c, profile=replace(c.profile, certificate=found[c.profile.name]))
        for c in manifest.profiles
    )
    return replace(manifest, profiles=profiles)


def captured_of(elastic: ElasticModel) -> Captured:
    """What capture knows of the model's call."""
    return cast(Captured, elastic.captured)


def described(
    elastic: ElasticModel,
    chosen: Plan,
    built: Built,
    spec: TargetSpec,
    batches: Sequence[Batch],
) -> Manifest:
    """Everything that is known before the library runs."""
    captured = captured_of(elastic)
    compiled = []
    for profile in chosen.chain:
        made = built.profiles[profile.name]
        ram = sum(built.tensors[n].nbytes for n in made.weights) + made.activation_bytes
        counted = replace(profile, storage_bytes=made.storage_bytes, ram_bytes=ram)
        compiled.append(
            CompiledProfile(
                counted,
                made.function,
                made.weights,
                arena_bytes=made.arena_bytes,
                reads=made.reads,
            )
        )
    with torch.inference_mode():
        outputs = elastic.graph(*elastic.example_inputs)
    return Manifest(
        target=TargetInfo(
            name=spec.name,
            kind=spec.kind,
            triple=spec.triple,
            mcpu=spec.mcpu,
            features=tuple(sorted(spec.features)),
            arch=spec.arch,
        ),
        stages=Stages(),
        library=f"lib/{spec.name}.so",
        inputs=_specs(captured.names, elastic.example_inputs),
        outputs=_specs(captured.output_names, outputs),
        input_tree=_tree(captured.structure["inputs"], count()),
        output_tree=_tree(captured.structure["outputs"], count()),
        profiles=increasing(compiled),
        versions=_versions(),
        report=elastic.report,
        objective=chosen.objective,
        codes=chosen.codes,
        calibration_sha256=digest(batches),
    )


def _tree(node: Mapping[str, Any], order: Iterator[int]) -> Tree:
    """The captured structure as manifests store it.

    Raises:
        LoweringError: A tensor is returned twice or out of order.
    """
    if node["kind"] == "leaf":
        if node["index"] != next(order):
            raise LoweringError(
                f"{node['name']!r} occurs twice in the model's inputs or outputs; return a copy"
            )
        return LEAF
    items = [_tree(item, order) for item in node["items"]]
    if node["kind"] == "dict":
        return {"kind": "dict", "items": dict(zip(node["keys"], items, strict=True))}
    return {"kind": node["kind"], "items": items}


def _specs(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in zip(names, tensors, strict=True)
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("t3c", "torch", "apache-tvm", "apache-tvm-ffi", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found
