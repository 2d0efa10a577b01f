"""Artifacts: the library's answers in every scheme, plans that stop in time, no torch anywhere, and errors that say what to do."""
import ast
import copy
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tdmpc_opt_kit import runtime
from tdmpc_opt_kit.agent import PolicyAgent, make_agent
from tdmpc_opt_kit.checkpoint import load_world_model
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.data import Batch, Sampler, Store, collect
from tdmpc_opt_kit.export import agreement, export
from tdmpc_opt_kit.planner import PlanConfig, plan_config
from tdmpc_opt_kit.quantize import SCHEMES, quantize_
from tdmpc_opt_kit.runtime import ArtifactError, load
from tdmpc_opt_kit.tasks import MT30, task_set
from tdmpc_opt_kit.world_model import ModelConfig, WorldModel, policy_only
from conftest import ROOT

STUDENT = ROOT / "data" / "students" / "student.safetensors"


@pytest.fixture(scope="module")
def student(): return load_world_model(STUDENT).eval()


def real_states(model, tasks, folder, n):
    "Observations that the model's policy meets, and the model's own task numbers."
    store = collect(PolicyAgent(model, 0.2, torch.Generator().manual_seed(0)), tasks, 1, Store.open_or_create(folder), 0, max_steps=100, progress=False)
    b = Sampler(store, tasks, n, 1, balance="tasks", seed=1).sample()
    own = torch.tensor([model.tasks.index(t.name) if t.name in model.tasks else -1 for t in MT30])
    return b.obs[0], own[b.task]


@pytest.fixture(scope="module")
def artifact(student, tmp_path_factory): return export(student, tmp_path_factory.mktemp("artifact") / "student", "light", dict(policy=89.4), "data/students")


def make(num_q=2, task_dim=8, tasks="cup-catch,walker-walk,reacher-easy", seed=0, **kw):
    torch.manual_seed(seed)
    m = WorldModel(ModelConfig("custom", 32, 32, 16, 2, num_q, task_dim, **kw), tasks).eval()
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.02))
    return m


# ---------------------------------------------------------------- the library's answers

def close(far):
    assert far["policy"] < 1e-4 and far["value"] < 1e-4 and far["rounds"].all() and far["pieces"] < 1e-5
    assert np.median(far["mean"]) < 1e-4 and np.median(far["action"]) < 1e-4  # Others have kept another of two elites that are equal to the last digits


@pytest.mark.parametrize("plan", ["light", "published"])
def test_the_published_student_on_a_thousand_real_states(reference, tmp_path, plan):
    path, = (reference / "checkpoints").glob("*fp16.pt")
    model = load_world_model(path).eval()
    obs, task = real_states(model, "mt30", tmp_path / "store", 1000)
    n = 1000 if plan == "light" else 30
    far = agreement(export(model, tmp_path / "a", plan), model, obs[:n], task[:n])
    close(far)
    if n < 1000: assert agreement(tmp_path / "a", model, obs, task, plans=False)["policy"] < 1e-4


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num_q", [2, 5])
def test_every_scheme_says_what_the_library_says(tmp_path, name, num_q):
    m = make(num_q)
    g = torch.Generator().manual_seed(0)
    obs, task = torch.randn(200, 24, generator=g), torch.arange(200) % 3
    obs *= torch.arange(24) < torch.tensor([t.obs_dim for t in task_set(list(m.tasks))])[task][:, None]
    quantize_(m, SCHEMES[name], Batch(torch.randn(3, 64, 24, generator=g), torch.rand(2, 64, 6, generator=g) * 2 - 1, torch.zeros(2, 64, 1), torch.arange(64) % 3, torch.zeros(64, dtype=torch.long)))
    f = export(m, tmp_path / "a", "tiny")
    far = agreement(f, m, obs, task)
    if name in ("int8_dynamic", "int8_static"):  # An activation halfway between two integers may go either way
        got, want = load(f, "policy").act(obs.numpy(), task.tolist()), m.pi_params(m.encode(obs, task), task)[0].tanh().detach().numpy()
        assert np.median(np.abs(got - want).max(1)) < 1e-5 and far["policy"] < 0.2 and far["value"] < 0.1
    else: close(far)
    if "16" in name: assert (f / "weights.bin").stat().st_size < 2.2 * sum(p.numel() for n, p in m.named_parameters() if not n.startswith("target_")) + 10_000


