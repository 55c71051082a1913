# Each target first sets up the virtual environment .venv if it is missing or out of date.

VENV := .venv
RUN := $(VENV)/bin/python
# the oldest supported megatron-core and the newest Triton that was tried, in folders of their own;
# PYTHONPATH puts them before the installed releases
OLDER := $(VENV)/megatron-core-0.18.2
NEWER := $(VENV)/triton-3.9.0
# fla in a folder of its own, because Megatron imports parts of fla wherever it finds it
FLA := $(VENV)/fla
# the kernel tests that also run with the newest Triton, in at most three minutes on two cores
FITS := tests/kernels/test_compile.py::test_kernels_compile_and_fit
NEWER_TESTS := '$(FITS)[90-fp32-128]' '$(FITS)[90-bf16-128]' tests/kernels/test_launch.py tests/kernels/test_step.py \
	tests/kernels/test_hopper.py::test_every_form_compiles_and_fits
FLA_TESTS := tests/kernels/test_for_fla.py tests/hf/test_beside_fla.py tests/benchmarks/test_fla_model.py \
	tests/benchmarks/test_quality_fla.py
# one process runs all tests of a file, because they share fixtures; at most four such processes run at once
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: quickstart compare test lint clean

quickstart: $(VENV)/.installed  ## pretrain a small HGRN2 HybridModel on text, evaluate it, resume it, and write a sample
	$(RUN) examples/quickstart.py

compare: $(VENV)/.installed  ## train attention, HGRN2 and a hybrid on the same text and draw their losses
	$(RUN) examples/compare.py

test: $(VENV)/.installed $(OLDER) $(NEWER) $(FLA)  ## run the tests, parts of them with the other releases, and those of fla
	$(TEST)
	PYTHONPATH=$(OLDER) $(TEST) -m releases
	PYTHONPATH=$(NEWER) $(TEST) --dist load $(NEWER_TESTS)
	PYTHONPATH=$(FLA) $(TEST) --dist load $(FLA_TESTS)

lint: $(VENV)/.installed  ## run ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml setup.py kernels/pyproject.toml constraints.txt
	python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) && "$$python" -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable 'kernels[hf]' --editable '.[dev]'
	touch $@

$(OLDER): $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $@ megatron-core==0.18.2
	touch $@

$(NEWER): $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $@ triton==3.9.0
	touch $@

$(FLA): $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $@ fla-core==0.6.0 flash-linear-attention==0.6.0
	touch $@

clean:
	rm -rf $(VENV) quickstart compare
