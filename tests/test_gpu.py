"""Plans and updates as recordings: on a CPU by the compiler's front end, on a GPU (marked cuda) against the CPU; and every job of `gpu_jobs` with the smallest settings."""
import copy, json, os, subprocess, sys, warnings
from pathlib import Path

import pytest
import torch

from tdmpc_opt_kit import gpu, gpu_jobs, planner
from tdmpc_opt_kit.agent import TaskModels
from tdmpc_opt_kit.checkpoint import load_world_model
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.distill import RECIPES, Distill
from tdmpc_opt_kit.gpu import DeviceBatch, GraphLearner, _like
from tdmpc_opt_kit.gpu_jobs import CHECKS, main, pack, unpack, way
from tdmpc_opt_kit.layers import plain_layers
from tdmpc_opt_kit.planner import GraphRollouts, PlanConfig, PlanGraph, PlanNoise, draw_noise, plan, plan_config
from tdmpc_opt_kit.train import Learner, TrainConfig
from tdmpc_opt_kit.world_model import WorldModel, model_size

CPU = torch.device("cpu")
ON_CPU = ["data", "plan, recorded", "plan, one head", "plan, bfloat16", "plan follows the weights", "agent", "update, scratch", "update, best", "update, recorded", "update, compiled"]


@pytest.mark.parametrize("name", ON_CPU)
def test_checks_on_the_cpu(name):
    f, kw, how = CHECKS[name]
    told = f(CPU, **kw)
    if name not in ("data", "agent"): assert "compiled" in told["how"], told


@pytest.mark.cuda
@pytest.mark.parametrize("name", CHECKS)
def test_checks_on_a_gpu(name):
    f, kw, how = CHECKS[name]
    with way(how): told = f(torch.device("cuda"), **kw)
    if name != "data": assert ("compiled" if how == "auto" else "recorded") in told["how"], told


def batch(n, seed=0, tasks=30):
    g = torch.Generator().manual_seed(seed)
    return DeviceBatch(torch.randn(4, n, 24, generator=g), torch.rand(3, n, 6, generator=g) * 2 - 1, torch.rand(3, n, 1, generator=g), torch.arange(n) % tasks, torch.arange(n)), g


@pytest.mark.parametrize("recipe", [*RECIPES, "scratch"])
@pytest.mark.parametrize("num_q", [1, 2, 5])
def test_update_is_the_learners(recipe, num_q):
    "Weights, optimizer states and numbers after three updates with given noise; embeddings longer than 1 are scaled on the way."
    w = dict(RECIPES, scratch=dict(reward_coef=0., policy_coef=0., pi_coef=1.))[recipe]
    model, teacher = gpu_jobs._made(num_q, num_q=num_q), TaskModels(gpu_jobs._made(9))
    model.task_emb.weight.data.mul_(20)
    here, there = (Learner(copy.deepcopy(model), TrainConfig(dropout=0., pi_coef=w["pi_coef"], grad_clip=0.5)) for _ in range(2))
    fast, terms = GraphLearner(there, 64, reward_coef=w["reward_coef"], policy_coef=w["policy_coef"]), Distill(teacher, w["reward_coef"], w["policy_coef"])
    for turn in range(3):
        b, g = batch(64, turn)
        b = b._replace(teacher_reward=teacher.reward(b.obs[0], b.action[0], b.task), teacher_action=teacher.policy(b.obs, b.task)[2])
        noise, draws = (torch.randn(3, 64, 6, generator=g), torch.randn(4, 64, 6, generator=g)), torch.Generator()
        draws.set_state(here.cpu_generator.get_state())
        heads = torch.stack([torch.randperm(num_q, generator=draws)[:2] if num_q > 2 else torch.arange(num_q) for _ in range(2)])
        with plain_layers(): a = here.update(b, terms, noise)
        z = fast.update(b, noise, heads[None])
        assert set(a) == set(z)
        for k in a: torch.testing.assert_close(a[k].float(), z[k], rtol=1e-4, atol=1e-5, msg=lambda m: f"{k}: {m}")
    for (k, p), q in zip(here.model.state_dict().items(), there.model.state_dict().values()): torch.testing.assert_close(p, q, rtol=0, atol=2e-5, msg=lambda m: f"{k}: {m}")
    for a, z in ((here.opt, there.opt), (here.pi_opt, there.pi_opt)):
        for s, t in zip(a.state_dict()["state"].values(), z.state_dict()["state"].values()): torch.testing.assert_close(s["exp_avg"], t["exp_avg"], rtol=1e-2, atol=1e-6)
    assert here.step == there.step == 3
    norm = there.model.task_emb.weight.norm(dim=1)
    assert norm.max() <= 1.01 and (model.task_emb.weight.norm(dim=1) > 1).any()


