"""Planner and agents beyond what the notebooks show: sweeps over tasks and settings, whole episodes, bad input."""
import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.agent import PlanAgent, PolicyAgent, RandomAgent, TaskModels, make_agent
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.envs import VecEnv
from tdmpc_opt_kit.planner import PlanConfig, PlanNoise, PlanState, draw_heads, draw_noise, plan, plan_config
from tdmpc_opt_kit.tasks import MT30, action_mask
from tdmpc_opt_kit.twohot import from_two_hot
from tdmpc_opt_kit.world_model import WorldModel, model_size

TINY = plan_config("tiny")


def make_model(tasks="mt30", seed=0, size="tiny", **widths):
    "A small model whose rewards, values and policy differ from state to state."
    torch.manual_seed(seed)
    model = WorldModel(model_size(size, **widths), tasks).eval().requires_grad_(False)
    for last in (model.reward_head[-1], model.q_heads[-1], model.pi_head[-1]): torch.nn.init.normal_(last.weight, std=0.2)
    for p in model.parameters(): p.data += 0.05 * torch.randn_like(p)  # LayerNorm weights and biases too
    return model


@pytest.fixture(scope="module")
def model(): return make_model()


@pytest.fixture(scope="module")
def specialists():
    "Models of different sizes: one of a single unnamed task, one of two tasks, one named single task."
    return {"cup-catch": make_model(None, 1, task_dim=0, obs_dim=8, action_dim=2), "walker-walk, finger-spin": make_model("walker-walk,finger-spin", 2, latent_dim=24),
            "pendulum-spin": make_model("pendulum-spin", 3, task_dim=0, obs_dim=3, action_dim=1, num_q=5)}


def reference_plan(model, obs, task, mean, cfg, noise):
    "MPPI for one pair by the model's own methods, as plainly as possible."
    H, P, mask = cfg.horizon, cfg.num_pi_trajs, model.mask(task).view(-1)
    z0 = model.encode(obs, task)
    actions, z = torch.zeros(H, cfg.num_samples, len(mask)), z0.expand(P, -1)
    for h in range(H):
        actions[h, :P] = model.pi(z, task, noise.pi[0, h]).action
        z = model.next(z, actions[h, :P], task)
    mean, std = torch.cat([mean[1:], 0 * mean[:1]]), torch.full_like(mean, cfg.max_std)
    for i in range(cfg.iterations):
        actions[:, P:] = (mean[:, None] + std[:, None] * noise.samples[0, i]).clamp(-1, 1) * mask
        z, value = z0.expand(cfg.num_samples, -1), 0
        for h in range(H):
            value = value + cfg.discount**h * from_two_hot(model.reward(z, actions[h], task))
            z = model.next(z, actions[h], task)
        q = from_two_hot(model.Q(z, model.pi(z, task, noise.value[0, i]).action, task))[noise.heads[i] if noise.heads else slice(None)]
        value = (value + cfg.discount**H * q.mean(0)).nan_to_num(0)[:, 0]
        if cfg.anchor: value = value - cfg.anchor * torch.stack([(actions[h] - actions[h, :P].mean(0)).square().sum(-1) for h in range(H)]).sum(0) / (H * mask.sum())
        best, at = value.topk(cfg.num_elites)
        w = (cfg.temperature * (best - best[0])).exp()
        w = (w / w.sum())[None, :, None]
        e = actions[:, at]
        mean = (w * e).sum(1)
        std = (w * (e - mean[:, None])**2).sum(1).sqrt().clamp(cfg.min_std, cfg.max_std) * mask
    return mean, std, value


