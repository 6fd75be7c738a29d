"""The glyph network: it says which fonts it needs, and its images and weights do not vary."""

from pathlib import Path

import pytest
import torch

from examples import glyphs


def test_too_few_fonts_name_the_packages_to_install(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"0 usable .* apt-get install .*fonts-dejavu"):
        glyphs.faces_of(tmp_path)


def test_training_twice_gives_the_same_weights() -> None:
    images = torch.rand(128, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    examples = (images, torch.arange(128) % 62)
    recipe = glyphs.Recipe((8, 8, 8), blocks=1, epochs=1)
    data = glyphs.Data(examples, examples, examples)
    first, second = (glyphs.train(recipe, data).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], glyphs.GlyphNet(recipe).head.weight)


def test_families_lie_in_one_part_only() -> None:
    faces = {f"F{i}": [Path(f"F{i}-{j}.ttf") for j in range(1 + i % 7)] for i in range(40)}
    parts = [{path.stem.split("-")[0] for path in part} for part in glyphs.divided(faces)]
    assert set.union(*parts) == set(faces)
    assert sum(map(len, parts)) == len(faces)
    assert len(parts[0]) > len(parts[2]) >= len(parts[1])
