# make demo             set up, then train and evaluate on generated nuclei; offline after the installation
# make test             set up, then run the tests in parallel
# make results-quick    one seed of the default recipe's row in docs/RESULTS.md: about 70 minutes on one core, half on two;
#                       downloads the data; continues where it was stopped
# make nuclei-quick     the fast recipe of individual nuclei, trained and evaluated: half an hour on two cores; downloads
#                       the data (FIXES=stage1_train_fixes.zip corrects their masks); with one GPU: NPROC=1; continues where
#                       it was stopped
# make test-slow        the tests that take long: fuzzing, kills at random moments, every value of every option
# make test-versions    the tests with the lowest versions that requirements.txt admits, and with the newest
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo results-quick nuclei-quick test test-slow test-versions lint clean
.DELETE_ON_ERROR:

$(VENV)/.ready: $(wildcard requirements*.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python preprocess_dsb2018.py --demo --overwrite
	$(BIN)/python train.py --config configs/demo.yml --overwrite
	$(BIN)/python val.py --name demo

# $(call trained,RUN,how train.py is called,options of a new run): trains models/RUN, or continues it
trained = if test -f models/$(1)/config.yml; then $(BIN)/$(2) train.py --name $(1) --resume; \
	else $(BIN)/$(2) train.py $(3) --name $(1); fi

SEED ?= 0
results-quick: $(VENV)/.ready
	test -d inputs/dsb2018_96 || $(BIN)/python preprocess_dsb2018.py --download
	$(call trained,default_s$(SEED),python,--config configs/default.yml --seed $(SEED))
	$(BIN)/python val.py --name default_s$(SEED)
	$(BIN)/python -m tools.results default_s$(SEED)

FIXES ?=
NPROC ?= 2
nuclei-quick: $(VENV)/.ready
	test -d inputs/dsb2018 || $(BIN)/python preprocess_dsb2018.py --download --native $(if $(FIXES),--fixes $(FIXES))
	$(call trained,nuclei_fast,torchrun --nproc_per_node=$(NPROC),--config configs/nuclei_fast.yml)
	$(BIN)/python val.py --name nuclei_fast

PYTEST := -m pytest -q -n auto --dist loadfile --no-loadscope-reorder
test: $(VENV)/.ready
	$(BIN)/python $(PYTEST)

test-slow: $(VENV)/.ready
	$(BIN)/python $(PYTEST) -m slow

LOWEST_PYTHON ?= 3.10
NEWEST_PYTHON ?= 3.13
test-versions: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(LOWEST_PYTHON) $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct -r requirements-dev.txt
	$(VENV)-lowest/bin/python $(PYTEST)
	$(BIN)/uv venv --quiet --clear --python $(NEWEST_PYTHON) $(VENV)-newest
	$(BIN)/uv pip install --quiet --python $(VENV)-newest/bin/python -r requirements-dev.txt
	$(VENV)-newest/bin/python $(PYTEST)

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