@pytest.mark.parametrize("cfg", [PlanConfig(2, 2, 32, 4, 8, anchor=5.), PlanConfig(1, 1, 16, 0, 4), PlanConfig(3, 2, 32, 31, 8, temperature=2., discount=0.9)])
def test_settings_of_the_planner(tmp_path, cfg):
    m = make()
    close(agreement(export(m, tmp_path / "a", cfg), m, torch.randn(100, 24, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 3))


def test_models_of_one_task(tmp_path):
    m = make(task_dim=0, tasks="pendulum-swingup", obs_dim=3, action_dim=1)
    close(agreement(export(m, tmp_path / "a", "tiny"), m, torch.randn(60, 3), torch.zeros(60, dtype=torch.long)))
    assert load(tmp_path / "a").act(np.zeros(3), "pendulum-swingup").shape == (1,)
    with pytest.raises(ConfigError, match="does not name its task"): export(make(task_dim=0, tasks=None, obs_dim=3, action_dim=1), tmp_path / "b")


def test_sizes_of_the_student(student, tmp_path):
    "The whole folder beside the weights in it: what the graphs, the runtime and the manifest add."
    for name, most, acting in (("int8", 1.5e6, 0.35e6), ("int4", 0.85e6, 0.35e6), ("fp16", 2.9e6, 0.65e6)):
        m = copy.deepcopy(student)
        quantize_(m, SCHEMES[name])
        f = export(m, tmp_path / name, "light")
        assert (f / "weights.bin").stat().st_size < most and sum(x.stat().st_size for x in f.iterdir()) < most + 0.12e6
        p = export(policy_only(m), tmp_path / f"{name}-policy")
        assert (p / "weights.bin").stat().st_size < acting and sum(x.stat().st_size for x in p.iterdir()) < acting + 0.03e6 and load(p).manifest["modes"] == ["policy"]
        assert np.array_equal(load(p).act(np.zeros(24), "walker-walk"), load(f, "policy").act(np.zeros(24), "walker-walk"))


# ---------------------------------------------------------------- acting

def test_batches_seeds_and_warm_starts(artifact, student):
    obs, names = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32), [student.tasks[k] for k in (0, 3, 7, 3, 1)]
    policy = load(artifact, "policy")
    for o, n in zip(obs, names): o[policy.tasks[n]["obs_dim"]:] = 0
    together = policy.act(obs, names)
    for k, n in enumerate(names):
        t = policy.tasks[n]
        alone = policy.act(obs[k, :t["obs_dim"]], n)
        assert alone.shape == (t["action_dim"],) and np.abs(alone - together[k, :len(alone)]).max() < 1e-5 and not together[k, len(alone):].any()
    assert policy.act(np.zeros((0, 24)), "walker-walk").shape == (0, 6)
    a, b, c = (load(artifact, "plan", seed=s) for s in (1, 1, 2))
    first = [x.act(obs, names) for x in (a, b, c)]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])
    assert a.info["rounds"] == 3 and a._last[1].shape == (5, 3, 6)
    kept = a._last[1].copy()
    a.act(obs, names)
    assert not np.array_equal(kept, a._last[1])
    with pytest.raises(ArtifactError, match="reset"): a.act(obs[:2], names[:2])
    a.reset()
    assert a.act(obs[:2], names[:2]).shape == (2, 6)


