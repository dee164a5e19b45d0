# Doors to the project; each sets the environment up first, on a bare machine too.
UV := $(or $(shell command -v uv 2>/dev/null),$(shell python3 -m site --user-base)/bin/uv)
RUN := "$(UV)" run --no-sync

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

# uv is found, or installed for this user; the system's own packages are not touched, which pip wants to be told.
.venv/.synced: pyproject.toml
	@command -v "$(UV)" >/dev/null \
		|| PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --disable-pip-version-check uv \
		|| { echo "uv is needed and pip could not install it: https://docs.astral.sh/uv/getting-started/installation/"; exit 1; }
	"$(UV)" sync
	@touch $@
