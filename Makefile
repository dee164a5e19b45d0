# Doors to the project; each sets the environment up first, on a bare machine too.
UV := $(shell command -v uv 2>/dev/null || echo "$$HOME/.local/bin/uv")
RUN := $(UV) run --no-sync

.PHONY: sample test lint docs setup

sample: setup  ## train FASeg on the embedded sample; prints the score and the report
	$(RUN) python -m tasks.segmentation fit -c configs/sample/faseg.yaml

test: setup  ## the whole test suite
	$(RUN) pytest -n 2

lint: setup  ## format, lint and types
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

docs: setup  ## refresh the generated tables of docs/
	$(RUN) python -m tasks --markdown > docs/zoo.md

setup: .venv/.synced

# uv is found, or installed for this user without touching the system's Python.
.venv/.synced: pyproject.toml
	@command -v $(UV) >/dev/null || python3 -m pip install --user --quiet --disable-pip-version-check uv \
		|| python3 -m pip install --user --quiet --disable-pip-version-check --break-system-packages uv
	$(UV) sync
	@touch $@
