"""Seven architectures through `t3c.lower` on this machine: what works, how exactly, how long.

    python benchmarks/architectures.py [model ...] [--threads 2]

For each model of examples/models.py: layers rewritten and kept; error of the full-rank float
rewrite; the worst parity error over all profiles (the torch reference following the library's
activations at every layer) and the free-running one; wrong integer accumulators of the smallest and
the largest profile; seconds of the whole lowering without tuning; library and weights against what
the profiles need. Results go to benchmarks/architectures.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Parse, fix the threads, run every model, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    sys.path.insert(0, str(HERE.parent))
    warnings.filterwarnings("ignore")
    from rich.console import Console

    from examples import models
    from t3c.report import tables

    file = HERE / "architectures.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for name in options.models or models.ALL:
        rows[name] = {**examine(name), "load": os.getloadavg()[0]}
        record = {
            "command": " ".join(["python", "benchmarks/architectures.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "threads": options.threads,
            "rows": rows,
        }
        file.write_text(json.dumps(record, indent=1) + "\n")
        lines = [{"": key, name: value} for key, value in rows[name].items()]
        Console().print(tables.plain(lines))


def examine(name: str) -> dict[str, Any]:
    """Everything that the table says of one model."""
    import torch

    import t3c
    from examples import models
    from t3c import targets
    from t3c.codegen.exactness import check_accumulators

    model, inputs = models.ALL[name]()
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        artifact = t3c.lower(model, "x86", inputs, Path(scratch) / name)
        seconds = time.perf_counter() - began
        manifest = artifact.manifest
        size = {
            p: (artifact.path / p).stat().st_size for p in (manifest.library, "weights.safetensors")
        }
    elastic = t3c.elasticize(model, inputs)
    whole = {site: _full_rank(s) for site, s in elastic.sites.items()}
    with torch.inference_mode():
        want = _tensors(model(*inputs))
        with elastic.using(whole, quantize=False):
            rewrite = max(map(_relative, _tensors(elastic(*inputs)), want))
    checks = []
    for compiled in (manifest.profiles[0], manifest.profiles[-1]):
        formats = compiled.profile.formats
        codes = {site: elastic.codes(site, [fmt]) for site, fmt in formats.items()}
        checks += check_accumulators(elastic.sites, codes, formats, targets.get("x86"))
    report = manifest.report
    return {
        "rewritten": len(report.of("rewritten")),
        "kept": len(report.of("kept")),
        "profiles": len(manifest.profiles),
        "full-rank float error": rewrite,
        "parity": max(p.parity.relative for p in manifest.profiles if p.parity),
        "free-running": max(p.parity.free for p in manifest.profiles if p.parity),
        "products": len(checks),
        "accumulators": sum(c.accumulators for c in checks),
        "wrong": sum(c.wrong for c in checks),
        "lowering s": seconds,
        "library MB": size[manifest.library] / 1e6,
        "weights MB": size["weights.safetensors"] / 1e6,
        "sum of profiles MB": sum(p.profile.storage_bytes for p in manifest.profiles) / 1e6,
        "stage": str(manifest.stages),
    }


def _full_rank(site: Any) -> Any:
    """The factorized format that loses nothing, in float."""
    from t3c.core.formats import LowRank, Tucker2
    from t3c.core.sites import LinearSite

    if isinstance(site, LinearSite) or site.pointwise:
        return LowRank(site.full_rank, 32)
    return Tucker2(site.in_channels, site.out_channels, 32)


def _tensors(result: Any) -> list[Any]:
    return [v for v in dict(result).values() if v is not None]


def _relative(got: Any, want: Any) -> float:
    return float((got - want).norm() / want.norm())


if __name__ == "__main__":
    main()
