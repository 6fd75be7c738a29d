"""Rules of the whole suite: the code under test is this checkout; one thread; skips say why."""

import os
import shutil
import sys
from pathlib import Path

import pytest

for _name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow and --update-golden."""
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse another checkout; let tests import each other's helpers as tests.*."""
    sys.path.append(str(config.rootpath))
    import t3c

    found = Path(str(t3c.__file__)).resolve()
    ours = found.is_relative_to(config.rootpath)
    if not ours and not os.environ.get("T3C_TEST_INSTALLED"):
        raise pytest.UsageError(
            f"t3c comes from {found.parent}, not from {config.rootpath}; run pip install -e ., "
            "or set T3C_TEST_INSTALLED=1 to test the installed one"
        )


def _missing(mark: str, config: pytest.Config) -> str | None:
    """Why tests with this mark cannot run here; None if they can."""
    match mark:
        case "slow":
            return None if config.getoption("--slow") else "takes minutes; run with --slow"
        case "arm":
            if shutil.which("aarch64-linux-gnu-g++") is None:
                return "needs the cross compiler aarch64-linux-gnu-g++"
            if not any(map(shutil.which, ("qemu-aarch64-static", "qemu-aarch64"))):
                return "needs the emulator qemu-aarch64-static"
            return None
        case _:
            if shutil.which("nvcc") or Path("/dev/nvidia0").exists():
                return None
            return "needs the CUDA toolkit (nvcc) or an NVIDIA GPU"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    reasons = {mark: _missing(mark, config) for mark in ("slow", "arm", "cuda")}
    for item in items:
        for mark, reason in reasons.items():
            if reason is not None and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten."""
    return bool(request.config.getoption("--update-golden"))