def test_a_task_that_changes_forgets_its_plan(artifact, monkeypatch):
    a, seen = load(artifact, "plan"), []
    real = a._graphs["round"]
    a._graphs["round"] = SimpleNamespace(run=lambda names, feed: seen.append(feed["mean"].copy()) or real.run(names, feed), get_inputs=real.get_inputs)
    a.act(np.ones(24), "walker-walk")
    a.act(np.ones(24), "walker-walk")
    a.act(np.ones(24), "walker-stand")
    assert not seen[0].any() and seen[3].any() and not seen[6].any()


class Clock:
    "Time that passes only inside graphs."
    def __init__(self): self.now = 0.
    def perf_counter(self): return self.now


@pytest.mark.parametrize("budget, rounds", [(1, 0), (15, 1), (24, 2), (36, 3), (1000, 3), (None, 3)])
def test_a_budget_is_kept(artifact, monkeypatch, budget, rounds):
    clock, a = Clock(), load(artifact, "plan")
    monkeypatch.setattr(runtime, "time", clock)
    def slow(name, ms):
        real = a._graphs[name]
        def run(*args):
            clock.now += ms / 1000
            return real.run(*args)
        a._graphs[name] = SimpleNamespace(run=run, get_inputs=real.get_inputs, get_outputs=real.get_outputs)
    slow("start", 2), slow("round", 10), slow("policy", 0.1)
    obs, a.costs = np.full(24, 0.1), runtime.Costs()
    a.act(obs, "walker-walk")  # As `load` does: it has to know what things cost
    a.reset()
    got = a.act(obs, "walker-walk", budget)
    assert a.info["rounds"] == rounds and (budget is None or a.info["ms"] <= budget)
    if not rounds: assert np.array_equal(got, load(artifact, "policy").act(obs, "walker-walk"))


def test_a_hiccup_is_forgotten_and_a_budget_that_is_never_enough_not_tried(artifact, monkeypatch):
    b = load(artifact, "plan")  # It knows from loading what a plan costs, of a batch too
    b.act(np.full(24, 0.1), "walker-walk", 1e-3)
    assert b.info["rounds"] == 0 and b.costs.of("round", 4) == 4 * b.costs.of("round", 1) > 0
    clock, a, ms, runs = Clock(), load(artifact, "plan"), [2], [0]
    monkeypatch.setattr(runtime, "time", clock)
    real = a._graphs["round"]
    def run(*args):
        clock.now += ms[0] / 1000
        runs[0] += 1
        return real.run(*args)
    a._graphs["round"], a.costs = SimpleNamespace(run=run, get_inputs=real.get_inputs), runtime.Costs()
    obs, got = np.full(24, 0.1), []
    for k in range(8):
        ms[0] = 100 if k == 3 else 2
        a.act(obs, "walker-walk", 20 if k else None)
        got.append(a.info["rounds"])
    assert got == [3, 3, 3, 1, 0, 3, 3, 3]
    runs[0] = 0
    for _ in range(30): a.act(obs, "walker-walk", 1.5)
    assert runs[0] == 0 and a.info["rounds"] == 0


def test_episodes_of_a_batch_start_one_by_one(artifact):
    a, seen = load(artifact, "plan"), []
    real = a._graphs["round"]
    a._graphs["round"] = SimpleNamespace(run=lambda names, feed: seen.append(feed["mean"].copy()) or real.run(names, feed), get_inputs=real.get_inputs)
    for first in (False, [False, True, False]): a.act(np.ones((3, 24)), "walker-walk", first=first)
    assert seen[3][0].any() and not seen[3][1].any() and seen[3][2].any()


# ---------------------------------------------------------------- without torch

