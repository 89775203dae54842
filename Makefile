# make run, make test: everything else is optional. Needs python >= 3.10, pip and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two processes on two cores, which do not wait for each other.
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# OpenMP's threads wait without spinning: on a machine that others use too, spinning threads keep each other from working.
export OMP_WAIT_POLICY ?= PASSIVE

# In .venv only: papermill, with a run folder for run notebooks without an output path; papermill itself once this project is uninstalled.
define PAPERMILL
#!$(CURDIR)/$(BIN)/python
import sys
try:
    from datasel_wb.command import refused
    if refused(): sys.exit(1)
    from datasel_wb.runs import papermill_main as main
except ImportError:
    from papermill.__main__ import papermill as main
sys.exit(main())
endef
export PAPERMILL

# In .venv only: nbdev_clean, and nothing of widgets; a stored view names a model of a kernel that is gone.
define CLEAN
#!$(CURDIR)/$(BIN)/python
import nbdev.clean
plain = nbdev.clean.clean_nb
def clean_nb(nb, *rules):
    plain(nb, *rules)
    nb["metadata"].pop("widgets", None)
    for output in (o for cell in nb["cells"] for o in cell.get("outputs", [])):
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
nbdev.clean.clean_nb = clean_nb
nbdev.clean.nbdev_clean()
endef
export CLEAN

.PHONY: run test test-notebooks test-files lab docs check parameters clean

run: $(READY)  ## DDS on the bundled digits: result table and run folder
	$(BIN)/papermill nbs/run_dds.ipynb

test: test-notebooks test-files  ## the notebooks as tests, then what a notebook cannot test well

test-notebooks: $(READY)
	$(QUIET) $(BIN)/python tests/longest.py 2

test-files: $(READY)
	$(QUIET) $(BIN)/pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations 25

lab: $(READY)  ## JupyterLab, kernel ready
	$(BIN)/jupyter lab nbs

docs: $(READY)  ## the docs site, in _docs/; look at it: python -m http.server -d _docs
	$(BIN)/python docs/build.py

parameters: $(READY)  ## write the parameter cells of the run notebooks, and the file of the papermill command, from the settings
	$(BIN)/python -m datasel_wb.experiments

check: $(READY)  ## what a change must pass: export, clean, no difference left, tests
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python -m datasel_wb.experiments --check
	git diff --exit-code -- nbs datasel_wb
	$(MAKE) test

clean:  ## remove the environment
	rm -rf .venv

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,workbench,text,hf,lightning]'
	mkdir -p .venv/share/jupyter/voila/templates .venv/etc/jupyter
	cp -r nbs/voila/template .venv/share/jupyter/voila/templates/datasel
	cp nbs/voila/voila.json .venv/etc/jupyter/
	$(BIN)/python -m ipykernel install --sys-prefix --env OMP_WAIT_POLICY PASSIVE > /dev/null
	echo "$$PAPERMILL" > $(BIN)/papermill
	echo "$$CLEAN" > $(BIN)/nbdev_clean
	touch $(READY)
