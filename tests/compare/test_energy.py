"""Joules from a folder of counters such as Linux has them."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastdistil.compare.energy import find_meter


def domain(root: Path, folder: str, name: str, microjoules: int, span: int = 1_000_000_000) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{span}\n")
    return path / "energy_uj"


def test_joules_are_those_of_all_packages_since_the_start(tmp_path):
    first = domain(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 500)
    meter, counts = find_meter(powercap=tmp_path)
    assert "package" in counts
    first.write_text("2_000_000".replace("_", ""))
    meter.start()
    first.write_text("5500000\n")
    second.write_text("1500500\n")
    assert meter.joules() == pytest.approx(3.5 + 1.5)


def test_what_lies_in_a_package_or_holds_it_is_not_counted_twice(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    others = [
        domain(tmp_path, "intel-rapl:0:0", "core", 0),
        domain(tmp_path, "intel-rapl:1", "psys", 0),
        domain(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    meter, _ = find_meter(powercap=tmp_path)
    for file in (package, *others):
        file.write_text("7000000")
    assert meter.joules() == pytest.approx(7.0)


def test_a_counter_that_has_started_again_at_0(tmp_path):
    file = domain(tmp_path, "intel-rapl:0", "package-0", 262_000_000, span=262_143_000)
    meter, _ = find_meter(powercap=tmp_path)
    file.write_text("857000")
    assert meter.joules() == pytest.approx(1.0)


def test_a_machine_without_a_counter_says_so(tmp_path):
    assert find_meter(powercap=tmp_path / "nothing") == (None, "this machine shows no energy counter (RAPL)")


def test_a_counter_for_root_alone_says_so(tmp_path, monkeypatch):
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    read = Path.read_text

    def refuse(path: Path, *arguments, **keywords) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refuse)
    meter, why = find_meter(powercap=tmp_path)
    assert meter is None
    assert "root" in why


def test_a_gpu_counts_millijoules(monkeypatch):
    total = {"now": 5_000}
    module = ModuleType("pynvml")
    module.NVMLError = RuntimeError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: total["now"] + handle
    monkeypatch.setitem(sys.modules, "pynvml", module)
    meter, counts = find_meter("cuda:1")
    total["now"] += 2_500
    assert meter.joules() == pytest.approx(2.5)
    assert "GPU" in counts


def test_a_gpu_without_the_package_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, why = find_meter("cuda")
    assert meter is None
    assert "nvidia-ml-py" in why