def test_the_runtime_imports_numpy_and_onnxruntime_alone(artifact):
    text = (artifact / "runtime.py").read_text()
    names = {a.name.split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names} | {n.module.split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


PLAY = """
import importlib.util, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from dm_control import suite

def play(act, reset, seed):
    env = suite.load("cartpole", "balance", task_kwargs=dict(random=seed))
    reset()
    step, total = env.reset(), 0.
    while not step.last():
        obs = np.concatenate([np.ravel(v) for v in step.observation.values()])
        action = act(obs)
        for _ in range(2):
            step = env.step(action)
            total += step.reward
            if step.last(): break
    return total

if __name__ == "__main__":
    assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("tdmpc_opt_kit") is None
    from runtime import load
    out = {}
    for mode in ("policy", "plan"):
        agent = load(sys.argv[1], mode)
        out[mode] = [play(lambda obs: agent.act(obs, "cartpole-balance"), agent.reset, s) for s in (0, 1)]
    out["memory"] = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))) // 1024
    print(json.dumps(out))
"""
ACT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import runtime, numpy as np
agent = runtime.load(sys.argv[1], "policy")
t = runtime.timings(agent, 2000)
print(json.dumps(dict(rate=t["rate"], memory=int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))) / 1024, torch="torch" in sys.modules)))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "A Python with numpy, onnxruntime and dm_control, and no torch."
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=True)
    want = [f"{n}=={importlib.metadata.version(n)}" for n in ("numpy", "onnxruntime", "mujoco", "dm_control")]
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *want], check=True, timeout=900)
    return folder / "bin" / "python"


def run_bare(bare, code, *args):
    r = subprocess.run([bare, "-I", "-c", code, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1])


def test_a_real_task_without_torch_to_the_same_return(bare, artifact, student):
    out = run_bare(bare, PLAY, artifact)
    scope = {"__name__": "play"}
    sys.argv, kept = ["", str(artifact)], sys.argv
    try: exec(PLAY, scope)
    finally: sys.argv = kept
    spec, = task_set("cartpole-balance")
    for mode in ("policy", "plan"):
        agent, first = make_agent(student, mode, 0, plan_config=plan_config("light")), [True]
        def act(obs):
            padded = torch.zeros(1, 24)
            padded[0, :len(obs)] = torch.tensor(obs)
            got = agent.act(padded, torch.tensor([spec.index]), torch.tensor([first[0]]))[0, :spec.action_dim].numpy()
            first[0] = False
            return got
        def reset(): first[0] = True
        meant = [scope["play"](act, reset, s) for s in (0, 1)]
        assert np.allclose(out[mode], meant, atol=0.05 if mode == "policy" else 5.), (mode, out[mode], meant)
        assert min(meant) > 950


def test_the_policy_is_a_small_process(bare, artifact):
    out = run_bare(bare, ACT, artifact)
    assert not out["torch"] and out["memory"] < 150 and out["rate"] > 1000  # 5,000 and more on a quiet machine: run_benchmark


def test_describing_and_timing_from_a_shell(bare, artifact):
    r = subprocess.run([bare, artifact / "runtime.py", "--decisions", "5"], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and "policy, 1 thread(s), 5 decisions: p50" in r.stdout and "3 rounds" in r.stdout, r.stderr
    r = subprocess.run([bare, artifact / "runtime.py", artifact / "nothing"], capture_output=True, text=True, timeout=120)
    assert r.returncode == 1 and r.stderr.startswith("runtime: ") and "there is no such file" in r.stderr
    r = subprocess.run([bare, artifact / "runtime.py", "--decisions", "0"], capture_output=True, text=True, timeout=120)
    assert r.returncode == 1 and "decisions must be" in r.stderr


def test_an_engine_that_dies_says_why():
    from tdmpc_opt_kit.engines import Worker
    w = Worker([sys.executable, "-c", "import sys; print('ready', flush=True); sys.exit('the reason')"], 1)
    w.ready()
    w.p.wait(20)
    with pytest.raises(RuntimeError, match="the reason"): w.ask(3)
    w.close()


# ---------------------------------------------------------------- what goes wrong

@pytest.fixture
def copied(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


@pytest.mark.parametrize("name", ["weights.bin", "policy.onnx", "round.onnx", "runtime.py"])
def test_damaged_files(copied, name):
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:-20])
    with pytest.raises(ArtifactError, match=f"{name}: truncated or damaged"): load(copied)
    (copied / name).write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
    with pytest.raises(ArtifactError, match=f"{name}: damaged"): load(copied)
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing"): load(copied)


