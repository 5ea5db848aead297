# Two commands for a fresh machine: `make demo` runs the main job, `make test` passes every test.
# Both need only git, make and Python >= 3.11, and set up .venv on their first run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Not --quiet, which would keep warnings from being errors.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
DEMO_LABELS := eng_Latn deu_Latn fra_Latn spa_Latn pol_Latn tur_Latn vie_Latn rus_Cyrl bul_Cyrl \
	ukr_Cyrl ell_Grek arb_Arab heb_Hebr hin_Deva tha_Thai kor_Hang jpn_Jpan zho_Hani

.PHONY: demo sweep-demo test chaos check docs format bench figure screenshots notebooks clean

demo: $(INSTALLED)
	$(BIN)/collector collect --out runs/demo
	$(BIN)/collector collect --out runs/demo-random --weights random
	$(BIN)/collector show runs/demo --beside runs/demo-random --labels $(DEMO_LABELS)
	$(BIN)/collector query runs/demo effective_experts --layer 4 --labels eng_Latn,kor_Hang

# When does specialization appear? Trains a small model, keeps checkpoints, and draws curves over them.
sweep-demo: $(INSTALLED)
	test -e runs/checkpoints/training.json || $(BIN)/python -m collector.demo.train --out runs/checkpoints \
		--steps 400 --rows 8 --warmup 20 --save-at 0 6 12 25 50 100 200 400 --no-evaluate
	$(BIN)/collector sweep --model runs/checkpoints --per-label 20 --out runs/sweep-demo
	$(BIN)/collector query runs/sweep-demo mutual_information --layer 4
	$(BIN)/collector query runs/sweep-demo router_saturation --layer 4 --pooled true
	$(BIN)/collector report runs/sweep-demo --out runs/sweep-demo.html --figures runs/sweep-figures --resamples 50

test: $(INSTALLED)
	@command -v chromium >/dev/null || echo 'No Chromium: tests of pages are skipped. Debian: apt-get install chromium'
	$(BIN)/pytest -m "not gpu" --numprocesses logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sqlfluff lint queries
	$(BIN)/codespell
	$(MKDOCS)

# The documentation as a site: site/index.html. Warnings are errors; nothing is fetched.
docs: $(INSTALLED)
	$(MKDOCS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.collect

figure: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plots]'
	$(BIN)/python docs/figure.py docs/demo.png

screenshots: $(INSTALLED)
	$(BIN)/python -m docs.screenshots

# Runs every notebook, and keeps what it shows: notebooks/exported/*.ipynb and *.html.
notebooks: $(INSTALLED)
	mkdir -p notebooks/exported
	for notebook in notebooks/0*.py; do \
		name=notebooks/exported/$$(basename $$notebook .py); \
		$(BIN)/marimo --yes export ipynb $$notebook --include-outputs --force --output $$name.ipynb && \
		$(BIN)/marimo --yes export html $$notebook --force --output $$name.html || exit 1; \
	done

clean:
	rm -rf $(VENV) runs dist site notebooks/exported

# The stamp is newer than what it was made of, so a second run installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@
