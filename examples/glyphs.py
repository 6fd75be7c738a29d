"""A small residual network that reads glyphs: 62 characters rendered from Debian's own fonts.

No data set is downloaded: ``apt-get install`` of ``PACKAGES`` brings the fonts, Pillow (which
comes with matplotlib, extra ``demo``) draws them, and families of fonts are disjoint between
training, validation and test. Drawing and training have fixed seeds; both are kept in the user's
cache under a digest of the faces and of the settings, so that the second call takes a second.
``python -m examples.glyphs`` trains and prints the test accuracy.
"""

import hashlib
import math
import os
import re
import string
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIZE = 32
FOLDER = Path("/usr/share/fonts")
PACKAGES = (
    "fonts-cabin",
    "fonts-cantarell",
    "fonts-comfortaa",
    "fonts-crosextra-caladea",
    "fonts-crosextra-carlito",
    "fonts-dejavu",
    "fonts-ebgaramond",
    "fonts-firacode",
    "fonts-freefont-ttf",
    "fonts-hack",
    "fonts-inconsolata",
    "fonts-junicode",
    "fonts-lato",
    "fonts-liberation",
    "fonts-linuxlibertine",
    "fonts-noto-core",
    "fonts-open-sans",
    "fonts-quicksand",
    "fonts-roboto-unhinted",
    "fonts-urw-base35",
)
# Faces without the Latin letters as their own design: symbols, and Noto's other scripts, which
# repeat the Latin of Noto Sans.
SKIPPED = ("symbol", "dingbat", "d050000l", "math", "initials", "keyboard", "biolinum_k")
CLONES = ("Arimo", "Cousine", "Tinos")  # Liberation's faces by another name
NOTO = ("NotoSans", "NotoSerif", "NotoSansMono", "NotoSansDisplay", "NotoSerifDisplay")
MOST_FACES = 16  # of one family
LEAST_FACES = 150
VERSION = 1  # of what the digest cannot see: the code below


@dataclass(frozen=True, slots=True)
class Data:
    """Images [n, 1, 32, 32] in [0, 1] and their classes [n], of disjoint families of fonts.

    Attributes:
        train: Images and classes to train and calibrate on; clean, each face drawn twice.
        validation: To choose with.
        test: To report.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the network is trained.

    Attributes:
        widths: Channels of the three stages.
        blocks: Residual blocks of a stage, two convolutions each.
        epochs: Passes over the training images.
        batch: Images of a step.
        rate: Highest learning rate of the one-cycle schedule.
        seed: Of weights, order and augmentation.
    """

    widths: tuple[int, int, int] = (32, 48, 96)
    blocks: int = 3
    epochs: int = 8
    batch: int = 64
    rate: float = 0.1
    seed: int = 0


