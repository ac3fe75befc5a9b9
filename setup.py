"""Maps `fastdistil.kernels` to kernels/. All metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastdistil", "fastdistil.*"]), "fastdistil.kernels"],
    package_dir={"fastdistil.kernels": "kernels"},
)
