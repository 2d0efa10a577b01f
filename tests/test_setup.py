"""The package and its notebooks fit together: metadata, exported modules, import order, the structure of every notebook."""
import ast, dataclasses, filecmp, json, os, re, runpy, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest, setuptools

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NBS = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT/"nbs").glob("*.ipynb")) if not p.name.startswith(("_", "."))}
START = "00_start_here"  # The front door: first in the list of files, and no module
LIBRARY = [n for n in NBS if n[0].isdigit() and n != START]
RUNNABLE = [n for n in NBS if n.startswith(("run_", "explore_")) or n == START]
each = lambda names: pytest.mark.parametrize("name", names)

def source(cell): return "".join(cell["source"])
def code(name): return [c for c in NBS[name]["cells"] if c["cell_type"] == "code"]

def tree(cell):
    "The syntax tree of a code cell without its magics."
    from IPython.core.inputtransformer2 import TransformerManager
    return ast.parse(TransformerManager().transform_cell(source(cell)))

def module_of(name):
    "What the cell `#| default_exp` says, None without one."
    return next((m[1] for c in code(name) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))), None)

def imported(name) -> set:
    "Modules of the kit that a notebook imports anywhere."
    found = set()
    for node in (n for c in code(name) for n in ast.walk(tree(c))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "tdmpc_opt_kit": names = [f"tdmpc_opt_kit.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom): names = [node.module or ""]
        else: continue
        found |= {n.split(".")[1] for n in names if n.startswith("tdmpc_opt_kit.")}
    return found

# ---------------------------------------------------------------- packaging

@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]

@pytest.fixture(scope="module")
def packaging():
    "What setup.py hands to setuptools."
    said = {}
    original, setuptools.setup = setuptools.setup, lambda **kw: said.update(kw)
    try: runpy.run_path(str(ROOT/"setup.py"))
    finally: setuptools.setup = original
    return said

@pytest.fixture(scope="module")
def pyproject():
    import tomllib
    return tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))

def test_setup_equals_settings(packaging, settings):
    import tdmpc_opt_kit
    assert packaging["name"] == settings["lib_name"] == settings["lib_path"] == tdmpc_opt_kit.__name__
    assert packaging["version"] == settings["version"] == tdmpc_opt_kit.__version__
    assert packaging["packages"] == [settings["lib_name"]]
    assert packaging["description"] == settings["description"]
    assert packaging["install_requires"] == settings["requirements"].split()
    assert packaging["extras_require"] == dict(dev=settings["dev_requirements"].split())
    assert packaging["python_requires"].startswith(f">={settings['min_python']},")
    assert packaging.get("entry_points", {}).get("console_scripts", []) == settings["console_scripts"].split()

