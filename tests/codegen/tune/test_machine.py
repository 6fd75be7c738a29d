"""The class of a machine comes from the files of its kernel."""

from pathlib import Path

from t3c.codegen.tune.machine import Machine, this_machine


def test_processor_and_data_caches_are_read(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id\t: V\ncpu family\t: 6\nmodel\t\t: 143\nmodel name: X\n")
    caches = (("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2048K"))
    for i, entries in enumerate((*caches, ("Unified", 3, "8M"))):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in zip(("type", "level", "size"), entries, strict=True):
            (folder / name).write_text(f"{value}\n")
    assert this_machine(info, tmp_path) == Machine("V 6 143", 48, 2048)
    assert Machine("V 6 143", 48, 2048).key == "V 6 143, L1 48 KB, L2 2048 KB"


def test_what_the_kernel_does_not_tell_is_zero(tmp_path: Path) -> None:
    found = this_machine(tmp_path / "none", tmp_path)
    assert (found.l1_kb, found.l2_kb) == (0, 0)