def test_a_recording_leaves_optimizers_as_they_are():
    learner = Learner(gpu_jobs._made(), TrainConfig())
    fast = GraphLearner(learner, 16, backend="eager")
    before = [(g["lr"], g["capturable"]) for g in learner.opt.param_groups]
    fast.update(batch(16)[0])
    assert [(g["lr"], g["capturable"]) for g in learner.opt.param_groups] == before
    again = Learner(gpu_jobs._made(), TrainConfig())
    again.load_state_dict(learner.state_dict())
    again.update(batch(16)[0])


def test_warming_up_changes_nothing():
    "What is tried before the first update (plain, compiled) is taken back."
    (a, x), (b, y) = ((l, GraphLearner(l, 16, updates=2, backend=k)) for l, k in ((Learner(gpu_jobs._made(1), TrainConfig(), seed=4), None), (Learner(gpu_jobs._made(1), TrainConfig(), seed=4), "eager")))
    for turn in range(2): x.update(batch(32, turn)[0]), y.update(batch(32, turn)[0])
    for p, q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert torch.equal(a.scale.value, b.scale.value) and y.how == "compiled"


def test_gradients_are_laid_out_like_their_parameters():
    p, g = torch.zeros(2, 3, 4), torch.randn(2, 4, 3).mT
    assert _like(p, g).stride() == p.stride() and torch.equal(_like(p, g), g) and _like(p, None) is None


def test_a_plan_that_does_not_compile_is_taken_plainly(monkeypatch):
    model, cfg = gpu_jobs._made(), plan_config("tiny")
    noise = draw_noise(cfg, 2, 6, torch.Generator().manual_seed(0))._replace(heads=[[0, 1]] * 2)
    def broken(*a, **kw): raise RuntimeError("no such compiler")
    monkeypatch.setattr(torch, "compile", broken)
    graph = PlanGraph(model, cfg, 2, backend="eager")
    with pytest.warns(UserWarning, match="RuntimeError: no such compiler"), torch.no_grad():
        info = graph(model, torch.randn(2, 24), torch.tensor([1, 12]), torch.zeros(2, 3, 6), noise)
    assert graph.how == "plain" and info.values.isfinite().all()


def test_a_plan_that_computes_something_else_is_not_taken(monkeypatch):
    model, cfg = gpu_jobs._made(), plan_config("tiny")
    noise = draw_noise(cfg, 2, 6, torch.Generator().manual_seed(0))._replace(heads=[[0, 1]] * 2)
    def wrong(f, **kw): return (lambda *a: tuple(t + 0.5 for t in f(*a))) if f is planner._next_part else f
    monkeypatch.setattr(torch, "compile", wrong)
    graph = PlanGraph(model, cfg, 2, backend="eager")
    with pytest.warns(UserWarning, match="differ"): graph(model, torch.randn(2, 24), torch.tensor([1, 12]), torch.zeros(2, 3, 6), noise)
    assert graph.how == "plain"


def test_an_update_that_computes_something_else_is_not_taken(monkeypatch):
    learner = Learner(gpu_jobs._made(), TrainConfig())
    before = [p.clone() for p in learner.model.parameters()]
    monkeypatch.setattr(torch, "compile", lambda f, **kw: (lambda *a: (lambda o: (1.5 * o[0], *o[1:]))(f(*a))))
    fast = GraphLearner(learner, 16, backend="eager")
    with pytest.warns(UserWarning, match="differs from plain PyTorch"): fast.update(batch(16)[0])
    assert fast.how == "plain" and learner.step == 1 and any((p != q).any() for p, q in zip(before, learner.model.parameters()))


def test_compile_way(monkeypatch):
    monkeypatch.setenv("TDMPC_COMPILE", "of")
    with pytest.raises(ConfigError, match="Did you mean 'off'"): planner.compile_way()


def test_the_published_student_planned_as_on_a_gpu(reference):
    "The compiler's front end, published settings, against the kernels: first values, and the new mean of most tasks."
    path, = (reference / "checkpoints").glob("*fp16.pt")
    model = load_world_model(path)
    obs, task, cfg = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 12, 29, 16]), PlanConfig()
    noise = draw_noise(cfg, 4, 6, torch.Generator().manual_seed(1))._replace(heads=[[0, 1]] * 6)
    a, b = (plan(m, obs, task, None, cfg, noise=noise)[2] for m in (model, gpu_jobs._Planned(model, "eager")))
    assert (a.values[:, 0] - b.values[:, 0]).abs().max() <= 1e-4 * a.values[:, 0].abs().max()
    assert sum(float((x - y).abs().max()) <= 1e-2 for x, y in zip(a.mean[:, -1], b.mean[:, -1])) >= 3


def on_meta(num_q, task_dim):
    "A model whose tensors have no values: asking for one raises, and so does mixing devices."
    return WorldModel(model_size("tiny", num_q=num_q, task_dim=task_dim), "mt30" if task_dim else "walker-walk").eval().to("meta")