def test_python_versions(packaging):
    from packaging.specifiers import SpecifierSet
    spec = SpecifierSet(packaging["python_requires"])
    said = [c.rsplit(" ", 1)[1] for c in packaging["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert said == [f"3.{m}" for m in range(8, 20) if f"3.{m}.0" in spec] == ["3.11", "3.12"]

def test_pyproject_leaves_all_to_setup(packaging, pyproject):
    project = pyproject["project"]
    assert set(project) == {"name", "dynamic"} and project["name"] == packaging["name"]
    assert pyproject["tool"]["setuptools"]["packages"] == packaging["packages"]
    assert pyproject["build-system"]["build-backend"] == "setuptools.build_meta"
    keys = dict(long_description="readme", author="authors", url="urls", python_requires="requires-python", install_requires="dependencies",
                extras_require="optional-dependencies", entry_points="entry-points")
    given = {keys.get(k, k) for k in packaging} - {"name", "packages", "include_package_data", "zip_safe", "author_email", "long_description_content_type"}
    assert given <= set(project["dynamic"])

def test_installed_packages_fit(packaging):
    "A stale environment explains other failures, so it is told first."
    from importlib.metadata import PackageNotFoundError, version
    from packaging.requirements import Requirement
    wrong = []
    for r in map(Requirement, packaging["install_requires"] + packaging["extras_require"]["dev"]):
        try: v = version(r.name)
        except PackageNotFoundError: v = None
        if v is None or not r.specifier.contains(v, prereleases=True): wrong.append(f"{r}, but {v} is installed")
    assert not wrong, f"run `make setup`: {wrong}"

def test_nothing_names_a_registry():
    "pip's own configuration decides where packages come from: the same command serves machines with and without a GPU."
    files = [ROOT/f for f in ("settings.ini", "setup.py", "pyproject.toml", "Makefile", ".ci/setup.sh", ".ci/run")]
    for f in files: assert not re.search(r"index-url|find-links|download\.pytorch|pypi\.org|https?://(?!localhost|github\.com/tdmpc-opt-kit)", f.read_text()), f.name

# ---------------------------------------------------------------- notebooks and modules

@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned."
    copy = tmp_path_factory.mktemp("export")
    for f in ("settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT/f, copy)
    (copy/"nbs").mkdir()
    for n in NBS: shutil.copy(ROOT/f"nbs/{n}.ipynb", copy/"nbs")
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([BIN/tool], cwd=copy, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(copy)))
        assert done.returncode == 0, done.stdout + done.stderr
    return copy

def test_modules_equal_notebooks(made_again):
    names = [{p.name for p in (root/"tdmpc_opt_kit").glob("*.py")} - {"__init__.py"} for root in (ROOT, made_again)]  # that one is written by hand
    assert names[0] == names[1], "modules without a notebook, or notebooks never exported"
    _, wrong, unreadable = filecmp.cmpfiles(ROOT/"tdmpc_opt_kit", made_again/"tdmpc_opt_kit", names[0], shallow=False)
    assert not wrong + unreadable, f"run nbdev_export: {wrong + unreadable} differ from their notebooks"

def test_notebooks_are_clean(made_again):
    wrong = [n for n in NBS if not filecmp.cmp(ROOT/f"nbs/{n}.ipynb", made_again/f"nbs/{n}.ipynb", shallow=False)]
    assert not wrong, f"run nbdev_clean: {wrong}"

def test_modules_are_unique():
    modules = [module_of(n) for n in LIBRARY]
    assert len(set(modules)) == len(modules)
    numbers = [n[:2] for n in LIBRARY]
    assert len(set(numbers)) == len(numbers)

@each(LIBRARY)
def test_import_order(name):
    "A notebook imports only from lower numbers, so the numbers are a reading order."
    number = {module_of(n): n for n in LIBRARY}
    unknown = imported(name) - set(number) - {"__version__"}
    assert not unknown, f"{name} imports {unknown}, which no notebook defines"
    wrong = [m for m in imported(name) if number.get(m, "") > name]
    assert not wrong, f"{name} imports {wrong} from higher numbers"

@each(RUNNABLE)
def test_imports_exist(name): assert imported(name) <= {module_of(n) for n in LIBRARY}

@each(list(NBS))
def test_structure(name):
    nb, cells = NBS[name], NBS[name]["cells"]
    title = next((source(c) for c in cells if c["cell_type"] == "markdown"), "")
    assert re.match(r"# \S.*\n\n?> \S", title), "the first markdown cell is a title and a one-line `> summary`"
    if name in LIBRARY:
        assert re.fullmatch(r"\d\d_[a-z0-9_]+", name) and module_of(name) == name[3:], "default_exp is the name without its number"
        assert any(re.match(r"#\|\s*export\b", source(c)) for c in code(name)), "a library notebook exports something"
    else:
        assert name == START or re.fullmatch(r"(run|explore)_[a-z0-9_]+", name), "numbered, run_ or explore_"
        assert module_of(name) is None and not any(re.match(r"#\|\s*export\b", source(c)) for c in code(name))
    assert nb["nbformat"] == 4 and nb["metadata"]["kernelspec"]["name"] == "python3"
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) <= 1
    ids = [c["id"] for c in cells]
    assert len(set(ids)) == len(ids), "cell ids appear in the modules, so each is needed once"

@each(list(NBS))
def test_outputs(name):
    "Outputs are small, show no error, and tell nothing of the machine that made them."
    assert "widgets" not in NBS[name]["metadata"], "saved widget states take megabytes"
    for i, c in enumerate(code(name)):
        for out in c["outputs"]:
            text = json.dumps(out, ensure_ascii=False)
            assert len(text.encode()) <= 300_000, f"output of code cell {i} has {len(text.encode()):,} bytes"
            assert out["output_type"] != "error", f"code cell {i} shows an error"
            assert not re.search(r"/(work|root|home|Users)/\w|/tmp/ipykernel", text), f"output of code cell {i} shows a path of the machine that ran it"
        assert not re.search(r"/(work|root|home|Users)/\w", source(c)), f"code cell {i} names a path of one machine"

# ---------------------------------------------------------------- parameters

def assigned(cell) -> list:
    "Names that a cell assigns at its top level, in order."
    return [t.id for n in tree(cell).body if isinstance(n, (ast.Assign, ast.AnnAssign))
            for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)]

class Asked(Exception): "Raised in place of the check, with the names that the notebook would accept."

def known(name, monkeypatch) -> set:
    "The names that the notebook hands to `run_parameters`: its cells run up to that call."
    import tdmpc_opt_kit.config as config
    def ask(ns, known, notebook=""):
        assert notebook == name, f"the message should name {name}"
        raise Asked({f.name for f in dataclasses.fields(known)} if dataclasses.is_dataclass(known) else set(known))
    monkeypatch.setattr(config, "run_parameters", ask)
    monkeypatch.chdir(ROOT)
    ns = dict(__name__="__main__")
    try:
        for c in code(name): exec(compile(tree(c), name, "exec"), ns)
    except Asked as asked: return asked.args[0]
    raise AssertionError(f"{name} never calls run_parameters(globals(), known, {name!r})")

@each([n for n in RUNNABLE if n.startswith("run_")])
def test_parameters(name, monkeypatch):
    cells = [c for c in code(name) if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1, "one code cell is tagged `parameters`"
    names = assigned(cells[0])
    assert {"preset", "out_dir", "seed", "device"} <= set(names), "what every run notebook has"
    assert len(set(names)) == len(names)
    assert set(names) == known(name, monkeypatch), "each parameter is a field of the config, and each field a parameter"
    before = code(name)[:code(name).index(cells[0])]
    assert not any(assigned(c) for c in before), "run_parameters takes every plain value for a parameter, so nothing is assigned before them"
