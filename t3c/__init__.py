"""T3C: make a network elastic once, lower it once per device, and turn a budget like a knob.

Importing this package loads neither torch nor tvm.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from t3c.core.artifact import Artifact
from t3c.core.budget import Budget
from t3c.core.errors import (
    ArtifactError,
    CertificateError,
    CostModelError,
    InfeasibleBudget,
    LoweringError,
    ParityError,
    PassError,
    T3CError,
    TargetError,
)

if TYPE_CHECKING:
    from t3c.api import certify, elasticize, fit_policy, lower
    from t3c.runtime.export import export
    from t3c.runtime.governor import Governor, govern
    from t3c.runtime.session import Session, load
    from t3c.runtime.transfer import pack, unpack

__all__ = [
    "Artifact",
    "ArtifactError",
    "Budget",
    "CertificateError",
    "CostModelError",
    "Governor",
    "InfeasibleBudget",
    "LoweringError",
    "ParityError",
    "PassError",
    "Session",
    "T3CError",
    "TargetError",
    "certify",
    "elasticize",
    "export",
    "fit_policy",
    "govern",
    "load",
    "lower",
    "pack",
    "unpack",
]

_LAZY = {
    "certify": "t3c.api",
    "elasticize": "t3c.api",
    "fit_policy": "t3c.api",
    "lower": "t3c.api",
    "export": "t3c.runtime.export",
    "pack": "t3c.runtime.transfer",
    "unpack": "t3c.runtime.transfer",
    "govern": "t3c.runtime.governor",
    "Governor": "t3c.runtime.governor",
    "load": "t3c.runtime.session",
    "Session": "t3c.runtime.session",
}


def __getattr__(name: str) -> object:
    """Import a heavy public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
