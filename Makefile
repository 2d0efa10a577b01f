# One command for each thing that people do here; `make` alone lists them.
# Every target first sees to .venv (.ci/setup.sh): made when it is missing, brought up to date when settings.ini changed, else left alone.

ROOT := $(shell CDPATH= cd -- "$$(dirname -- '$(strip $(MAKEFILE_LIST))')" && pwd)
VENV := $(if $(TDMPC_VENV),$(TDMPC_VENV),$(ROOT)/.venv)
PY   := "$(VENV)/bin/python"

# A folder of its own for each run, unless RUN= names one.
ifndef RUN
RUN := runs/distill-$(shell date +%Y%m%d-%H%M%S)
endif
ARGS ?=

export JUPYTER_PREFER_ENV_PATH = 1
.DEFAULT_GOAL := help
.PHONY: help setup distill ablate test bench lab clean distclean

help:       ## this list
	@echo "usage: make TARGET [ARGS=\"...\"] [PYTHON=/path/to/python3.12] [TDMPC_VENV=/an/environment/of/your/own]"
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' "$(ROOT)/Makefile" | expand -t 18

setup:      ## make .venv ready and install what is missing; the other targets do this by themselves
	@bash "$(ROOT)/.ci/setup.sh"

distill: setup ## distil the teachers into the 1M student; ARGS="-p steps 500" sets parameters, TDMPC_PRESET=tiny|quick|mt30 the scale, RUN= the folder
	@cd "$(ROOT)" && mkdir -p "$(RUN)" && echo "Distilling into $(RUN)" && \
	$(PY) -m papermill nbs/run_distill.ipynb "$(RUN)/run_distill.ipynb" --cwd . --no-progress-bar --stdout-file - --stderr-file - \
	    -p out_dir "$(RUN)" $(ARGS) || \
	{ rc=$$?; [ ! -e "$(RUN)/config.json" ] || echo "To go on from the last checkpoint: make distill RUN=$(RUN) ARGS=\"-p resume True\""; exit $$rc; }
	@echo "Done. The executed notebook, with figures and video: $(RUN)/run_distill.ipynb; the numbers: $(RUN)/report.json"

ablate: setup ## a grid of settings times seeds with statistics; ARGS="-p grid terms -p seeds 3", RUN= the folder
	@cd "$(ROOT)" && d="$(if $(filter file,$(origin RUN)),runs/ablation-$$(date +%Y%m%d-%H%M%S),$(RUN))" && mkdir -p "$$d" && \
	$(PY) -m papermill nbs/run_ablation.ipynb "$$d/run_ablation.ipynb" --cwd . --no-progress-bar --stdout-file - --stderr-file - -p out_dir "$$d" $(ARGS) || \
	{ rc=$$?; [ ! -e "$$d/config.json" ] || echo "To go on where it stopped: make ablate RUN=$$d ARGS=\"-p resume True\" (and the same other parameters)"; exit $$rc; }

test: setup ## every notebook, then every other test; ARGS="-k planner" picks some
	@cd "$(ROOT)" && TDMPC_PRESET=tiny $(PY) -m pytest tests/test_notebooks.py $$(ls tests/test_*.py | grep -v test_notebooks) $(ARGS)

bench: setup ## time plan, policy, update and sampling on this machine, beside a plain implementation; ARGS as for distill
	@cd "$(ROOT)" && d=runs/benchmark-$$(date +%Y%m%d-%H%M%S) && mkdir -p "$$d" && \
	$(PY) -m papermill nbs/run_benchmark.ipynb "$$d/run_benchmark.ipynb" --cwd . --no-progress-bar --stdout-file - --stderr-file - -p out_dir "$$d" $(ARGS)
	@echo "Done; the table and the figure are in the newest runs/benchmark-* folder."

lab: setup  ## JupyterLab on the notebooks
	@cd "$(ROOT)" && $(PY) -m jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/00_start_here.ipynb \
	    $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(ARGS)

clean:      ## remove caches (runs/ and .venv stay)
	@cd "$(ROOT)" && rm -rf build dist .pytest_cache && \
	find . -path ./.venv -prune -o -path ./runs -prune -o -path ./data -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print | while IFS= read -r d; do rm -rf "$$d"; done

distclean: clean ## remove .venv as well; the next target makes it anew
	@cd "$(ROOT)" && rm -rf .venv *.egg-info
