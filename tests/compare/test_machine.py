"""What is said of the machine."""

import os
import platform
import re
from datetime import date
from pathlib import Path

import torch

import fastdistil
from fastdistil.compare.machine import describe_machine, memory_bytes, processor_name, usable_cpus


def test_labels_name_versions_and_date():
    labels = describe_machine()
    assert labels["torch"] == torch.__version__
    assert labels["python"] == platform.python_version()
    assert labels["date"] == date.today().isoformat()
    assert labels["instruction set"] == torch.backends.cpu.get_cpu_capability()
    assert re.fullmatch(r"\S+( \(commit [0-9a-f]{4,}(, changed)?\))?", labels["fastdistil"])
    assert labels["fastdistil"].startswith(fastdistil.__version__)


def test_cores_are_those_that_may_be_used():
    labels = describe_machine()
    assert labels["cores"].startswith(f"{usable_cpus()} (")
    assert 1 <= usable_cpus() <= os.cpu_count()


def test_generations_of_processors_with_one_name_are_told_apart(tmp_path):
    file = tmp_path / "cpuinfo"
    lines = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    file.write_text(lines + "\n" + lines.replace("17", "99"))
    assert processor_name(file) == "AMD EPYC (family 25, model 17)"


def test_a_processor_without_name_and_family(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nBogoMIPS\t: 243.75\nCPU part\t: 0xd40\n")
    assert processor_name(file) == platform.machine()
    assert processor_name(tmp_path / "nothing") == (platform.processor() or platform.machine())


def test_labels_give_away_neither_folders_nor_the_hosts_name():
    values = describe_machine().values()
    forbidden = {str(Path.home()), str(Path.cwd()), platform.node()} - {"", "/"}
    assert not [value for value in values if any(name in value for name in forbidden)]


def test_memory_is_read_in_bytes(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\n")
    assert memory_bytes("MemTotal", file) == 16 << 20
    assert memory_bytes("MemAvailable", file) == 8 << 20
    assert memory_bytes("MemTotal", tmp_path / "nothing") is None
