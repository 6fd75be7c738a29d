"""Factorizers: how a weight splits into factors whose prefixes are its best smaller versions."""

from collections.abc import Mapping

FACTORIZATIONS: Mapping[str, str] = {
    "svd": "t3c.elastic.factorize.svd:SVD",
    "whitened-svd": "t3c.elastic.factorize.whitened_svd:WHITENED_SVD",
    "kronecker-svd": "t3c.elastic.factorize.whitened_svd:KRONECKER_SVD",
    "saes-svd": "t3c.elastic.factorize.saes_svd:SAES_SVD",
    "shared-input-svd": "t3c.elastic.factorize.shared_input:SHARED_INPUT_SVD",
    "eora": "t3c.elastic.factorize.eora:EORA",
    "tucker2": "t3c.elastic.factorize.tucker2:TUCKER2",
    "cp": "t3c.elastic.factorize.cp:CP_ALS",
}
"""Name -> "module:ATTRIBUTE", resolved by t3c.core.registry."""
LOW_RANK = ("svd", "whitened-svd", "kronecker-svd", "saes-svd")
"""Factorizers of linear layers and 1x1 convolutions: they give ``low`` and ``high``."""
DEFAULT = "kronecker-svd"
"""The one of `LOW_RANK` that loses least (docs/decisions.md)."""
