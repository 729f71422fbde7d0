# make demo   creates the environment, exports nano in both formats, runs it with MTP on and off in every runtime, shows
#             that all agree, and the speed, a chat and a tool call, in our runtime and in stock LiteRT-LM; ends with
#             calibration.json and report.html in build/demo
# make test   creates the environment and runs every test that needs no phone, GPU or full-size checkpoint, but the long
#             ones; under 30 minutes on 2 cores, and it ends with its ten slowest
# make test-all   those too: load runs, matrices of versions, full sizes
# make test-quick  the tests that are not slow: two minutes
# make check  test, lint and strict types

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
RECIPE ?= int8

.PHONY: demo test test-all test-quick programs lint check clean

demo: $(STAMP)
	$(BIN)/mtp-export --model nano --target tflite --recipe $(RECIPE) --output build/demo --force
	$(BIN)/mtp-export parity build/demo --limit 16 --threads 1
	$(BIN)/mtp-export --model nano --target onnx --recipe $(RECIPE) --output build/demo-onnx --force
	$(BIN)/mtp-export parity build/demo-onnx --limit 16 --threads 1
	$(BIN)/mtp-export run build/demo --chat 'What does the verb climb mean?'
	$(BIN)/mtp-export run build/demo --chat --tools examples/tools.json 'What is 231 plus 84?'
	$(BIN)/python examples/tools.py build/demo
	$(BIN)/python examples/litert_lm_chat.py build/demo/nano.litertlm
	$(BIN)/mtp-export calibrate build/demo
	$(BIN)/mtp-export report build/demo

PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=10

test: $(STAMP) programs
	$(PYTEST) -m 'not long'

test-all: $(STAMP) programs
	$(PYTEST)

test-quick: $(STAMP)
	$(PYTEST) -m 'not slow and not long'

# What tests of the device and of Kotlin call. Where it cannot be installed they are skipped, and say why.
PROGRAMS = openjdk-17-jre-headless npm iproute2
programs:
	@for p in java npm ip; do command -v $$p >/dev/null || missing=1; done; [ -z "$$missing" ] || \
	{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $(PROGRAMS) >/dev/null; } || \
	echo "no java, npm or ip, and apt-get cannot install them: some tests will be skipped"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# torch first and by itself: pip then keeps this build when others ask for it. TORCH_INDEX may name an index of CPU
# builds, which saves gigabytes of CUDA libraries that an export never uses.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[export,dev]'
	touch $@

clean:
	rm -rf build $(VENV)