@pytest.mark.parametrize("num_q, task_dim", [(1, 8), (2, 0), (5, 8)])
def test_a_plan_waits_for_no_value(num_q, task_dim):
    cfg, m = plan_config("tiny"), on_meta(num_q, task_dim)
    zeros = lambda *s, dtype=torch.float32: torch.zeros(*s, dtype=dtype, device="meta")
    H, N, P, I = cfg.horizon, cfg.num_samples, cfg.num_pi_trajs, cfg.iterations
    noise = PlanNoise(zeros(5, H, P, 6), zeros(5, I, H, N - P, 6), zeros(5, I, N, 6), zeros(I, min(num_q, 2), dtype=torch.int64))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(): info = planner._search(m, cfg, dtype, zeros(5, 24), zeros(5, dtype=torch.int64), zeros(5, H, 6), noise)
        assert all(t.is_meta and t.dtype == torch.float32 for t in info if t is not None)


@pytest.mark.parametrize("num_q, task_dim", [(1, 8), (2, 0), (5, 8)])
def test_an_update_waits_for_no_value(num_q, task_dim, monkeypatch):
    "All but the optimizers, whose fused form for a GPU is PyTorch's."
    real, m = Learner(WorldModel(model_size("tiny")), TrainConfig()), on_meta(num_q, task_dim)
    real.model, real.device, real.scale.value = m, torch.device("meta"), torch.ones((), device="meta")
    real.params, real.pi_params = [p for p in m.parameters() if p.requires_grad], list(m.pi_head.parameters())
    for opt, params in ((real.opt, real.params), (real.pi_opt, real.pi_params)):
        opt.param_groups[0]["params"] = params
        for g in opt.param_groups[1:]: g["params"] = []
        monkeypatch.setattr(opt, "step", lambda: None)
    fast = GraphLearner(real, 16, 3, 2, 0.45, 3.)
    assert all(t.is_meta for t in fast._state())
    with gpu._settings(fast): names, values = fast._run()
    assert values.is_meta and {"reward_distill_loss", "policy_distill_loss", "pi_loss", "grad_norm"} <= set(names)


def test_every_part_is_compiled_once():
    "All rounds of a plan and all updates of a call share one function: compiling takes long on a GPU."
    from torch._dynamo.utils import counters
    for f in (gpu_jobs.check_plan, lambda d: gpu_jobs.check_update(d, updates=3)):
        counters.clear()
        f(CPU)
        assert counters["stats"]["unique_graphs"] == 2


def job(tmp_path, word, *args, out=None):
    out = tmp_path / (out or word)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rc = main([word, "--small", "--device", "cpu", "--minutes", "3", "--out", str(out), "--work", str(tmp_path / "work"), *args])
    record = json.loads((out / f"{word}.json").read_text())
    assert all(f.stat().st_size <= 16 * 2**20 for f in out.iterdir()) and len(list(out.iterdir())) <= 8
    assert record["word"] == word and record["versions"]["torch"] and record["machine"]["cpu"] and record["finished"]
    return rc, record, out


def test_job_bench(tmp_path):
    rc, record, _ = job(tmp_path, "bench")
    assert rc == 0, record["errors"]
    assert record["results"]["update 1M, paper, recorded"]["updates_per_second"] > 0 and record["results"]["annotation, 317M, bfloat16"]["rows_per_second"] > 0


def test_job_teacher_goes_on_from_what_was_saved(tmp_path):
    rc, record, out = job(tmp_path, "teacher", "--decisions", "2200")
    first = record["results"]["teacher"]
    assert rc == 0 and first["updates"] > 0 and (out / "teacher.safetensors").exists(), record["errors"]
    rc, record, _ = job(tmp_path / "elsewhere", "teacher", "--decisions", "2600", "--resume", str(out))
    again = record["results"]["teacher"]
    assert rc == 0 and again["updates"] > first["updates"] and again["decisions"] >= 2600, record["errors"]
    assert again["curve"][:len(first["curve"])] == first["curve"]


def test_job_teacher_stops_in_time(tmp_path):
    rc, record, out = job(tmp_path, "teacher", "--decisions", "1000000", "--minutes", "0.25")
    assert rc == 0 and 0 < record["results"]["teacher"]["decisions"] < 1_000_000 and (out / "state.00").exists(), record["errors"]


def test_job_student(tmp_path):
    rc, record, out = job(tmp_path, "student")
    assert rc == 0, record["errors"]
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert all(scores[a][m]["mean"] >= 0 for a in ("teacher", "paper", "best", "scratch") for m in ("plan", "policy"))
    rc, record, again = job(tmp_path / "elsewhere", "student", "--resume", str(out))
    assert rc == 0 and json.loads((again / "report.json").read_text())["scores"] == scores and "rows" not in record["results"]


def test_jobs_need_little():
    "Nothing but what the machine has: no plotly, no Jupyter, no pandas."
    code = """
import sys
for m in ("plotly", "IPython", "ipywidgets", "nbdev", "execnb", "papermill", "mediapy", "matplotlib", "pandas", "kaleido", "PIL", "nbclient", "nbformat", "traitlets"): sys.modules[m] = None
import tdmpc_opt_kit.gpu_jobs
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parents[1])))
