# Each target makes .venv itself. A second run installs nothing; an interrupted installation is
# started afresh; a change of pyproject.toml or constraints.txt is installed by the next run, and
# a refusal of pip at that (no network) leaves the environment that worked.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.stamp
UNFINISHED := $(VENV)/.unfinished
RUN := $(VENV)/bin/python

.PHONY: demo test check format clean

demo: $(STAMP)
	@$(RUN) examples/demo.py

test: $(STAMP)
	$(RUN) -m pytest -q -n 2

check: $(STAMP)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy src
	$(RUN) -m pytest -q tests/test_architecture.py

format: $(STAMP)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:
	rm -rf dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, found: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) lacks venv (on Debian and Ubuntu it is the package python3-venv)." >&2; exit 1; }
	@if [ -e $(UNFINISHED) ]; then \
		echo "The last installation was interrupted: starting it afresh."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(UNFINISHED)
	@echo "Installing into $(VENV): several GB, once."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' || { \
		code=$$?; if [ -e $(STAMP) ] && [ $$code -lt 128 ]; then rm $(UNFINISHED); fi; exit $$code; }
	@mv $(UNFINISHED) $(STAMP)
