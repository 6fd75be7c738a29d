"""What every target keeps. Subclass it; give `spec`."""

import re
from dataclasses import fields

from t3c.targets.base import TargetSpec


class TargetConformance:
    """The promises of TargetSpec."""

    def test_kind_and_architecture_agree(self, spec: TargetSpec) -> None:
        assert spec.kind in ("llvm", "cuda")
        assert (spec.arch is not None) == (spec.kind == "cuda")

    def test_a_foreign_triple_names_its_linker(self, spec: TargetSpec) -> None:
        assert (spec.triple is None) == (spec.cross_compiler is None)
        assert spec.emulator is None or spec.triple is not None

    def test_rank_steps_fill_whole_vectors(self, spec: TargetSpec) -> None:
        assert spec.rank_step >= 1
        assert spec.vector >= 1
        assert spec.rank_step % spec.vector == 0

    def test_constants_are_positive(self, spec: TargetSpec) -> None:
        for field in fields(spec.roofline):
            value = getattr(spec.roofline, field.name)
            values = value if isinstance(value, tuple) else (value,)
            assert all(v > 0 for v in values if v is not None)

    def test_names_are_kebab_case(self, spec: TargetSpec) -> None:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", spec.name)
