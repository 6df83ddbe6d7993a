# `make demo` shows the product, `make check` is for every edit, `make test` is all of it. Each makes .venv when it is absent.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo-bundle

# Idle threads of OpenMP sleep. Python keeps compiled files, also where the environment says otherwise: the tests start many
# processes.
export OMP_WAIT_POLICY := PASSIVE
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo check test cpu-seconds lint docs bench oldest audit sbom licences openvino triton kserve ray fuzz clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cpu,test]"
	touch $@

demo: .venv/installed
	$(BIN)/rsi-deploy export samples.digits:cnn --checkpoint samples/digits_cnn.safetensors --rank 25% \
	  --include 'classifier.fc*' --data samples/digits_eval.npz -o $(DEMO) --force

# Two files of tests at a time: more would wait for each other's threads, and times are measured in some.
AT_A_TIME := -n 2 --dist loadfile

# `--fast` leaves out the files that tests/cpu_seconds.txt lists as slow (CONTRIBUTING.md).
check: .venv/installed lint
	$(BIN)/python -m pytest $(AT_A_TIME) --fast

test: .venv/installed lint
	$(BIN)/python -m pytest $(AT_A_TIME) --durations 20

# All tests, and their CPU seconds by file into tests/cpu_seconds.txt; on a quiet machine.
cpu-seconds: .venv/installed
	$(BIN)/python -m pytest $(AT_A_TIME) --cpu-seconds

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation, into build/site, without network. It is strict: a broken link or an unknown name fails. (Not with
# --quiet: MkDocs does not count the warnings that it does not show.)
.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cpu,docs]"
	touch $@

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The suite's core with the oldest versions that pyproject.toml allows: export of torch and ONNX, split passes, plan, bench,
# verify, report, the command line. With Python 3.11 or 3.12: the oldest numpy has no wheels for newer ones.
CORE := tests/graph_passes tests/planning tests/exporting/test_pipeline.py tests/io/test_onnx_file.py tests/onnx_models/test_rewrite.py \
  tests/test_calibrated_export.py tests/io/test_bundle.py tests/verifying/test_verification.py tests/test_cli.py tests/onnx_models/test_opset.py \
  tests/benchmark/test_latency.py tests/evaluation/test_accuracy.py tests/runtime/test_sessions.py tests/report

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[cpu,test]"
	touch $@

oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(AT_A_TIME) $(CORE)

# What a release is checked with. `audit` asks PyPI for known vulnerabilities, and fails, saying so, where it gets no answer.
AUDITING := pip-audit==2.10.1 cyclonedx-bom==7.5.0

.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet $(AUDITING)
	touch $@

audit: .venv-audit/installed
	.venv-audit/bin/python -m tests.release.audit

sbom: .venv-audit/installed .venv/installed
	mkdir -p dist
	.venv-audit/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible --of JSON \
	  -o dist/rsi-deploy.cdx.json $(BIN)/python
	@echo "dist/rsi-deploy.cdx.json: CycloneDX, of what .venv holds"

licences: .venv/installed
	$(BIN)/python -m tests.release.licences

# A second real provider. onnxruntime-openvino overwrites onnxruntime's folder, so it gets an environment of its own, with
# what `rsi-deploy bench` needs and no torch. Where it cannot be installed, the job says so and is no failure.
OPENVINO := onnxruntime-openvino==1.24.1
MEASURING := click ml_dtypes numpy onnx onnx-ir pillow psutil pydantic rich

.venv-openvino/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install --quiet -c constraints.txt $(OPENVINO) $(MEASURING) pytest
	.venv-openvino/bin/python -m pip install --quiet -c constraints.txt --no-deps -e .
	touch $@

openvino:
	@if $(MAKE) --no-print-directory .venv-openvino/installed; then \
	  .venv-openvino/bin/python -m pytest --noconftest -m openvino tests/runtime/test_openvino.py; \
	else \
	  echo "SKIPPED: $(OPENVINO) cannot be installed here (wheels: x86-64 Linux and Windows, Python 3.11 to 3.14); pip says why above"; \
	fi

# Engines that pin other versions than ours, each in an environment of its own that tests/packaging drives: NVIDIA's
# tritonserver out of nvidia-pytriton's wheel (Python backend) with tritonclient, and KServe's models.
.venv-triton/installed:
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet nvidia-pytriton==0.7.0 "tritonclient[grpc,http]" \
	  "$$(grep '^onnxruntime==' constraints.txt)"
	touch $@

.venv-kserve/installed:
	$(PYTHON) -m venv .venv-kserve
	.venv-kserve/bin/python -m pip install --quiet kserve==0.21.0 "kubernetes<32"
	touch $@

# Ray installs beside our pins; it is apart only because it is large.
.venv-ray/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet -c constraints.txt -e ".[cpu,ray,test]"
	touch $@

ray: .venv-triton/installed .venv-ray/installed
	RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 .venv-ray/bin/python -m pytest -m ray tests

triton kserve: .venv/installed
	@if $(MAKE) --no-print-directory .venv-$@/installed; then \
	  $(BIN)/python -m pytest -m $@ tests/packaging; \
	else \
	  echo "SKIPPED: the environment .venv-$@ cannot be installed here; pip says why above"; \
	fi

# Coverage-guided fuzzing; atheris has wheels for x86-64 Linux. What is new is kept in $(FUZZ_CORPUS) for the next run.
FUZZ_SECONDS ?= 60
FUZZ_CORPUS ?= .fuzz-corpus
FUZZ_TARGETS ?= onnx runtime report plan cost config

.venv-fuzz/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet -c constraints.txt -e ".[cpu,fuzz]"
	touch $@

fuzz:
	@if $(MAKE) --no-print-directory .venv-fuzz/installed; then \
	  for target in $(FUZZ_TARGETS); do \
	    .venv-fuzz/bin/python tests/fuzz/fuzz.py $$target --seconds $(FUZZ_SECONDS) \
	      --corpus $(FUZZ_CORPUS)/$$target || exit 1; \
	  done; \
	else \
	  echo "SKIPPED: the environment .venv-fuzz cannot be installed here; pip says why above"; \
	fi

clean:
	rm -rf .venv .venv-oldest .venv-audit .venv-openvino .venv-triton .venv-kserve .venv-ray .venv-fuzz .fuzz-corpus $(DEMO) \
	  build dist
