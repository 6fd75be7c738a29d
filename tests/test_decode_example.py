"""The example decoder: one step over a cache equals attention over all positions, and lowers."""

from pathlib import Path

import torch

import t3c
from examples.decode import Shape, repeat, rotate, tinyllama_step
from t3c import targets
from t3c.targets.x86 import AMX, VNNI

SMALL = Shape(width=128, inner=192, heads=4, kv_heads=2, layers=2, past=9)


def test_rotation_keeps_lengths_and_heads_repeat_in_place() -> None:
    x = torch.randn(1, 2, 3, 8)
    angle = torch.randn(3, 4).repeat(1, 2)
    turned = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(repeat(x, 3), x.repeat_interleave(3, 1))


def test_a_step_of_decoding_lowers_and_is_proved(tmp_path: Path) -> None:
    model, inputs = tinyllama_step(SMALL)
    spec = targets.detect_host()
    spec = VNNI if spec.name == AMX.name else spec
    artifact = t3c.lower(model, spec, inputs, tmp_path / "net", profiles=1, plan_seconds=1, calls=0)
    assert artifact.manifest.stages.verified
    x, keys, values = t3c.load(artifact)(*inputs)
    want = model(*inputs)
    error = (torch.as_tensor(x) - want[0]).norm() / want[0].norm()
    assert error < 0.1
    assert [tuple(k.shape) for k in (*keys, *values)] == [(1, 2, 1, 32)] * 4
