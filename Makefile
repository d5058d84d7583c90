# Two commands: `make serve` and `make test`. Each sets itself up in .venv, so that it works on a fresh machine.
.PHONY: install serve test bench clean
PYTHON ?= python3

install: .venv/.installed

.venv/.installed: pyproject.toml scripts/install.sh
	scripts/install.sh $(PYTHON)

serve: install
	scripts/serve.sh deployments/tiny.yaml

test: install
	scripts/test.sh

bench: install
	.venv/bin/python benchmarks/scheduler.py

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
