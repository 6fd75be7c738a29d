"""Accuracy of post-training chains on glyphs, with and without re-estimated statistics.

Every 3 x 3 convolution behind the stem is cut to the same share of its channels (Tucker-2, both
sides, multiples of 8); the rest is dense int8. Shares are fixed, not searched. Accuracy is top-1 on
a fixed 2,000 of the test fonts' images, run as the kernels round; multiply-adds count the elastic
layers. ``python -m benchmarks.glyphs`` writes glyphs.json in about three minutes of one core.
"""

import json
from pathlib import Path

import torch

from examples import glyphs
from t3c.api import elasticize
from t3c.controller.calibrate import collect, factorize
from t3c.controller.grids import fit_grids
from t3c.controller.progress import silent
from t3c.controller.statistics import correct
from t3c.core.formats import Dense, Format, Tucker2
from t3c.core.sites import ConvSite
from t3c.elastic.model import ElasticModel

BATCH = 64
TESTED = 2000
SHARES = (1.0, 0.75, 0.6, 0.5, 0.45, 0.4)
IMAGES = (256, 1024)
SEED = 0


def formats_of(elastic: ElasticModel, share: float) -> dict[str, Format]:
    """The same share of channels in every wide 3 x 3 convolution."""
    made: dict[str, Format] = {}
    for name, site in elastic.sites.items():
        made[name] = Dense(8)
        if share < 1 and name in wide(elastic) and isinstance(site, ConvSite):
            sides = (site.in_channels, site.out_channels)
            made[name] = Tucker2(*(max(8, round(share * side / 8) * 8) for side in sides))
    return made


def wide(elastic: ElasticModel) -> dict[str, tuple[int, ...]]:
    """Site -> channels of the convolutions that are cut."""
    return {
        name: (site.in_channels, site.out_channels)
        for name, site in elastic.sites.items()
        if isinstance(site, ConvSite) and site.in_channels >= 16 and not site.pointwise
    }


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    model, data = glyphs.network()
    draw = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(data.train[1]), generator=draw)[: max(IMAGES)]
    batches = [(data.train[0][index],) for index in order.split(BATCH)]
    picked = torch.randperm(len(data.test[1]), generator=draw)[:TESTED].sort().values
    images, classes = data.test[0][picked], data.test[1][picked]
    padded = torch.cat((images, images[: -TESTED % BATCH])).split(BATCH)
    elastic = elasticize(model, batches[0])

    def accuracy(formats: dict[str, Format] | None) -> float:
        with torch.no_grad(), elastic.using(formats):
            got = torch.cat([elastic.graph(x)[0].argmax(1) for x in padded])[:TESTED]
        return float((got == classes).double().mean())

    seen = collect(elastic, batches, sites=set(wide(elastic)), seconds=1e9, progress=silent)
    factorize(elastic, seen, silent, most=wide(elastic))
    elastic.set_grids(fit_grids(elastic, batches))
    full = sum(site.macs(Dense(8)) for site in elastic.sites.values())
    rows = []
    for share in SHARES:
        formats = formats_of(elastic, share)
        macs = sum(site.macs(formats[n]) for n, site in elastic.sites.items())
        elastic.forget_corrections()
        row = {"share": share, "macs": round(macs / full, 4), "plain": accuracy(formats)}
        for count in IMAGES if share < 1 else ():
            correct(elastic, [formats], batches[: count // BATCH])
            row[f"reestimated_{count}"] = accuracy(formats)
        rows.append(row)
        print(row, flush=True)
    result = {
        "command": "python -m benchmarks.glyphs",
        "images": TESTED,
        "chain": "uniform Tucker-2 shares, not searched; weights and activations int8",
        "float": accuracy(None),
        "profiles": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
