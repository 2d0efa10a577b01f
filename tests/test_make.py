"""The make targets: set-up with stub commands on PATH (no network, no packages), the targets themselves in this environment."""
import json, os, re, shutil, signal, stat, subprocess, sys, urllib.request
from pathlib import Path
import pytest
from processes import ROOT, run

# ---------------------------------------------------------------- a machine of stubs

# A Python that answers what set-up asks and writes down what it was told to do. STUB_VERSION is its version, STUB_VENV=no lacks venv,
# STUB_PIP is the exit status of pip ("hang" never ends), STUB_GL=no cannot render.
PYTHON = r'''#!/bin/bash
case "$1 $2" in
    "-c import sys; print("*) echo "${STUB_VERSION:-3.12}" ;;
    "-c import venv"*) [ "${STUB_VENV:-yes}" = yes ] || [ -e "$STUB_HOME/python-venv-installed" ] ;;
    "-c import sys; sys.exit("*) ;;
    "-c import torch"*) echo "9.9.9 on the CPU" ;;
    "-c import mujoco"*) [ "${STUB_GL:-yes}" = yes ] ;;
    "-m venv") echo venv >>"$STUB_HOME/log"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; printf '#!%s\n' "$PWD/$3/bin/python" >"$3/bin/pip" ;;
    "-m pip")
        [ "$3" = --version ] && exit 0
        echo "${*:2}" >>"$STUB_HOME/log"
        [ "${STUB_PIP:-0}" != hang ] || sleep 60
        exit "${STUB_PIP:-0}" ;;
    "-m "*) echo "ran ${*:2}" ;;
esac
'''
APT_GET = r'''#!/bin/bash
case "$*" in *install*) ;; *) exit 0 ;; esac
for name in "$@"; do case $name in
    python3*-venv) : >"$STUB_HOME/python-venv-installed" ;;
    ffmpeg|chromium|g++) printf '#!/bin/bash\n' >"$STUB_HOME/bin/$name"; chmod +x "$STUB_HOME/bin/$name" ;;
esac; done
echo "apt ${*: -1}" >>"$STUB_HOME/log"
'''
TOOLS = ("bash sh make cat cksum dirname mkdir rm mv cp sed head tail grep sleep uname env printf expand flock date find awk true".split())