class Block(nn.Module):
    """Two 3 x 3 convolutions beside an identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(self, wide_in: int, wide: int, stride: int) -> None:
        """Fresh weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide:
            self.short = nn.Sequential(
                nn.Conv2d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        """X [n, c, h, w] through both convolutions, and around them."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.short(x))


class GlyphNet(nn.Module):
    """ResNet-20's layout behind a stem of stride 2: 0.6M parameters, 29M multiply-adds."""

    def __init__(self, recipe: Recipe) -> None:
        """Fresh weights from torch's generator."""
        super().__init__()
        first = recipe.widths[0]
        self.stem = nn.Conv2d(1, first, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        blocks, wide_in = [], first
        for stage, wide in enumerate(recipe.widths):
            for index in range(recipe.blocks):
                blocks.append(Block(wide_in, wide, 2 if stage and not index else 1))
                wide_in = wide
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(wide_in, len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 62] of images [n, 1, 32, 32]."""
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def network(
    cache: bool = True, recipe: Recipe | None = None, log: bool = False
) -> tuple[nn.Module, Data]:
    """The trained network in eval mode, and the data; both from the cache where it has them.

    Args:
        cache: Read and write the user's cache; False draws and trains anew.
        recipe: How to train; the default reads over 93 % of the test fonts' glyphs.
        log: Print each epoch of the training, five minutes on one core, as it ends.
    """
    recipe = Recipe() if recipe is None else recipe
    faces = faces_of(FOLDER)
    data = _data(faces, cache)
    model = GlyphNet(recipe)
    kept = _cached(f"glyphnet-{_digest(faces, repr(asdict(recipe)))}.pt")
    if cache and kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        model = train(recipe, data, log)
        if cache:
            _write(kept, lambda path: torch.save(model.state_dict(), path))
    return model.eval().requires_grad_(False), data


def accuracy(model: nn.Module, examples: tuple[Tensor, Tensor], batch: int = 256) -> float:
    """Share of the examples, in [0, 1], whose class gets the highest logit."""
    images, classes = examples
    with torch.no_grad():
        hits = [
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(torch.split(images, batch), torch.split(classes, batch), strict=True)
        ]
    return sum(hits) / len(classes)


def faces_of(folder: Path) -> dict[str, list[Path]]:
    """Usable faces by family, both sorted by name.

    Raises:
        RuntimeError: Fewer than LEAST_FACES; it names the packages to install.
    """
    families: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*"), key=lambda p: (p.stem, p.suffix)):
        family = path.stem.split("-")[0].split("_")[0]
        if family.startswith("Free"):
            family = re.split("Bold|Italic|Oblique", family)[0]
        other = family in CLONES or (family.startswith("Noto") and family not in NOTO)
        skipped = other or any(word in path.stem.lower() for word in SKIPPED)
        known = [p.stem for p in families.get(family, [])]
        if path.suffix in (".ttf", ".otf") and not skipped and path.stem not in known:
            families.setdefault(family, []).append(path)
    found = {f: _spread(paths, MOST_FACES) for f, paths in sorted(families.items())}
    found = {f: good for f, paths in found.items() if (good := [p for p in paths if _latin(p)])}
    if (count := sum(map(len, found.values()))) < LEAST_FACES:
        raise RuntimeError(
            f"{count} usable font faces under {folder}, {LEAST_FACES} needed; run: "
            f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )
    return found


def _spread(paths: list[Path], most: int) -> list[Path]:
    """At most so many, evenly from the list."""
    keep = min(most, len(paths))
    return [paths[i * len(paths) // keep] for i in range(keep)]


def _latin(path: Path) -> bool:
    """Whether the face has a glyph of its own for every character."""
    font = ImageFont.truetype(str(path), SIZE)
    missing = _mask(font, "\U0010fffe")
    masks = [_mask(font, c) for c in CHARACTERS]
    distinct = len(set(masks)) >= len(masks) - 4  # small capitals, one glyph for O and 0
    return distinct and all(any(m) and m != missing for m in masks)


def _mask(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    mask = font.getmask(character)
    return bytes(mask)  # pyright: ignore[reportArgumentType]  # a sequence, which its stub omits


def divided(faces: dict[str, list[Path]]) -> tuple[list[Path], list[Path], list[Path]]:
    """Faces of training, validation and test: families in a drawn order, 62 : 16 : 22 by faces."""
    order = np.random.default_rng(7).permutation(len(faces))
    names, total = list(faces), sum(map(len, faces.values()))
    parts: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    shares = (0.62, 0.16, 0.22)
    for index in order:
        family = faces[names[index]]
        lack = [share * total - len(p) for share, p in zip(shares, parts, strict=True)]
        parts[lack.index(max(lack))].extend(family)
    return parts


def _data(faces: dict[str, list[Path]], cache: bool) -> Data:
    kept = _cached(f"glyphs-{_digest(faces, '')}.npz")
    if cache and kept.exists():
        with np.load(kept) as file:
            arrays = dict(file)
    else:
        arrays = _drawn(divided(faces))
        if cache:
            _write(kept, lambda path: np.savez_compressed(path, allow_pickle=False, **arrays))
    pairs = (
        (torch.from_numpy(arrays[f"{p}_x"]).float().div(255)[:, None], arrays[f"{p}_y"])
        for p in ("train", "validation", "test")
    )
    return Data(*((x, torch.from_numpy(y).long()) for x, y in pairs))


def _drawn(parts: tuple[list[Path], list[Path], list[Path]]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for seed, (part, paths) in enumerate(zip(("train", "validation", "test"), parts, strict=True)):
        draw = np.random.default_rng(seed)
        images = [_glyph(path, c, draw) for path in paths for _ in range(2) for c in CHARACTERS]
        arrays[f"{part}_x"] = np.stack(images)
        arrays[f"{part}_y"] = np.tile(np.arange(len(CHARACTERS)), 2 * len(paths)).astype(np.uint8)
    return arrays


def _glyph(path: Path, character: str, draw: np.random.Generator) -> np.ndarray:
    """One glyph on a shared baseline, so that size tells c from C: uint8 [32, 32]."""
    font = ImageFont.truetype(str(path), float(draw.uniform(23, 26)))
    image = Image.new("L", (SIZE, SIZE))
    at = (SIZE / 2 + draw.uniform(-1, 1), 0.75 * SIZE + draw.uniform(-1, 1))
    ImageDraw.Draw(image).text(at, character, 255, font, anchor="ms")
    noisy = np.asarray(image) + draw.normal(0, 6, (SIZE, SIZE))
    return noisy.clip(0, 255).astype(np.uint8)


def train(recipe: Recipe, data: Data, log: bool = False) -> GlyphNet:
    """A network trained by SGD with a one-cycle rate; the same for the same recipe and data."""
    torch.manual_seed(recipe.seed)
    draw = torch.Generator().manual_seed(recipe.seed)
    model = GlyphNet(recipe)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, classes = data.train
    steps = recipe.epochs * math.ceil(len(classes) / recipe.batch)
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4, lr=recipe.rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(sgd, recipe.rate, total_steps=steps)
    model.train()
    for epoch in range(recipe.epochs):
        begun, total = time.perf_counter(), 0.0
        order = torch.randperm(len(classes), generator=draw)
        for index in torch.split(order, recipe.batch):
            x = _augmented(images[index], draw).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(model(x), classes[index], label_smoothing=0.1)
            sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            rates.step()
            total += float(loss.detach()) * len(index)
        if log:
            took = time.perf_counter() - begun
            print(f"epoch {epoch}: loss {total / len(classes):.3f}, {took:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval()


def _augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images scaled, slanted and shifted a little, with noise."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw)

    zero = torch.zeros(count)
    across = torch.stack((uniform(0.9, 1.1), uniform(-0.15, 0.15), uniform(-0.1, 0.1)), 1)
    down = torch.stack((zero, uniform(0.93, 1.07), uniform(-0.08, 0.08)), 1)
    grid = functional.affine_grid(torch.stack((across, down), 1), list(images.shape), False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return moved + 0.05 * torch.randn(moved.shape, generator=draw)


def _cached(name: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path.home() / ".cache" if not root else Path(root)) / "t3c" / name


def _digest(faces: dict[str, list[Path]], more: str) -> str:
    text = repr((VERSION, CHARACTERS, SIZE, MOST_FACES, more))
    text += "".join(f"{p.name}{p.stat().st_size}" for paths in faces.values() for p in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path and rename, so that a file in the cache is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{os.getpid()}-{path.name}")  # numpy wants the suffix kept
    write(part)
    part.replace(path)


def main() -> None:
    """Train, or take the network from the cache, and print how well it reads."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    model, data = network(log=True)
    sizes = [len(part[1]) for part in (data.train, data.validation, data.test)]
    print(f"images {sizes}, parameters {sum(p.numel() for p in model.parameters())}")
    for name in ("validation", "test"):
        print(f"{name} accuracy {accuracy(model, getattr(data, name)):.4f}")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
