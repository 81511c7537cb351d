# Every target sets up what it needs: a virtual environment in .venv, with the package installed in place.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
CORES ?= 2
TESTS ?= tests
DATA ?= ../shared/data
# what a study makes: report is all that its file orders; or table1, table2, figure4, figure6, figure7
TARGET ?= report

PRETRAIN := bundles/radimagenet_controlnet_pretrain
WORK ?= runs/tiny_weights
SEGMENTER ?= runs/segmentation_weights
RUN = $(BIN)/python -m monai.bundle run --bundle_root $(PRETRAIN) --config_file $(PRETRAIN)/configs

.PHONY: setup demo study paper_small test lint docs acceptance results tiny_weights segmentation_weights clean
.DEFAULT_GOAL := demo

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[workflow,dev,docs]'
	touch $@

setup: $(STAMP)  ## only the set-up

demo: $(STAMP)  ## phantoms through all four bundles to runs/demo/report/index.html
	$(BIN)/diffboost study workflow/experiments/demo.yaml --cores $(CORES)

study: $(STAMP)  ## any experiment file: make study EXPERIMENT=path/to/file.yaml [DATASET_DIR=path] [TARGET=table2]
	@test -n "$(EXPERIMENT)" || { echo "say which: make study EXPERIMENT=path/to/file.yaml"; exit 2; }
	$(BIN)/diffboost study "$(EXPERIMENT)" --cores $(CORES) --target $(TARGET) $(if $(DATASET_DIR),--dataset_dir "$(DATASET_DIR)")

paper_small: $(STAMP)  ## every table and figure of the paper, small: make paper_small DATA=path (it holds busi/) [TARGET=table2]
	@test -d "$(DATA)/busi" || { echo "DATA=$(DATA) holds no busi/: make paper_small DATA=path/to/data"; exit 2; }
	$(BIN)/diffboost study workflow/experiments/paper_small.yaml --cores $(CORES) --target $(TARGET) --dataset_dir "$(DATA)/busi"

test: $(STAMP)  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TESTS)

lint: $(STAMP)  ## ruff, as pre-commit runs it
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

docs: $(STAMP)  ## the documentation site, strictly, to site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

acceptance: $(STAMP)  ## what clients demand, each in an environment of its own (about an hour, needs a package index)
	$(BIN)/python tests/acceptance/zoo.py runs/acceptance/zoo
	PYTHON=$(BIN)/python bash tests/acceptance/monai_label.sh
	PYTHON=$(BIN)/python bash tests/acceptance/nvflare.sh

results: $(STAMP)  ## docs/results/index.md from the metrics in docs/results/data; RUNS=folder collects these first
	$(BIN)/python benchmarks/results_page.py $(if $(RUNS),--runs "$(RUNS)")

tiny_weights: $(STAMP)  ## pretrain the shipped backbone anew on phantoms (about an hour on two cores)
	$(RUN)/prepare.yaml --store_dir $(WORK)/store
	test -d "$(WORK)/untrained" || $(RUN)/create_backbone.yaml --output_dir $(WORK)/untrained
	$(RUN)/train_autoencoder.yaml --store_dir $(WORK)/store --backbone $(WORK)/untrained --output_dir $(WORK)/autoencoder
	$(RUN)/train.yaml --store_dir $(WORK)/store --backbone $(WORK)/autoencoder/backbone --train_base True --output_dir $(WORK)/generator
	test -d "$(WORK)/tiny" || $(RUN)/export.yaml --backbone $(WORK)/autoencoder/backbone --generator_dir $(WORK)/generator --output_dir $(WORK)/tiny
	$(RUN)/train_tiny_decoder.yaml --store_dir $(WORK)/store --backbone $(WORK)/tiny --epochs 3 --output_dir $(WORK)/tiny_decoder

segmentation_weights: $(STAMP)  ## train the shipped segmenter anew on phantoms (about 15 minutes on one thread)
	$(BIN)/python -m monai.bundle run --bundle_root bundles/task_finetune --config_file bundles/task_finetune/configs/prepare.yaml --store_dir $(SEGMENTER)/store --edges gradient --phantoms "{num_training: 32, num_test: 12}" --seed 1
	$(BIN)/python -m monai.bundle run --bundle_root bundles/diffboost_segmentation --config_file bundles/diffboost_segmentation/configs/train.yaml --store_dir $(SEGMENTER)/store --arm nnunet --epochs 40 --output_dir $(SEGMENTER)/run
	$(BIN)/python -m monai.bundle run --bundle_root bundles/diffboost_segmentation --config_file bundles/diffboost_segmentation/configs/export.yaml --segmenter_dir $(SEGMENTER)/run --output_dir bundles/diffboost_segmentation/models

clean:  ## caches and builds; the environment and runs/ stay
	rm -rf build dist site .pytest_cache .ruff_cache
