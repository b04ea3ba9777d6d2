# Everything runs inside .venv, which `make setup` makes; each target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COLLECTION ?= python-docs
MODEL ?= runs/demo/teacher

.PHONY: setup demo test lint proto bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[cpu,train,eval,dev]"
	touch $@

demo: $(READY)
	$(BIN)/rkd demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proto: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . \
		-I "$$($(BIN)/python -c 'from google.rpc import status_pb2; print(status_pb2.__file__.rpartition("/google/")[0])')" --python_out=. --grpc_python_out=. \
		--mypy_out=. --mypy_grpc_out=. protos/dense/retrieval/v1/retrieval.proto

bench: demo
	$(BIN)/python benchmarks/encode.py --collection $(COLLECTION)
	$(BIN)/python benchmarks/score_pairs.py --model $(MODEL) --collection $(COLLECTION)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
