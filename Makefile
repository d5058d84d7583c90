# Each command sets itself up in .venv, so that it works on a fresh machine with Python 3.11+, gcc and pip.
.PHONY: install environment serve test bench
PYTHON ?= python3

install: .venv/.installed

# torch first: where there is no NVIDIA GPU its CPU build, which pip then finds good enough. Without the index of CPU
# builds (no network to it), pip takes what its own index has, after a warning. Bytecode is compiled here, on all cores,
# and not by pip, on one: without it each of the ten processes of a start compiles what it imports. Packages hold files
# for other versions of Python, which do not compile; hence `true`.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --no-compile --no-deps $$(nvidia-smi >/dev/null 2>&1 || echo --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu) "$$(grep -o 'torch>=[^"]*' pyproject.toml)"
	.venv/bin/pip install -q --no-compile -e '.[dev]'
	.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

# Ray reads these when it starts. HAProxy in front of the ingresses instead of Serve's own proxy: more tokens a second, and
# clients that leave are noticed sooner (figures in the README). Token authentication: only this user's processes may join.
SERVE_ENVIRONMENT = RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_HAPROXY_BINARY_PATH=$(CURDIR)/scripts/haproxy RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_LOG_TO_STDERR=1 \
	RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=0 RAY_AUTH_MODE=token

# For the shell that starts a node of a cluster: export $(make -s environment)
environment:
	@echo $(SERVE_ENVIRONMENT)

serve: install
	@.venv/bin/python scripts/announce.py & $(SERVE_ENVIRONMENT) exec .venv/bin/serve run deployments/tiny.yaml

test: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest

bench: install
	.venv/bin/python benchmarks/scheduler.py
	.venv/bin/python benchmarks/step_log.py
	.venv/bin/python benchmarks/transport.py
	.venv/bin/python benchmarks/bubbles.py
	.venv/bin/python benchmarks/overhead.py
	.venv/bin/python benchmarks/simulator.py
	.venv/bin/python benchmarks/paper.py --quick
	.venv/bin/python benchmarks/auto_budget.py --quick
