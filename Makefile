PYTHON ?= python3
BIN := .venv/bin
T ?= tests

.PHONY: setup demo check fix lint test slow docs gpu bench clean

# One file says the environment is whole; it is made anew when what it was made from changes.
setup: .venv/complete

.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev,docs]'
	touch .venv/complete

demo: setup
	rm -rf demo-run demo-run.text .demo-run.partial
	$(BIN)/hybridize demo --out demo-run $(if $(LONG),--long)

check: setup lint test docs slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --warnings hybridize

fix: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope $(T)

slow: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist loadscope -m slow $(T)

docs: setup
	$(BIN)/python scripts/build_docs.py

gpu: setup
	$(BIN)/python bench/gpu.py --out gpu-run $(if $(KIT),--kit $(KIT))

bench: setup
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/distill.py
	$(BIN)/python bench/decode.py

clean:
	rm -rf .venv demo-run demo-run.text build site *.egg-info
