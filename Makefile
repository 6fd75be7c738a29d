# Each command makes its own .venv first; Python 3.11 or newer, make and a C++ compiler are enough.
#   make test    install what the suite needs and run it
#   make demo    the demonstration of README.md
#   make check   every gate: lint, format, types, layers, suite
#   make bench   whole networks against their peers; another script: make bench BENCH=layers BENCH_ARGS=--help
#   make aarch64-runtime   TVM's ARM libraries, with which `lower` checks target arm under emulation
# On Linux the plain torch wheel brings gigabytes of CUDA. If pip here is not set up for a CPU wheel, give
# its index: make test TORCH_INDEX=<address that the torch site names for CPU wheels>.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
TEST_ARGS ?=
BENCH ?= run
BENCH_ARGS ?=

BIN := .venv/bin
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/t3c
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
TVM := $(shell sed -n 's/^ *"\(apache-tvm[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: test demo check bench aarch64-runtime clean
.DELETE_ON_ERROR:

test: .venv/test.stamp
	$(BIN)/python -m pytest -ra -n auto --dist loadfile $(TEST_ARGS)

demo: .venv/demo.stamp
	$(BIN)/python examples/demo_minilm.py

check: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -ra -n auto --dist loadfile $(TEST_ARGS)

bench: .venv/bench.stamp
	$(BIN)/python -m benchmarks.$(BENCH) $(BENCH_ARGS)

aarch64-runtime: .venv/torch.stamp
	rm -rf build/aarch64
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: \
		--platform manylinux_2_28_aarch64 -d build/aarch64 $(TVM)
	for wheel in build/aarch64/*.whl; do \
		$(BIN)/python -m zipfile -e "$$wheel" build/aarch64/files || exit 1; done
	mkdir -p "$(CACHE)/aarch64"
	cp build/aarch64/files/tvm/lib/libtvm_runtime.so \
		build/aarch64/files/tvm_ffi/lib/libtvm_ffi.so "$(CACHE)/aarch64"
	rm -rf build/aarch64

clean:
	rm -rf .venv build dist *.egg-info

.venv/torch.stamp:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

.venv/test.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -q -e ".[demo]"
	@touch $@

.venv/bench.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -q -e ".[demo,peers]"
	@touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -q -e ".[test,dev,demo]"
	@touch $@