def test_graphs_that_onnxruntime_cannot_open(copied):
    (copied / "policy.onnx").write_bytes(b"\0" * 50)
    with pytest.raises(ArtifactError, match="policy.onnx: onnxruntime .* does not open it"): load(copied, check=False)


@pytest.mark.parametrize("change, says", [(lambda m: m.update(version=7), "version 7"), (lambda m: m.update(format="x"), "not a manifest"), (lambda m: m.pop("tasks"), "damaged or edited"),
    (lambda m: m["tasks"][1].update(index=2), "damaged or edited"), (lambda m: m.update(files={}), "damaged or edited"), (None, "damaged")])
def test_manifests(copied, change, says):
    path = copied / "manifest.json"
    if change is None: path.write_text(path.read_text()[:100])
    else:
        m = json.loads(path.read_text())
        change(m)
        path.write_text(json.dumps(m))
    with pytest.raises(ArtifactError, match=says): load(copied)


@pytest.mark.parametrize("obs, task, kw, says", [
    (np.zeros(7), "walker-walk", {}, "has 24 numbers"), (np.zeros((2, 2, 24)), "walker-walk", {}, r"\[O\] or \[B, O\]"), (np.zeros(24), "walker-wlak", {}, "no task 'walker-wlak'"),
    (np.zeros(24), 77, {}, "no task 77"), (np.full(24, np.nan), "walker-walk", {}, "NaN"), ("up", "walker-walk", {}, "no array of numbers"), (np.zeros((3, 24)), ["walker-walk"] * 2, {}, "3 observations and 2 tasks"),
    (np.ones(24), "pendulum-swingup", {}, "another task's"), (np.zeros(24), True, {}, "no task True"), (np.zeros(24), 1.5, {}, "no task 1.5"), (np.zeros((2, 24)), np.eye(2), {}, "array of shape"),
    (np.zeros((2, 24)), ["walker-walk", None], {}, "no task None"), ([10**400] * 24, "walker-walk", {}, "no array of numbers"), (np.zeros(24, complex), "walker-walk", {}, "real numbers"),
    (np.full(24, 3.4e38), "walker-walk", {}, "answers NaN"), (np.zeros(24), "walker-walk", dict(budget_ms=True), "budget_ms"),
    (np.zeros(24), "walker-walk", dict(budget_ms=0), "budget_ms must be a positive number"), (np.zeros(24), "walker-walk", dict(budget_ms="5"), "budget_ms")])
def test_wrong_questions(artifact, obs, task, kw, says):
    for mode in ("policy", "plan"):
        with pytest.raises(ArtifactError, match=says): load(artifact, mode).act(obs, task, **kw)


def test_wrong_ways_to_load(artifact):
    with pytest.raises(ArtifactError, match="there is no mode 'dream'"): load(artifact, "dream")
    with pytest.raises(ArtifactError, match="threads"): load(artifact, threads=0)
    with pytest.raises(ArtifactError, match="no such file"): load(artifact / "x")
    with pytest.raises(ArtifactError, match="folder is needed"): load(None)
    with pytest.raises(ArtifactError, match="seed"): load(artifact, seed=-1)


def test_numbers_of_any_kind_and_a_bad_reading_that_is_over(artifact):
    a = load(artifact, "plan", np.int64(1))
    want = load(artifact, "plan").act(np.ones(24), "walker-walk")
    assert np.array_equal(a.act([1] * 24, a.tasks["walker-walk"]["index"], np.float32(1e6)), want)
    with pytest.raises(ArtifactError, match="answers NaN"): a.act(np.full(24, 3.4e38), np.int64(a.tasks["walker-walk"]["index"]))
    assert np.isfinite(a.act(np.ones(24), "walker-walk")).all()