@pytest.mark.parametrize("kw", [dict(), dict(horizon=1), dict(horizon=5, num_pi_trajs=0), dict(num_elites=1), dict(iterations=1, discount=0.5, temperature=2.), dict(anchor=3.)], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_plan_is_mppi(kw, heads):
    "In float64, where rounding cannot swap elites, against the plain version."
    cfg, model = plan_config("tiny", **kw), make_model("walker-walk,cup-catch,fish-swim", num_q=heads).double()
    obs, task = torch.randn(3, 24, dtype=torch.float64), torch.tensor([2, 0, 1])
    mean = (torch.rand(3, cfg.horizon, 6, dtype=torch.float64) - 0.5) * model.mask(task)[:, None]
    g = torch.Generator().manual_seed(0)
    noise = draw_noise(cfg, 3, 6, g, obs)._replace(heads=draw_heads(heads, cfg.iterations, g))
    _, state, info = plan(model, obs, task, PlanState(mean), cfg, g, noise=noise)
    for i in range(3):
        ref = reference_plan(model, obs[i:i + 1], task[i:i + 1], mean[i], cfg, PlanNoise(*(t[i:i + 1] for t in noise[:3]), noise.heads))
        for ours, theirs in zip((state.mean[i], info.std[i, -1], info.values[i, -1]), ref): torch.testing.assert_close(ours, theirs, **(dict(rtol=1e-5, atol=1e-6) if cfg.anchor else {}))


def test_a_strong_anchor_is_the_policy(model):
    obs, task = torch.randn(5, 24), torch.tensor([0, 5, 7, 12, 16])
    policy = model.pi(model.encode(obs, task), task, torch.zeros(5, 6))
    off = [float((plan(model, obs, task, None, plan_config("published", anchor=a), torch.Generator().manual_seed(0))[1].mean[:, 0] - policy.mean).abs().mean()) for a in (0., 1e5)]
    assert off[1] < 0.1 * off[0]
    for kw, word in ((dict(anchor=-1.), "at least 0"), (dict(anchor=float("nan")), "at least 0"), (dict(anchor=1., num_pi_trajs=0), "num_pi_trajs")):
        with pytest.raises(ConfigError, match=word): PlanConfig(**kw)


@pytest.mark.parametrize("size", ["tiny", "1M"])
def test_batch_equals_its_pairs(size):
    "However a batch is split, the same generator gives the same plans; and float32 follows float64."
    model, cfg = make_model(size=size), plan_config("published", num_samples=128, num_elites=8, iterations=1)
    obs, task = torch.randn(6, 24), torch.tensor([0, 5, 7, 12, 16, 29])
    g = torch.Generator()
    _, together, info = plan(model, obs, task, None, cfg, g.manual_seed(1))
    noise = draw_noise(cfg, 6, 6, g.manual_seed(1))
    for i in range(6):
        _, alone, one = plan(model, obs[i:i + 1], task[i:i + 1], None, cfg, noise=PlanNoise(*(t[i:i + 1] for t in noise[:3])))
        assert (info.values[i] - one.values[0]).abs().max() < 1e-4 * one.values.abs().max()
    double = plan(model.double(), obs.double(), task, None, cfg, noise=noise)[2].values
    assert ((info.values - double).abs().amax(2) < 1e-4 * double.abs().amax(2)).all()


@pytest.mark.parametrize("explore", [False, True])
def test_masked_entries_are_zero(model, explore):
    task = torch.arange(30)
    mask = torch.from_numpy(action_mask(range(30))) == 0
    state, g = None, torch.Generator().manual_seed(0)
    for _ in range(3):
        action, state, info = plan(model, torch.randn(30, 24, generator=g), task, state, TINY, g, explore, keep_candidates=True)
        assert (action[mask] == 0).all() and (action.abs() <= 1).all()
        for x in (state.mean, info.std[:, -1], info.elite_actions.transpose(1, 2).flatten(1, 2), info.candidates.movedim(-1, 1).flatten(2).movedim(1, -1)):
            assert (x.movedim(-1, 1)[mask] == 0).all()
    assert info.candidates.shape == (30, TINY.iterations, TINY.horizon, TINY.num_samples, 6)


def test_explore_adds_noise_of_the_final_std(model):
    obs, task = torch.randn(200, 24), torch.zeros(200, dtype=torch.int64)
    g = torch.Generator()
    plain, _, info = plan(model, obs, task, None, TINY, g.manual_seed(0))
    noisy, _, _ = plan(model, obs, task, None, TINY, g.manual_seed(0), explore=True)
    inside = (plain.abs() < 0.3) & (noisy.abs() < 1)
    ratio = ((noisy - plain) / info.std[:, -1, 0])[inside]
    assert len(ratio) > 100 and abs(float(ratio.mean())) < 0.4 and 0.4 < float(ratio.std()) < 1.5


def test_elites_are_drawn_by_weight(model):
    "The action is the first of an elite, and over many draws each as often as it weighs."
    obs, task, cfg = torch.randn(1, 24), torch.tensor([0]), plan_config("tiny", num_elites=4, temperature=0.2)
    noise = draw_noise(cfg, 1, 6, torch.Generator().manual_seed(0))
    g, count = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(400):
        action, _, info = plan(model, obs, task, None, cfg, g, noise=noise)
        hit = (info.elite_actions[0, 0] == action[0]).all(-1)
        assert hit.any()
        count += hit
    torch.testing.assert_close(count / 400, info.elite_weights[0], rtol=0, atol=0.1)
    assert (info.best_action == info.elite_actions[:, 0, 0]).all()


def test_nan_values_count_as_zero(model):
    broken = copy.deepcopy(model)
    broken.reward_head[-1].bias[0] = float("nan")  # every reward is NaN
    action, _, info = plan(broken, torch.randn(2, 24), torch.tensor([1, 12]), None, TINY, torch.Generator().manual_seed(0))
    assert (info.values == 0).all() and action.isfinite().all()


def test_only_the_generator_is_used(model):
    before = torch.get_rng_state()
    for explore in (False, True): plan(model, torch.randn(2, 24, generator=torch.Generator()), torch.tensor([1, 2]), None, TINY, torch.Generator().manual_seed(0), explore)
    assert torch.equal(before, torch.get_rng_state())


def test_training_mode_changes_nothing(model):
    "Dropout belongs to the update."
    obs, task, g = torch.randn(2, 24), torch.tensor([1, 2]), torch.Generator()
    a = plan(model, obs, task, None, TINY, g.manual_seed(0))[2].values
    try: b = plan(model.train(), obs, task, None, TINY, g.manual_seed(0))[2].values
    finally: model.eval()
    assert torch.equal(a, b)


def test_results_can_be_trained_on(model):
    "What a plan returns are ordinary tensors that autograd takes."
    action, state, info = plan(model, torch.randn(1, 24), torch.tensor([1]), None, TINY, torch.Generator().manual_seed(0))
    w = torch.ones(6, requires_grad=True)
    (action * w).sum().backward()
    assert torch.equal(w.grad, action[0])


def test_bfloat16(model):
    half = copy.deepcopy(model).bfloat16()
    action, state, info = plan(half, torch.randn(2, 24), torch.tensor([1, 12]), None, TINY, torch.Generator().manual_seed(0))
    assert action.dtype == state.mean.dtype == info.values.dtype == torch.float32 and info.values.isfinite().all()  # only the imagination is coarse


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
def test_memory_of_a_large_batch():
    "A hundred pairs with published settings need little more than one (one round instead of six, to save time)."
    code = """
import re, torch
from tdmpc_opt_kit.planner import *
from tdmpc_opt_kit.world_model import *
torch.manual_seed(0)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
model, cfg, g = WorldModel(SIZES["1M"]).requires_grad_(False), PlanConfig(iterations=1), torch.Generator()
plan(model, torch.randn(1, 24), torch.tensor([0]), None, cfg, g)
before = peak()
plan(model, torch.randn(100, 24), torch.arange(100) % 30, None, cfg, g)
print(peak() - before)"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 100_000, f"{int(grown)} kB"


# Agents

def batch(names, seed=0):
    g = torch.Generator().manual_seed(seed)
    task = torch.tensor([next(t.index for t in MT30 if t.name == n) for n in names])
    return torch.randn(len(names), 24, generator=g), task, torch.ones(len(names), dtype=torch.bool)


NAMES = ["cup-catch", "walker-walk", "pendulum-spin", "cup-catch", "finger-spin", "walker-walk"]


@pytest.mark.parametrize("mode", ["plan", "policy"])
@pytest.mark.parametrize("explore", [False, True])
def test_agents_mask_and_clamp(model, specialists, mode, explore):
    obs, task, first = batch(NAMES)
    mask = torch.from_numpy(action_mask(task)) == 0
    for models in (model, specialists):
        agent = make_agent(models, mode, 0, explore, TINY)
        for t in range(3):
            a = agent.act(obs, task, first if t == 0 else ~first)
            assert a.shape == (6, 6) and a.dtype == torch.float32 and (a[mask] == 0).all() and (a.abs() <= 1).all()
            assert (a[~mask] != 0).all()
        same = make_agent(models, mode, 0, explore, TINY)
        assert torch.equal(same.act(obs, task, first), make_agent(models, mode, 0, explore, TINY).act(obs, task, first))


def test_plan_agent_is_plan(specialists):
    "Each specialist gets its own observation width, task index and warm start."
    obs, task, first = batch(NAMES)
    agent = PlanAgent(specialists, TINY, torch.Generator().manual_seed(0))
    agent.act(obs, task, first)
    means = agent.mean.clone()
    agent.act(obs, task, torch.tensor([False, False, False, True, False, False]))
    g, cup = torch.Generator().manual_seed(0), specialists["cup-catch"]
    _, s, _ = plan(cup, obs[[0, 3], :8], torch.zeros(2, dtype=torch.int64), None, TINY, g)
    torch.testing.assert_close(means[[0, 3], :, :2], s.mean)
    rows, info = agent.info[0]
    assert rows.tolist() == [0, 3] and torch.equal(agent.mean[rows][:, :, :2], info.mean[:, -1]) and (agent.mean[[0, 3], :, 2:] == 0).all()
    assert [r.tolist() for r, _ in agent.info] == [[0, 3], [1, 4, 5], [2]]


def test_inactive_rows_are_not_planned(model, monkeypatch):
    import tdmpc_opt_kit.agent as module
    seen = []
    monkeypatch.setattr(module, "plan", lambda m, obs, *a, **k: seen.append(len(obs)) or plan(m, obs, *a, **k))
    obs, task, first = batch(NAMES)
    agent = PlanAgent(model, TINY, torch.Generator().manual_seed(0))
    agent.act(obs, task, first)
    for n in (4, 1, 0):
        active = torch.arange(6) < n
        kept = agent.mean.clone()
        a = agent.act(obs, task, ~first, active)
        assert (a[n:] == 0).all() and torch.equal(agent.mean[n:], kept[n:]) and (not n or (a[:n] != 0).any(1).all())
    assert seen == [6, 4, 1]


def test_numpy_input(model):
    obs, task, first = (x.numpy() for x in batch(NAMES))
    for agent in (RandomAgent(), PolicyAgent(model, 0.1), PlanAgent(model, TINY)): assert agent.act(obs, task, first).shape == (6, 6)


def test_noise_of_the_policy(model):
    obs, task, first = batch(["walker-walk"] * 500)
    obs[:] = obs[0]
    mean = PolicyAgent(model).act(obs, task, first)
    noisy = PolicyAgent(model, 0.05, torch.Generator().manual_seed(0)).act(obs, task, first)
    free = mean[0].abs() < 0.8
    torch.testing.assert_close((noisy - mean).std(0)[free], torch.full((int(free.sum()),), 0.05), rtol=0.2, atol=0)
    each = PolicyAgent(model, torch.linspace(0, 0.5, 500), torch.Generator().manual_seed(0)).act(obs, task, first)
    assert torch.equal(each[0], mean[0]) and (each[400:] - mean[400:]).abs().mean() > (each[:100] - mean[:100]).abs().mean()
    raw, log_std, _ = TaskModels(model).policy(obs, task)
    sample = PolicyAgent(model, "sample", torch.Generator().manual_seed(0)).act(obs, task, first)
    noise = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample, (raw + log_std.exp() * noise).tanh())


def test_task_models_answers(specialists):
    "Rows of all models in any order and any leading shape, like asking each model by itself."
    models = TaskModels(specialists)
    obs, task, _ = batch(NAMES * 3)
    action = torch.rand(18, 6)
    reward, (raw, log_std, mean) = models.reward(obs, action, task), models.policy(obs, task)
    for i, spec in enumerate(MT30[t] for t in task.tolist()):
        m = models.model_for(spec)
        own = torch.tensor([0 if m.tasks is None else m.tasks.index(spec.name)])
        o, a, n = obs[i:i + 1, :m.cfg.obs_dim], action[i:i + 1, :m.cfg.action_dim], m.cfg.action_dim
        z = m.encode(o, own)
        torch.testing.assert_close(reward[i:i + 1], from_two_hot(m.reward(z, a, own)))
        for ours, theirs in zip((raw, log_std), m.pi_params(z, own)): torch.testing.assert_close(ours[i:i + 1, :n], theirs)
        torch.testing.assert_close(mean[i, :n], raw[i, :n].tanh())
        assert (raw[i, spec.action_dim:] == 0).all() and (mean[i, spec.action_dim:] == 0).all()
    shaped = models.policy(obs.view(3, 6, 24), task[:6])
    for s, flat in zip(shaped, (raw, log_std, mean)): torch.testing.assert_close(s.flatten(0, 1), flat)
    assert not reward.requires_grad


def test_one_model_shared_by_names():
    shared = make_model("walker-walk,walker-run")
    models = TaskModels({"walker-walk": shared, "walker-run": shared})
    assert len(models.models) == 1 and models.groups(torch.tensor([2, 1]))[0][2].tolist() == [1, 0]
    assert TaskModels(models).tasks == models.tasks


@pytest.mark.parametrize("models, says", [
    (lambda: {}, "mapping of models is empty"), (lambda: None, "WorldModel"), (lambda: "teacher.pt", "not str"),
    (lambda: {"walker-walk": make_model(None, task_dim=0, obs_dim=8, action_dim=2)}, "walker-walk does not fit: it takes 8 observation and 2 action entries"),
    (lambda: {"cup-catch": make_model("walker-walk,cup-spin")}, "it knows walker-walk, cup-spin"),
    (lambda: make_model(None, task_dim=0, obs_dim=7, action_dim=2), "no MT30 task's")], ids=["empty", "none", "path", "widths", "other tasks", "odd widths"])
def test_models_that_fit_nothing(models, says):
    with pytest.raises(ConfigError, match=says): TaskModels(models())


def test_missing_task_is_named(specialists):
    models = TaskModels(specialists)
    obs, task, first = batch(["cup-catch", "walker-run", "fish-swim"])
    for ask in (lambda: models.policy(obs, task), lambda: make_agent(specialists, "plan", plan_config=TINY).act(obs, task, first), lambda: models.require("walker-run,cup-catch,fish-swim")):
        with pytest.raises(ConfigError, match="No model for walker-run, fish-swim; there is one for walker-walk, cup-catch, finger-spin, pendulum-spin"): ask()


@pytest.mark.parametrize("mode", ["plan", "policy"])
def test_same_seed_same_episode(specialists, mode):
    "Whole short episodes of several tasks in worker processes, twice."
    def run(seed):
        out = []
        with VecEnv(NAMES, range(6), num_workers=2, max_steps=8) as env:
            agent, obs, first = make_agent(specialists, mode, seed, True, TINY), env.reset(), np.ones(6, bool)
            for _ in range(12):
                action = agent.act(obs, env.task, first)
                obs, reward, first, _ = env.step(action.numpy())
                out.append(np.concatenate([action.numpy().ravel(), reward, obs.ravel()]))
        return np.array(out)
    one, two = run(0), run(0)
    np.testing.assert_array_equal(one, two)
    assert (run(1) != one).any()


@pytest.mark.parametrize("change", ["data", "parameter", "module", "optimizer", "embedding", "load", "double"])
def test_policy_notices_changed_weights(change):
    "However they change, between two actions of the same agent."
    model = make_model(size="1M").requires_grad_(True)
    agent, obs, task, first = make_agent(model, "policy"), torch.randn(2, 24), torch.tensor([3, 12]), torch.zeros(2, dtype=torch.bool)
    before = agent.act(obs, task, first)
    assert torch.equal(agent.act(obs, task, first), before)
    if change == "data": model.pi_head[0].weight.data.mul_(1.1)
    if change == "parameter": model.pi_head[-1].bias = torch.nn.Parameter(model.pi_head[-1].bias.detach() + .1)
    if change == "module": model.encoder = copy.deepcopy(make_model(seed=5, size="1M").encoder)
    if change == "optimizer":
        model.pi(model.encode(obs, task), task, torch.zeros(2, 6)).mean.sum().backward()
        torch.optim.SGD(model.parameters(), 1.).step()
    if change == "embedding": model.task_emb.weight.data[12, 3] += .3
    if change == "load": model.load_state_dict(make_model(seed=5, size="1M").state_dict())
    if change == "double": model.double()
    after = agent.act(obs, task, first)
    with torch.no_grad(): want = model.pi(model.encode(obs.to(model.pi_head[-1].bias), task), task).mean.float()
    torch.testing.assert_close(after, want, atol=1e-5, rtol=0)
    assert change == "double" or not torch.equal(after, before)


def test_policy_of_a_row_is_its_own(model, specialists):
    "Independent agents: a row's action does not depend on the others, nor on how many there are."
    obs, task, first = torch.randn(70, 24), torch.arange(70) % 30, torch.ones(70, dtype=torch.bool)
    agent = make_agent(model, "policy")
    every = agent.act(obs, task, first)
    for rows in ([0], [5, 40], list(range(33))):
        active = torch.zeros(70, dtype=torch.bool)
        active[rows] = True
        torch.testing.assert_close(agent.act(obs, task, first, active)[rows], every[rows], atol=1e-6, rtol=0)
        torch.testing.assert_close(agent.act(obs[rows], task[rows], first[rows]), every[rows], atol=1e-6, rtol=0)
