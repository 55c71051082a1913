# Every target sets up what it needs in .venv, once, then does its job.

VENV := .venv
RUN := $(VENV)/bin/python
# the oldest release that is supported, found before the one that is installed
OLDER := $(VENV)/megatron-core-0.18.2
# a file's tests share what they set up; real runs wait for each other more than for the cores
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: quickstart compare test lint clean

quickstart: $(VENV)/.installed  ## pretrain a small HGRN2 GPT on real text, evaluate, resume, sample
	$(RUN) examples/quickstart.py

compare: $(VENV)/.installed  ## attention, HGRN2 and the hybrid on the same bytes, in one picture
	$(RUN) examples/compare.py

test: $(VENV)/.installed $(OLDER)
	$(TEST)
	PYTHONPATH=$(OLDER) $(TEST) -m releases

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) && "$$python" -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDER): $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $@ megatron-core==0.18.2
	touch $@

clean:
	rm -rf $(VENV) quickstart compare
