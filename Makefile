# Two commands matter: `make demo` and `make test`. Both install what is missing first.

# BCC's binding is built for the distribution's own interpreter, and seen from .venv by --system-site-packages.
PYTHON := /usr/bin/python3
INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint bench test-kernels clean setup setup-run setup-demo setup-test setup-lint setup-vm
.NOTPARALLEL:

help:
	@echo 'make demo          weir at work on a small internet in two network namespaces (root)'
	@echo 'make test          every test that this machine can run (root)'
	@echo 'make lint          style, types and shell scripts'
	@echo 'make bench         what weir costs; writes tests/bench/RESULTS.md (root)'
	@echo 'make test-kernels  the kernel tests on Debian'"'"'s 5.10, 6.1 and 6.12 under QEMU; see tests/vm/README.md (root)'
	@echo 'make setup         only install what weir itself needs; the command is then .venv/bin/weir (root)'
	@echo 'make clean         remove .venv and caches; rules in the kernel stay (see: weir unload)'

demo: setup-demo .venv/installed
	@.venv/bin/python -m tests.demo

test: setup-test .venv/installed
	.venv/bin/pytest

lint: setup-lint .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	clang-format --dry-run -Werror bpf/*.[ch]
	git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck

bench: setup-test .venv/installed
	.venv/bin/python -m tests.bench

test-kernels: setup-vm .venv/installed .venv/installed-vm
	.venv/bin/python -m tests.vm.matrix

clean:
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: setup-run .venv/installed

setup-run:
	@tests/setup.sh venv run
setup-demo:
	@tests/setup.sh venv run demo
setup-test:
	@tests/setup.sh venv run demo test lint
setup-lint:
	@tests/setup.sh venv lint
setup-vm:
	@tests/setup.sh venv run demo test vm

# pip takes indexes and proxies from the machine's own configuration.
.venv/installed: pyproject.toml
	@echo 'set-up: Python packages into .venv'
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv --system-site-packages .venv
	@$(INSTALL) --editable '.[test]'
	@touch $@

.venv/installed-vm: pyproject.toml
	@$(INSTALL) --editable '.[vm]'
	@touch $@
