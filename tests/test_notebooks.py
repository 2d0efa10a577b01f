"""Every notebook is executed: all of them by `nbdev_test`, those that people run also by papermill from the repository's root.

Each is a process of its own with a time limit, two at once where there are two cores, and must leave no process behind.
`make distill` is the papermill run of run_distill, see test_make.py.
"""
import ast, json, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from processes import ROOT, STOP, run

NAMES = sorted((p.stem for p in (ROOT/"nbs").glob("*.ipynb") if not p.name.startswith(("_", "."))), key=lambda n: (n[0].isdigit(), n))  # long ones first
RUNS = [n for n in NAMES if n.startswith("run_")]
RUNNABLE = [n for n in NAMES if n.startswith(("run_", "explore_")) and n != "run_distill"]
BIN = Path(sys.executable).parent
WORKERS = int(os.environ.get("TDMPC_TEST_WORKERS", min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())))
ENV = dict(TDMPC_PRESET="tiny", PYTHONPATH=str(ROOT), JUPYTER_PREFER_ENV_PATH="1")
if WORKERS > 1: ENV |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

def parameters(name) -> list:
    "The names that the cell tagged `parameters` assigns."
    cells = json.loads((ROOT/f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return [t.id for n in ast.parse(source).body if isinstance(n, (ast.Assign, ast.AnnAssign))
            for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)]

def nbdev(name, tmp):
    flags = [f for f, on in (("slow", os.environ.get("TDMPC_SLOW") == "1"), ("cuda", has_gpu())) if on]
    return run([BIN/"nbdev_test", "--path", f"nbs/{name}.ipynb", *(["--flags", " ".join(flags)] if flags else [])], **ENV)

def papermill(name, tmp, *args):
    out = ["-p", "out_dir", tmp/"run"] if "out_dir" in parameters(name) else []
    return run([BIN/"papermill", "--no-progress-bar", f"nbs/{name}.ipynb", tmp/f"{name}.ipynb", *out, *args], **ENV)

def misspelt(name, tmp): return papermill(name, tmp, "-p", "sede", 3)

def has_gpu():
    import torch
    return torch.cuda.is_available()

@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    "Test name -> future of its process; the chosen tests of this file start in their order, as many at once as there are workers."
    chosen = {i.nodeid: i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")}
    pool = ThreadPoolExecutor(WORKERS)
    try: yield {i: pool.submit(p["job"], p["name"], tmp_path_factory.mktemp(p["name"])) for i, p in chosen.items() if callable(p["job"])}
    finally:
        STOP.set()
        pool.shutdown(cancel_futures=True)
        STOP.clear()

@pytest.fixture
def result(results, request): return results[request.node.nodeid].result()

def each(job, names):
    return pytest.mark.parametrize(("job", "name"), [(job, n) for n in names], ids=names)

@each(nbdev, NAMES)
def test_nbdev(job, name, result):
    assert "Success." in result.check(), result.output

@each(papermill, RUNNABLE)
def test_papermill(job, name, result): result.check()

@each(misspelt, RUNS)
def test_misspelt_parameter(job, name, result):
    "papermill itself only warns, so the notebook has to stop, before any work, with the wrong name and the right one."
    assert result.code != 0, f"{name} ran on with an unknown parameter"
    said = [l for l in result.output.splitlines() if l.startswith("ConfigError: ")]
    assert said and "'sede'" in said[-1] and "'seed'" in said[-1], result.output[-3000:]
    assert result.seconds < 60 and not result.left

def test_there_are_notebooks(): assert {"00_config", "run_distill"} <= set(NAMES)
