"""The passes, in order."""

from pathlib import Path

from torch import fx

from t3c.core.report import ConversionReport
from t3c.passes.base import AbstractPass, run_passes
from t3c.passes.canonical_linear import CanonicalLinear
from t3c.passes.dead_code import DeadCode
from t3c.passes.drop_dropout import DropDropout
from t3c.passes.fold_batch_norm import FoldBatchNorm
from t3c.passes.fold_constants import FoldConstants
from t3c.passes.fuse_attention import FuseAttention
from t3c.passes.fuse_epilogue import FuseEpilogue
from t3c.passes.fuse_rms_norm import FuseRmsNorm
from t3c.passes.place_grids import PlaceGrids
from t3c.passes.place_sites import PlaceSites
from t3c.passes.place_tables import PlaceTables
from t3c.passes.rewrite_conv import RewriteConv
from t3c.passes.rewrite_linear import RewriteLinear
from t3c.passes.sites import Choice, Makers
from t3c.passes.spell_views import SpellViews


def elastic_passes(make: Makers, choice: Choice) -> tuple[AbstractPass, ...]:
    """From a captured graph to one with elastic sites."""
    return (
        DropDropout(),  # 1 canonical form
        CanonicalLinear(),
        FoldBatchNorm(),
        FoldConstants(),
        DropDropout(),
        DeadCode(),
        RewriteLinear(make.linear, choice),  # 2 elastic sites
        RewriteConv(make.conv, choice),
        PlaceGrids(make.snap),
        PlaceTables(make.table),
        DeadCode(),
    )


def lowering_passes() -> tuple[AbstractPass, ...]:
    """From elastic sites to placeholders of kernels."""
    return (
        PlaceSites(),  # 1 sites by name
        FuseEpilogue(),  # 2 what kernels do on the way
        FuseAttention(),
        FuseRmsNorm(),
        DeadCode(),  # 3 spelling that exporters know
        SpellViews(),
    )


def rewrite(
    graph: fx.GraphModule, make: Makers, choice: Choice, *, dump: Path | None = None
) -> tuple[fx.GraphModule, ConversionReport]:
    """Make a captured graph elastic.

    Args:
        graph: Graph of `capture`; never touched.
        make: Constructors of elastic modules.
        choice: Which layers.
        dump: Folder for the graph after each pass; None: no dumps.

    Raises:
        PassError: A pass failed; the message names it.
    """
    gm, rows = run_passes(graph, elastic_passes(make, choice), dump=dump)
    return gm, ConversionReport(rows)


def lowering_graph(elastic_graph: fx.GraphModule, *, dump: Path | None = None) -> fx.GraphModule:
    """The graph that codegen takes: placeholders, fused epilogues, fused attention.

    Raises:
        PassError: A pass failed; the message names it.
    """
    return run_passes(elastic_graph, lowering_passes(), dump=dump)[0]