def test_nothing_that_was_there_is_lost(tmp_path, monkeypatch):
    m = make()
    f = export(m, tmp_path / "a", "tiny")
    before = (f / "weights.bin").read_bytes()
    with torch.no_grad(): m.encoder[0].weight.add_(1.)
    export(m, f, "tiny")  # An artifact is replaced
    assert (f / "weights.bin").read_bytes() != before and not list(tmp_path.glob(".a*"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="no artifact"): export(m, tmp_path / "thesis")
    (tmp_path / "file").write_text("...")
    with pytest.raises(ConfigError, match="no artifact"): export(m, tmp_path / "file")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "..." and (tmp_path / "file").read_text() == "..."
    whole = json.loads((f / "manifest.json").read_text())
    assert set(whole["files"]) == {"policy.onnx", "plan.onnx", "start.onnx", "round.onnx", "weights.bin", "runtime.py"}
    broken = make()
    broken.inputs = {"dynamics.0": None}  # Rounds its inputs, but its weights are floats
    with pytest.raises(ConfigError, match="eight bits"): export(broken, f, "tiny")
    real = os.replace
    def fails(a, b):
        if Path(b) == f and "old" not in str(a): raise PermissionError("no")
        return real(a, b)
    monkeypatch.setattr("tdmpc_opt_kit.export.os.replace", fails)
    with pytest.raises(PermissionError): export(make(seed=3), f, "tiny")
    monkeypatch.undo()
    assert json.loads((f / "manifest.json").read_text()) == whole and load(f) and not list(tmp_path.glob(".a*"))
    (f / "notes.md").write_text("mine")  # Somebody's own file beside it, and a manifest of somebody else
    with pytest.raises(ConfigError, match="no artifact"): export(m, f, "tiny")
    (tmp_path / "thesis" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="no artifact"): export(m, tmp_path / "thesis")
    assert (f / "notes.md").exists() and (tmp_path / "thesis" / "thesis.tex").exists()


def test_what_the_manifest_says(tmp_path):
    f = export(make(), tmp_path / "a", PlanConfig(2, 2, 32, 4, 8, precision="bfloat16"), dict(policy=np.float32(3), other=float("nan")))
    m = runtime.read_manifest(f)
    assert m["planner"]["precision"] == "float32" and m["scores"] == {"policy": 3.0, "other": None} and m["scheme"] == "Float32" and m["opset"] == 21


def test_static_inputs_are_clipped_as_in_the_library(tmp_path):
    m, g = make(), torch.Generator().manual_seed(0)
    quantize_(m, SCHEMES["int8_static"], Batch(torch.randn(3, 64, 24, generator=g), torch.rand(2, 64, 6, generator=g) * 0.2 - 0.1, torch.zeros(2, 64, 1), torch.arange(64) % 3, torch.zeros(64, dtype=torch.long)))
    from tdmpc_opt_kit.export import Graph, Layers, model_weights
    import onnxruntime as ort
    g = Graph("g", model_weights(m))
    L = Layers(m, g, g.arg("task", "INT64", "B"))
    z, a = g.arg("z", "FLOAT", "B", 1, 16), g.arg("a", "FLOAT", "B", 1, 6)
    g.give("y", L.mlp("dynamics", z, a), "B", 1, 16)
    (tmp_path / "weights.bin").write_bytes(g.weights.data)
    (tmp_path / "g.onnx").write_bytes(g.proto().SerializeToString())
    zs, task = torch.rand(60, 16), torch.arange(60) % 3
    for sign in (1., -1.):
        acts = torch.full((60, 6), sign)
        got = ort.InferenceSession(tmp_path / "g.onnx").run(None, dict(task=task.numpy(), z=zs[:, None].numpy(), a=acts[:, None].numpy()))[0][:, 0]
        assert np.median(np.abs(got - m.next(zs, acts, task).detach().numpy()).max(1)) < 1e-5
