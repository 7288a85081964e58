# Shortcuts; every target runs inside the project's own environment, which the first call makes.
RUN := python3 .ci/env.py
export OMP_WAIT_POLICY := PASSIVE
FOLDER ?= hiperlab/weights/mini
PRESET ?= gpu
PYTHON ?= $(RUN) python
OUT ?= outputs/gpu-check
SUBJECTS ?= 20
LEDGER = $(RUN) python -m hiperlab.run data.identity_seed=[$(shell seq -s, $(SUBJECTS))] logger=csv
# PYTHON names an interpreter, or, for wheels, the version that they are for
VERSION := $(or $(filter 3.%,$(PYTHON)),3.12)
WHEELS := $(RUN) python -m pip download -q --no-deps --only-binary=:all: --python-version $(VERSION) \
	-c .ci/constraints.txt -d .whl

.PHONY: help setup format check test test-fast smoke notebook gpu-check wheels miniature miniature-wheels miniature-report ledger clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup:  ## make or update .venv
	$(RUN)

format:  ## format and sort imports
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

check:  ## lint, import walls, types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) lint-imports --no-cache
	$(RUN) mypy hiperlab

test:  ## the whole suite
	$(RUN) python -m pytest

test-fast:  ## without the tests marked slow
	$(RUN) python -m pytest -m "not slow"

smoke:  ## two steps of every method on the tiny stack
	$(RUN) python -m hiperlab.run -m 'method=glob(*)' model=tiny fit.steps=2 sampler.steps=2 fit.sample_every=0 sweep=smoke-$$(date +%s)

notebook:  ## execute the notebooks in place
	$(RUN) jupyter-execute --inplace notebooks/*.ipynb

miniature-report:  ## measure the bars of the shipped miniature, or of FOLDER=<export>
	$(RUN) python -m hiperlab.miniature stages=[report] report.folder=$(FOLDER) out=outputs/miniature/report

miniature:  ## train the miniature's U-Net and decoder on a GPU, in ten minutes (PRESET=cpu: in hours)
	$(PYTHON) -m hiperlab.miniature preset=$(PRESET) stages=[data,latents,unet,decoder,export] $(ARGS)

gpu-check:  ## is it right and how fast on this GPU, in eight minutes; OUT=<folder> (hiperlab/bench/GPU.md)
	$(PYTHON) -m hiperlab.bench.gpu_check --out $(OUT) $(ARGS)

wheels:  ## collect into .whl/ what gpu-check needs on a machine without network, PYTHON=3.12
	$(RUN) python -m pip wheel -q --no-deps -c .ci/constraints.txt -w .whl antlr4-python3-runtime
	$(WHEELS) diffusers hydra-core omegaconf pytorch-lightning peft open_clip_torch \
	  importlib_metadata zipp requests urllib3 certifi charset-normalizer idna
	@du -sh .whl

miniature-wheels: wheels  ## and what drawing the world and training the miniature need
	$(WHEELS) ftfy wcwidth skia-python
	@du -sh .whl

ledger:  ## every method on held-out subjects, and what papers say of them; SUBJECTS=5 is quicker; stopped, it goes on
	$(LEDGER) experiment=ledger $(ARGS)
	$(LEDGER) experiment=ledger_peft $(ARGS)
	$(LEDGER) experiment=ledger_dco $(ARGS)
	$(LEDGER) -m experiment=ledger method=cross_initialization fit.steps=25 method.optimizer.lr=0.15 $(ARGS)
	$(RUN) python -m hiperlab.run experiment=editors logger=csv
	$(RUN) python -m hiperlab.compare outputs/sweeps/ledger --claims published --out outputs/ledger/concepts
	$(RUN) python -m hiperlab.compare outputs/sweeps/editors --claims published --out outputs/ledger/edits

clean:  ## remove caches (never outputs)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
