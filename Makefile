# make demo   before / mask / after pictures of the main job, under demo-output/
# make test   lint, types and every test
# make sheet  fills, stitches, seams, masks, pads and colour matches to look at, under sheet-output/
# make bench  exact figures and speeds beside every peer that is installed; ARGS="--custom-nodes DIR --only T8"
# make train  the model that comes with the project, from nothing or from where it was stopped; training-runs/
# All set up .venv first; PYTHON=python3.12 chooses the interpreter it is made from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint sheet bench train clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, this is " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	@touch $@

demo: $(READY)
	$(BIN)/mend demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --explicit-package-bases engine training

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term

sheet: $(READY)
	$(BIN)/python benchmarks/pixel_sheet.py

bench: $(READY)
	$(BIN)/python benchmarks/pixels.py $(ARGS)

train: $(READY)
	$(BIN)/python -m comfyui_mend.training $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output sheet-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
