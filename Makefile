# make demo    set up, then train and evaluate on generated nuclei, offline after the installation
# make test    set up, then run the tests
# make results-quick    the default recipe's row of docs/RESULTS.md, one seed: an hour of one core, or half of two; it goes on
#                       where it was stopped; downloads the data
# make test-slow        those that take long: fuzzing, kills at random moments, every value of every option
# make test-versions    the tests with the lowest versions that requirements.txt admits, and with the newest
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo results-quick test test-slow test-versions lint clean
.DELETE_ON_ERROR:

$(VENV)/.ready: requirements.txt requirements-onnx.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python preprocess_dsb2018.py --demo --overwrite
	$(BIN)/python train.py --config configs/demo.yml --overwrite
	$(BIN)/python val.py --name demo

SEED ?= 0
results-quick: $(VENV)/.ready
	test -d inputs/dsb2018_96 || $(BIN)/python preprocess_dsb2018.py --download
	if test -f models/default_s$(SEED)/config.yml; then $(BIN)/python train.py --name default_s$(SEED) --resume; \
	else $(BIN)/python train.py --config configs/default.yml --seed $(SEED) --name default_s$(SEED); fi
	$(BIN)/python val.py --name default_s$(SEED)
	$(BIN)/python -m tools.results default_s$(SEED)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m slow

LOWEST_PYTHON ?= 3.10
NEWEST_PYTHON ?= 3.13
test-versions: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(LOWEST_PYTHON) $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct -r requirements-dev.txt
	$(VENV)-lowest/bin/python -m pytest -q
	$(BIN)/uv venv --quiet --clear --python $(NEWEST_PYTHON) $(VENV)-newest
	$(BIN)/uv pip install --quiet --python $(VENV)-newest/bin/python -r requirements-dev.txt
	$(VENV)-newest/bin/python -m pytest -q

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest .pytest_cache .ruff_cache __pycache__ tests/__pycache__
