# make demo    set up, then train and evaluate on generated nuclei, offline after the installation
# make test    set up, then run the tests; make test-slow runs those that take minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean
.DELETE_ON_ERROR:

$(VENV)/.ready: requirements.txt requirements-onnx.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python preprocess_dsb2018.py --demo --overwrite
	$(BIN)/python train.py --config configs/demo.yml --overwrite
	$(BIN)/python val.py --name demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache __pycache__ tests/__pycache__
