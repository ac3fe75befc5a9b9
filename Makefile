# make train | test | check | bench | gpu | setup
#
# A fresh clone needs Python 3.11 to 3.13 and the package registry, nothing more. Without a compiler the
# package is installed as pure Python; FASTDISTIL_EXT=1 demands the C++ extension, FASTDISTIL_EXT=0 leaves it out.

PYTHON ?= python3
VENV ?= .venv
FASTDISTIL_EXT ?= auto
OUT ?= build/gpu
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TOOLS := $(VENV)/.tools
INSTALLED := $(VENV)/.installed-ext-$(FASTDISTIL_EXT)
SOURCES := $(wildcard fastdistil/kernels csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: setup train test check lint bench gpu clean

setup: $(INSTALLED)

# torch comes first and alone: a range asked for by another package would fetch a newer one with its CUDA packages.
$(TOOLS): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and \
	    "fastdistil needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools ninja pybind11
	touch $@

# One stamp a build mode, and only the newest kept, so that changing FASTDISTIL_EXT installs again.
$(INSTALLED): $(TOOLS) pyproject.toml setup.py $(SOURCES)
	rm -f $(VENV)/.installed-ext-* fastdistil/_C*.so
	FASTDISTIL_EXT=$(FASTDISTIL_EXT) $(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

train: setup
	$(VENV)/bin/fastdistil train quickstart $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

check: lint test

bench: setup
	$(PIP) liger-kernel
	$(PY) -m pytest benchmarks $(ARGS)

# On a machine with a GPU, torch and no network: install, test and measure with the python3 that is there.
gpu:
	bash .ci/gpu "$(OUT)" "$(PYTHON)"

clean:
	rm -rf build dist fastdistil/_C*.so $(VENV)/.installed-ext-*
