# Two commands do everything: `make demo` and `make test`. Each makes the environment in .venv when it is not there.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo-bundle

.PHONY: demo test lint bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cpu,test]"
	touch $@

demo: .venv/installed
	$(BIN)/rsi-deploy export samples.digits:cnn --checkpoint samples/digits_cnn.safetensors --rank 25% \
	  --include 'classifier.fc*' --data samples/digits_eval.npz -o $(DEMO) --force

test: .venv/installed lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(DEMO) build dist
