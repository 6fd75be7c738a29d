"""The house: folders by name, light imports, registries that resolve, public names that last."""

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "public_names.txt"
LINKED = ("passes", "codegen", "cost_models", "targets")
REFERENCE = re.compile(r"(t3c(?:\.\w+)+):(\w+)")


@pytest.mark.parametrize(
    "name", [*LINKED, "t3c", "tests", "examples", "pyproject.toml", "README.md", "Makefile"]
)
def test_the_top_level_has_the_names_of_the_design_card(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", LINKED)
def test_the_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "t3c" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def loaded_by(statement: str) -> set[str]:
    """Which of the heavy packages a statement loads, in a fresh process."""
    code = f"import sys; {statement}; print(*({{'torch', 'tvm', 'xgboost'}} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["t3c", "t3c.targets", "t3c.core.artifact", "t3c.cli"])
def test_light_modules_load_neither_torch_nor_tvm(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_weights_are_read_without_torch_and_tvm() -> None:
    assert loaded_by("import t3c.runtime.weights, t3c.runtime.bundle") == set()


def sources() -> Iterator[Path]:
    for folder in ("t3c", *LINKED):
        yield from (ROOT / folder).rglob("*.py")


def registries() -> Iterator[tuple[str, str]]:
    """Every registry entry in the sources: (where, reference)."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                for value in node.values:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        if REFERENCE.fullmatch(value.value):
                            yield path.name, value.value


def test_every_registry_entry_resolves() -> None:
    entries = set(registries())
    assert len(entries) > 10
    for where, reference in sorted(entries):
        module, _, attribute = reference.partition(":")
        assert attribute in vars(import_module(module)), f"{where}: {reference}"


def test_no_module_imports_relatively() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path


def test_records_name_no_folder_of_the_machine_that_made_them() -> None:
    records = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").iterdir()]
    for path in (p for p in records if p.suffix in (".md", ".json")):
        assert not re.search(r"(?<![\w.])/(tmp|home|root|work|mnt)/", path.read_text()), path.name


def test_the_table_of_the_readme_is_the_recorded_run() -> None:
    record = ROOT / "benchmarks" / "demo_minilm.json"
    if not record.exists():
        pytest.skip("benchmarks/demo_minilm.json is not recorded yet")
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    assert script["table"](json.loads(record.read_text())) in (ROOT / "README.md").read_text()


def public_names() -> str:
    """Names that users may rely on, one a line."""
    import t3c

    facade: Any = vars(t3c)
    names = [f"t3c.{name}" for name in facade["__all__"]]
    for module in ("t3c.core.budget", "t3c.core.manifest", "t3c.core.artifact", "t3c.core.errors"):
        for name, value in vars(import_module(module)).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == module:
                names.append(f"{module}.{name}")
    return "\n".join(sorted(names)) + "\n"


def test_public_names_are_the_golden_list(update_golden: bool) -> None:
    if update_golden:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(public_names())
    assert public_names() == GOLDEN.read_text(), "review, then run pytest with --update-golden"


def test_every_public_name_of_the_facade_resolves() -> None:
    import t3c

    facade: Mapping[str, Any] = vars(t3c)
    for name in facade["__all__"]:
        assert getattr(t3c, name) is not None
    missing = "no_such_name"
    with pytest.raises(AttributeError, match=missing):
        getattr(t3c, missing)
