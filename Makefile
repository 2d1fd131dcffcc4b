# `make demo` and `make test` need Python 3.11 or newer (with its headers), pip, make and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.stamp

DEMO_ARGS   ?=
# nf4 or fp4: the demo on a quantized base
QUANT       ?=
PYTEST_ARGS ?= -n 2

# Two pytest workers on two cores: OpenMP threads that wait must not spin (a training step took 0.47 s instead of 3.5 s).
export OMP_WAIT_POLICY ?= passive

.PHONY: venv demo test lint clean distclean help

help:
	@echo "make venv | demo | test | lint | clean | distclean    (PYTHON=$(PYTHON) VENV=$(VENV))"

venv: $(STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("fastft needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that the build that pip picks for this machine decides about triton.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt -e '.[train,test,tools]'
	@touch $@

demo: $(STAMP)
	$(PY) examples/demo.py $(if $(QUANT),--quant $(QUANT)) $(DEMO_ARGS)

test: $(STAMP)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m pip install --quiet ruff
	$(PY) -m ruff check fastft passes kernels tests tools examples

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo_output
	find . \( -path ./$(VENV) -o -path ./.git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