class Machine:
    "A copy of the repository's set-up, in a folder with a space, on a PATH that holds stubs and a few plain tools only."
    def __init__(self, home):
        self.home, self.bin, self.repo = home, home/"bin", home/"a clone"
        (self.bin).mkdir()
        for t in TOOLS:
            if (found := shutil.which(t)): (self.bin/t).symlink_to(found)
        shutil.copytree(ROOT/".ci", self.repo/".ci")
        for f in ("Makefile", "settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT/f, self.repo)
        self.stub("id", "#!/bin/bash\necho ${STUB_UID:-1000}\n")
        for name in ("ffmpeg", "chromium", "g++"): self.stub(name)

    def stub(self, name, text="#!/bin/bash\n", where=None):
        p = (where or self.bin)/name
        p.unlink(missing_ok=True)
        p.write_text(text)
        p.chmod(p.stat().st_mode | stat.S_IXUSR)
        return p

    def make(self, target="setup", cwd="/", **env):
        "Result of a make target, and what the stubs were told to do meanwhile."
        log = self.home/"log"
        log.unlink(missing_ok=True)
        clean = {k: None for k in os.environ if k.startswith(("MAKE", "MFLAGS", "TDMPC_", "PYTHON", "VIRTUAL_ENV", "BROWSER", "ARGS", "RUN", "CXX"))}
        r = run(["make", "-C", self.repo, *target.split()], cwd=cwd, timeout=60,
                **(clean | dict(PATH=str(self.bin), STUB_HOME=str(self.home), MAKEFLAGS="--no-print-directory") | env))
        return r, log.read_text().split("\n")[:-1] if log.exists() else []

PIP = "pip install -qq --no-input --disable-pip-version-check -e .[dev]"

@pytest.fixture
def machine(tmp_path):
    m = Machine(tmp_path)
    m.stub("python3", PYTHON)
    return m

def test_set_up_once_then_skipped_in_silence(machine):
    first, did = machine.make()
    assert did == ["venv", PIP] and "Set-up is done" in first.check()
    again, did = machine.make()
    assert (again.check(), did) == ("", []) and again.seconds < 5
    for target in ("lab", "test"):  # every target starts with set-up, and here it has nothing to do
        ran, did = machine.make(target)
        assert did == [] and "ran " in ran.check()

@pytest.mark.parametrize("target", ["setup", "distill", "test", "lab"])
def test_every_target_sets_up(machine, target):
    r, did = machine.make(target)
    assert did == ["venv", PIP] and (target == "setup" or "ran " in r.check())

def test_set_up_again_when_settings_change(machine):
    machine.make()
    for f in ("settings.ini", "setup.py"):
        with open(machine.repo/f, "a") as out: out.write("\n# changed\n")
        r, did = machine.make()
        assert did == [PIP] and "bringing .venv up to date" in r.check()  # the environment itself is kept
        assert machine.make()[1] == []

def test_interrupted_set_up_is_repaired(machine):
    r, did = machine.make(STUB_PIP="hang", until=lambda text: "Installing Python packages" in text)
    assert did[:1] == ["venv"] and r.code != 0 and not (machine.repo/".venv/.setup-done").exists()
    again, did = machine.make()
    assert did == ["venv", PIP] and "did not finish" in again.check()
    assert machine.make()[1] == []

def test_failed_pip_keeps_an_environment_that_worked(machine):
    machine.make()
    with open(machine.repo/"settings.ini", "a") as out: out.write("\n# changed\n")
    r, did = machine.make(STUB_PIP="1")
    assert r.code != 0 and did == [PIP] and "pip could not install" in r.output
    assert machine.make()[1] == [PIP]  # tried again, in the same environment

def test_failed_first_pip_starts_anew(machine):
    r, did = machine.make("distill", STUB_PIP="1")
    assert r.code != 0 and "pip could not install" in r.output and "ran" not in r.output
    assert machine.make()[1] == ["venv", PIP]

def test_broken_or_moved_environment_is_made_anew(machine):
    machine.make()
    (machine.repo/".venv/bin/python").unlink()
    r, did = machine.make()
    assert did == ["venv", PIP] and "does not work" in r.check()
    shutil.copytree(machine.repo, machine.home/"moved")
    machine.repo = machine.home/"moved"
    r, did = machine.make()
    assert did == ["venv", PIP] and "does not work" in r.check()

def test_two_at_once(machine):
    "The second waits for the first and finds everything done."
    if not shutil.which("flock"): machine.stub("flock")
    machine.stub("python3", PYTHON.replace('"-m pip")', '"-m pip")\n        sleep 2'))
    env = dict(PATH=str(machine.bin), STUB_HOME=str(machine.home))
    both = [subprocess.Popen(["make", "-C", machine.repo, "setup"], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    said = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    if shutil.which("flock"):
        assert (machine.home/"log").read_text().split("\n")[:-1] == ["venv", PIP]
        assert sum("waiting for it" in s for s in said) == 1

def test_environment_of_ones_own(machine):
    own = machine.home/"own"
    (own/"bin").mkdir(parents=True)
    machine.stub("python", PYTHON, own/"bin")
    r, did = machine.make("test", TDMPC_VENV=str(own))
    assert did == [] and "ran pytest" in r.check() and not (machine.repo/".venv").exists()
    r, did = machine.make("test", TDMPC_VENV=str(machine.home/"nowhere"))
    assert r.code != 0 and "nowhere" in r.output

# ---------------------------------------------------------------- which Python

def test_a_python_that_does_not_run_is_passed_over(machine):
    machine.stub("python3", "#!/bin/bash\necho 'pyenv: python3: command not found' >&2\nexit 127\n")
    machine.stub("python3.12", PYTHON)
    r, did = machine.make()
    assert did == ["venv", PIP] and "python3.12" in r.check()

def test_a_named_python_comes_first(machine):
    own = machine.stub("mine", PYTHON.replace("3.12", "3.11"))
    r, did = machine.make(PYTHON=str(own))
    assert "Python 3.11" in r.check() and "mine" in r.output

def test_a_named_python_of_another_version(machine):
    old = machine.stub("old", PYTHON.replace("3.12", "3.9"))
    r, did = machine.make(PYTHON=str(old))
    assert "old is Python 3.9" in r.check() and "taking python3" in r.output and did == ["venv", PIP]

def test_no_python(machine):
    machine.stub("python3", PYTHON.replace("3.12", "3.13"))
    r, did = machine.make("distill")
    assert r.code != 0 and did == []
    assert "Python 3.11 or 3.12 is needed" in r.output and "python3 is Python 3.13" in r.output and "make PYTHON=" in r.output
    assert not (machine.repo/".venv").exists()

def test_python_without_venv(machine):
    r, did = machine.make(STUB_VENV="no")
    assert r.code != 0 and did == [] and "sudo apt-get install python3.12-venv" in r.output

def test_python_without_venv_where_it_can_be_installed(machine):
    machine.stub("apt-get", APT_GET)
    r, did = machine.make(STUB_VENV="no", STUB_UID="0")
    assert did == ["apt python3.12-venv", "venv", PIP] and "python3-venv" in r.check()

# ---------------------------------------------------------------- system packages

def test_system_packages_missing(machine):
    "What cannot be installed is named with its consequence, and the run goes on."
    for name in ("ffmpeg", "chromium", "g++"): (machine.bin/name).unlink()
    r, did = machine.make("distill", STUB_GL="no")
    out = r.check()
    assert did == ["venv", PIP] and "ran papermill" in out
    for said in ("g++ is missing", "several times slower", "ffmpeg is missing", "No Chromium or Chrome", "without videos", "sudo apt-get install --no-install-recommends g++ ffmpeg chromium"): assert said in out
    if sys.platform == "linux": assert "Neither EGL nor OSMesa" in out and "libegl-mesa0" in out
    assert machine.make(STUB_GL="no")[0].check() == ""  # told once

def test_system_packages_missing_in_ci(machine):
    (machine.bin/"ffmpeg").unlink()
    r, did = machine.make(TDMPC_SETUP_STRICT="1")
    assert r.code != 0 and "ffmpeg" in r.output and not (machine.repo/".venv/.setup-done").exists()

@pytest.mark.parametrize("how", ["root", "sudo"])
def test_system_packages_are_installed_where_possible(machine, how):
    for name in ("ffmpeg", "chromium", "g++"): (machine.bin/name).unlink()
    machine.stub("apt-get", APT_GET)
    if how == "sudo": machine.stub("sudo", '#!/bin/bash\n[ "$1" = -n ] && shift\nexec "$@"\n')
    r, did = machine.make(STUB_UID="0" if how == "root" else "1000")
    assert did == ["venv", PIP, "apt g++", "apt ffmpeg", "apt chromium"] and "missing" not in r.check()

def test_system_packages_that_apt_does_not_have(machine):
    (machine.bin/"chromium").unlink()
    machine.stub("apt-get", "#!/bin/bash\necho \"E: Package 'chromium' has no installation candidate\"\nexit 100\n")
    r, did = machine.make(STUB_UID="0", TMPDIR=str(machine.home))
    assert "no installation candidate" in r.check() and "No Chromium or Chrome" in r.output

# ---------------------------------------------------------------- the targets themselves

OWN = dict(TDMPC_VENV=sys.prefix, MAKEFLAGS="--no-print-directory", RUN=None, ARGS=None)

@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "What git would hand out of this working tree, without its history."
    to = tmp_path_factory.mktemp("clone")/"tdmpc_opt_kit"
    leave = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ipynb_checkpoints", "*.egg-info", "upstream", "store*")
    shutil.copytree(ROOT, to, ignore=leave, symlinks=True)
    return to

def test_help(clone):
    out = run(["make", "-f", clone/"Makefile"], cwd="/", **OWN).check()
    for target in ("distill", "test", "lab", "setup", "clean"): assert re.search(rf"^  make {target}\s+\w", out, re.M)
    assert not (clone/".venv").exists()

@pytest.fixture(scope="module")
def distilled(clone):
    "`make distill` at tiny, once for all tests that look at what it leaves."
    r = run(["make", "-C", clone, "distill", "RUN=runs/made", "ARGS=-p seed 3"], cwd="/", TDMPC_PRESET="tiny", PYTHONPATH=str(clone), **OWN)
    r.check()
    return clone/"runs/made", r

def test_distill(distilled):
    folder, r = distilled
    assert "runs/made/report.json" in r.output.strip().splitlines()[-1]
    for f in ("run_distill.ipynb", "config.json", "versions.json", "metrics.jsonl", "report.json", "checkpoints"): assert (folder/f).exists(), f
    assert json.loads((folder/"config.json").read_text())["seed"] == 3

def test_distill_leaves_pictures(distilled):
    "Under papermill the curves are pictures, the film is in the notebook, and it can be sent by mail."
    path = distilled[0]/"run_distill.ipynb"
    nb = json.loads(path.read_text(encoding="utf-8"))
    kinds = [k for c in nb["cells"] for o in c.get("outputs", []) for k in o.get("data", {})]
    assert kinds.count("image/png") >= 3 and "application/vnd.jupyter.widget-view+json" not in kinds
    assert "widgets" not in nb["metadata"]
    assert ("<video" in path.read_text(encoding="utf-8")) == (distilled[0]/"video.mp4").exists()
    assert path.stat().st_size < 2_000_000

def test_distill_report(distilled):
    "The keys that others read: each agent and mode has its numbers, or is null with a reason."
    report = json.loads((distilled[0]/"report.json").read_text())
    assert report["train"]["steps"] > 0 and report["train"]["batch_size"] > 0 and report["tasks"]
    for agent in ("teacher", "student", "scratch", "student_fp16"):
        for mode in ("plan", "policy"):
            score = report["scores"][agent][mode]
            if score is None: assert "reason" in json.dumps(report), f"{agent} {mode} is null without a reason"
            elif "reason" in score and score.get("mean") is None: assert score["reason"]
            else: assert score["low"] <= score["mean"] <= score["high"] and score["episodes"] > 0

def test_distill_stops_at_an_unknown_parameter(clone):
    r = run(["make", "-C", clone, "distill", "RUN=runs/wrong", "ARGS=-p stepz 5"], cwd="/", TDMPC_PRESET="tiny", PYTHONPATH=str(clone), **OWN)
    assert r.code != 0 and re.search(r"^ConfigError: .*'stepz'.*'steps'", r.output, re.M), r.output[-3000:]
    assert "Done." not in r.output and not (clone/"runs/wrong/metrics.jsonl").exists()

def test_lab(clone):
    "JupyterLab comes up with the notebooks in sight, and ends when told to."
    url, seen = r"http://127\.0\.0\.1:\d+/lab/tree/nbs/00_start_here\.ipynb\?token=\w+", []
    def look(text):
        if not (m := re.search(url, text)): return False
        base, token = m[0].split("/lab/tree/nbs/00_start_here.ipynb?token=")
        listing = json.load(urllib.request.urlopen(f"{base}/api/contents/nbs?token={token}", timeout=30))
        seen.extend(f["name"] for f in listing["content"])
        return True
    config = {f"JUPYTER_{k}_DIR": str(clone.parent/f"jupyter-{k}") for k in ("CONFIG", "DATA", "RUNTIME")}
    args = "ARGS=--no-browser --ip=127.0.0.1 --port=0 --ServerApp.port_retries=0"
    r = run(["make", "-C", clone, "lab", args], until=look, sig=signal.SIGTERM, timeout=120, **OWN, **config)
    assert "00_config.ipynb" in seen and "run_distill.ipynb" in seen, r.output[-3000:]
    assert r.code != 124 and not r.left, r.output[-3000:]

def test_clean(clone):
    (clone/"nbs/__pycache__").mkdir(exist_ok=True)
    (clone/"runs").mkdir(exist_ok=True)
    run(["make", "-C", clone, "clean"], **OWN).check()
    assert not (clone/"nbs/__pycache__").exists() and (clone/"runs").exists() and (clone/"nbs/00_config.ipynb").exists()
