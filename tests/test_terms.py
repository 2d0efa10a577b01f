"""Distillation terms: values against direct formulas in float64, gradients, masks, tasks without a teacher, weights of zero, exact resume."""
import copy
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tdmpc_opt_kit.agent import TaskModels
from tdmpc_opt_kit.config import ConfigError, from_preset
from tdmpc_opt_kit.data import Batch
from tdmpc_opt_kit.distill import DISTILL_PRESETS, Distill, DistillConfig, Pair, Weights
from tdmpc_opt_kit.layers import plain_layers
from tdmpc_opt_kit.tasks import MT30, task_set
from tdmpc_opt_kit.teachers import Asked, Labels
from tdmpc_opt_kit.terms import (MAX_MEAN, MIN_STD, Projections, average, latent_loss, other_actions, plan_loss, policy_distill_loss, policy_kl_loss, policy_nll_loss, relation_loss,
    reward_ce_loss, reward_distill_loss, teacher_latents, value_distill_loss)
from tdmpc_opt_kit.train import Learner, TrainConfig
from tdmpc_opt_kit.twohot import from_two_hot, two_hot
from tdmpc_opt_kit.world_model import SIZES, WorldModel, model_size

H, B, A, RHO = 3, 10, 6, 0.5
CATCH, SPIN, WALKER = (t.index for t in task_set("cup-catch,pendulum-spin,walker-walk"))
COEFS = [f.name for f in fields(Weights) if f.type is not bool]


def rand(*shape, grad=False, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


@pytest.fixture(scope="module")
def teachers():
    "Two specialists with latents of different widths."
    torch.manual_seed(0)
    made = {s.name: WorldModel(model_size("tiny", task_dim=0, obs_dim=s.obs_dim, action_dim=s.action_dim, latent_dim=d), s.name)
            for s, d in zip(task_set("cup-catch,pendulum-spin"), (16, 24))}
    for m in made.values():  # Untrained heads say nothing
        for head in (m.reward_head, m.q_heads): torch.nn.init.normal_(head[-1].weight, std=0.3)
    return TaskModels({k: m.eval().requires_grad_(False) for k, m in made.items()})  # As `load_teachers` gives them, without dropout


def batch(tasks=(CATCH, SPIN), steps=H, n=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(steps + 1, n, 24, generator=g) * (torch.arange(24) < 8)
    return Batch(obs, torch.rand(steps, n, 6, generator=g) * 2 - 1, torch.rand(steps, n, 1, generator=g), torch.tensor(tasks)[torch.arange(n) % len(tasks)], torch.arange(n))


class Planned(Asked):
    "Labels with plans that cost nothing."
    def __call__(self, b):
        plan = torch.full((len(b.obs), len(b.task), 6), 0.3)
        plan[1] = torch.nan
        return super().__call__(b)._replace(plan=plan)


KNOWN, MASK = torch.arange(B) % 3 != 0, (torch.arange(A) < 1 + torch.arange(B)[:, None] % A).double()

def weighed(x):
    "Direct: mean over known slices, weighed by step."
    return sum(RHO**t * float(x[t, KNOWN].mean()) for t in range(len(x))) / len(x)

def per(x): return (x * MASK).sum(-1) / MASK.sum(-1)


def cases():
    "name -> (term, its direct value, the student's tensor that needs a gradient)"
    logits, r, q, p = rand(H, B, 101, grad=True), rand(H, B, 1, seed=1), rand(2, H, B, 101, grad=True, seed=2), (2 * rand(H, B, 101, seed=3)).log_softmax(-1)
    mean, log_std, tm, ts = (rand(H + 1, B, A, grad=i < 2, seed=4 + i) for i in range(4))
    tm = 3 * tm
    std, clip = lambda s: (s.exp()**2 + MIN_STD**2).sqrt(), tm.clamp(-MAX_MEAN, MAX_MEAN)
    flat = lambda x: float(x[:, KNOWN].mean())
    plan = rand(H + 1, B, A, seed=9).tanh()
    plan[1:3, ::2] = torch.nan
    there = ~plan.isnan()[..., 0] & KNOWN
    with torch.no_grad():
        yield "reward", reward_distill_loss, (logits, r, KNOWN, RHO), weighed((from_two_hot(logits) - r)[..., 0]**2), logits
        yield "reward_ce", reward_ce_loss, (logits, r, KNOWN, RHO), weighed(-(two_hot(r) * logits.log_softmax(-1)).sum(-1)), logits
        yield "value", value_distill_loss, (q, p, KNOWN, RHO), sum(weighed((p.exp() * (p - k.log_softmax(-1))).sum(-1)) for k in q) / 2, q
        yield "policy", policy_distill_loss, (mean.tanh(), tm.tanh(), MASK, KNOWN), flat(per((mean.tanh() - tm.tanh())**2)), None
        yield "kl", policy_kl_loss, (mean, log_std, tm, ts, MASK, KNOWN), flat(per(kl_divergence(Normal(clip, std(ts)), Normal(mean, std(log_std))))), mean
        yield "nll", policy_nll_loss, (mean, log_std, tm, MASK, KNOWN), flat(per(-Normal(mean, std(log_std)).log_prob(clip))), mean
        yield "plan", plan_loss, (mean.tanh(), plan, MASK, KNOWN), float(per((mean.tanh() - plan)**2)[there].mean()), None

CASES = {c[0]: c[1:] for c in cases()}


@pytest.mark.parametrize("name", CASES)
def test_value_is_the_direct_formula(name):
    term, args, want, _ = CASES[name]
    assert float(term(*args).detach()) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("name", [k for k, c in CASES.items() if c[3] is not None])
def test_gradient(name):
    "Right by finite differences, zero for slices without a teacher and for actuators that a task lacks."
    term, args, _, x = CASES[name]
    g, = torch.autograd.grad(term(*args), x)
    assert (g[..., ~KNOWN, :] == 0).all() and (g[..., KNOWN, :] != 0).any()
    if x.shape[-1] == A: assert (g[:, MASK == 0] == 0).all()
    d, eps = rand(*x.shape, seed=20), 1e-6
    with torch.no_grad(): ahead, behind = (term(*(x + s * eps * d if a is x else a for a in args)) for s in (1, -1))
    assert float((g * d).sum()) == pytest.approx(float(ahead - behind) / (2 * eps), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_nobody_known_is_zero(name):
    term, args, *_ = CASES[name]
    args = [torch.zeros_like(KNOWN) if a is KNOWN else a for a in args]
    x = [a.detach().requires_grad_() for a in args[:1]]
    loss = term(*x, *args[1:])
    loss.backward()
    assert loss == 0 and (x[0].grad == 0).all()


def test_a_narrow_teacher_and_a_narrow_student():
    "At the lower bound of the log-std the loss stays moderate and still moves the student's std."
    mean, log_std = torch.full((1, 1), 0.3), torch.full((1, 1), -4., requires_grad=True)
    loss = policy_kl_loss(mean, log_std, torch.zeros(1, 1), torch.full((1, 1), -10.), torch.ones(1))
    loss.backward()
    assert 1 < loss < 10 and log_std.grad < 0  # It should become wider
    exact = policy_kl_loss(mean, torch.full((1, 1), -10.), torch.zeros(1, 1), torch.full((1, 1), -10.), torch.ones(1), min_std=1e-9)
    assert exact > 1e6


def test_a_kl_does_not_change_under_tanh():
    "By quadrature of the squashed densities."
    m, s, tm, ts = 0.3, -0.5, -0.2, -0.8
    a = torch.linspace(-1, 1, 400_002, dtype=torch.float64)[1:-1]
    def density(mean, log_std):
        std = math.sqrt(math.exp(2 * log_std) + MIN_STD**2)
        return Normal(mean, std).log_prob(a.atanh()) - (1 - a**2).log()
    p, q = density(tm, ts), density(m, s)
    one = lambda x: torch.full((1, 1), x, dtype=torch.float64)
    assert float((p.exp() * (p - q)).sum() * (a[1] - a[0])) == pytest.approx(float(policy_kl_loss(one(m), one(s), one(tm), one(ts), torch.ones(1))), rel=1e-4)


def test_latents(teachers):
    "Both latent terms against loops in float64."
    b = batch((CATCH, SPIN, WALKER))
    found = [(k, r, z.double()) for k, r, z in teacher_latents(teachers, b.obs[0], b.task)]
    assert [(k, z.shape[1]) for k, _, z in found] == [(0, 16), (1, 24)]
    for k, r, z in found: torch.testing.assert_close(z.float(), teachers.models[k].encode(b.obs[0, r, :teachers.models[k].cfg.obs_dim], torch.zeros(len(r), dtype=torch.int64)))
    z, maps = rand(B, 32).unflatten(-1, (-1, 8)).softmax(-1).flatten(-2), Projections(32, teachers).double()
    kl, rel = [], []
    centred = lambda u: (u - 1 / 8) / (u - 1 / 8).norm()
    with torch.no_grad():
        for k, r, t in found:
            for i in range(len(r)):
                groups = [(t[i, g:g + 8], maps[k](z[r[i]])[g:g + 8].softmax(-1)) for g in range(0, t.shape[1], 8)]
                kl.append(np.mean([float((p * (p / q).log()).sum()) for p, q in groups]))
                rel.append(np.mean([float((centred(z[r[i]]) @ centred(z[r[j]]) - centred(t[i]) @ centred(t[j]))**2) for j in range(len(r)) if j != i and b.task[r[j]] == b.task[r[i]]]))
        assert float(latent_loss(z, found, maps)) == pytest.approx(np.mean(kl), rel=1e-9)
        assert float(relation_loss(z, found, b.task)) == pytest.approx(np.mean(rel), rel=1e-9)


# ---------------------------------------------------------------- in an update

def learner(**kw):
    torch.manual_seed(0)
    return Learner(WorldModel(SIZES["tiny"]), TrainConfig(**kw))


@pytest.mark.parametrize("only", COEFS)
def test_each_weight_alone(teachers, only):
    "One loss in the log, in proportion to its weight; it alone changes what is learned."
    long = batch((CATCH, SPIN, WALKER), steps=5)
    b = long._replace(obs=long.obs[:H + 1], action=long.action[:H], reward=long.reward[:H])
    run = lambda w: learner_after(teachers, b, long, {only: w})
    (one, _), (two, _), (none, plain) = run(1.), run(2.), run(0.)
    extra = set(one) - set(none)
    assert len(extra) == 1
    k, = extra
    assert float(one[k]) != 0 and float(two[k]) == pytest.approx(2 * float(one[k]), rel=1e-5)
    assert not all(torch.equal(x, y) for x, y in zip(run(1.)[1], plain))

def learner_after(teachers, b, long, w):
    l, terms = learner(), Distill(Planned(teachers, ("reward", "value", "policy")), **(dict(reward_coef=0.) | w), teachers=teachers)
    return l.update(b, lambda *a: terms(*a, long=long)), list(l.model.state_dict().values())


@pytest.mark.parametrize("rollout", [False, True])
def test_fused_and_plain_agree(teachers, rollout):
    "All terms through the kernels' update and through PyTorch's: losses and gradients."
    long = batch((CATCH, SPIN, WALKER), steps=5)
    b, out = long._replace(obs=long.obs[:H + 1], action=long.action[:H], reward=long.reward[:H]), []
    for plain in (False, True):
        l = learner(dropout=0., pi_coef=0.)
        terms = Distill(Planned(teachers, ("reward", "value", "policy")), **{k: 1. for k in COEFS}, reward_rollout=rollout, teachers=teachers)
        update = lambda: l.update(b, lambda *a: terms(*a, long=long), (torch.zeros(H, B, 6), torch.zeros(H + 1, B, 6)))
        if plain:
            with plain_layers(): stats = update()
        else: stats = update()
        out.append((stats, [p.grad for p in l.params]))
    (a, ga), (z, gz) = out
    assert set(a) == set(z) and len([k for k in a if "_distill_" in k]) == len(COEFS) - 1
    for k in a: torch.testing.assert_close(a[k].float(), z[k].float(), rtol=1e-4, atol=1e-6, msg=lambda m: f"{k}: {m}")
    for x, y in zip(ga, gz): assert (x - y).norm() <= 1e-3 * y.norm() + 1e-6


def test_tasks_without_a_teacher_learn_as_if_there_were_no_terms(teachers):
    b = batch((WALKER,))
    terms = Distill(Planned(teachers, ("reward", "value", "policy")), **{k: 1. for k in COEFS}, teachers=teachers)
    l, plain = learner(dropout=0.), learner(dropout=0.)
    stats = l.update(b, terms)
    plain.update(b)
    assert all(float(v) == 0 for k, v in stats.items() if "_distill_" in k)
    for x, y in zip(l.model.state_dict().values(), plain.model.state_dict().values()): torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_zero_weights_ask_nothing(teachers):
    class Nobody:
        def __getattr__(self, name): raise AssertionError(f"{name} was asked")
        def __call__(self, b): raise AssertionError("labels were asked for")
    l = learner()
    def never(*a, **kw): raise AssertionError("the student was evaluated")
    assert Distill(Nobody(), 0.)(l, batch(), torch.zeros(H + 1, B, 16), torch.zeros(H, B, 101)) == {}
    l.model.encode = l.model.pi_params = l.model.Q = never
    terms = Distill(Asked(teachers, ("reward",)), 0.45, reward_ce_coef=1.)
    assert set(terms(l, batch(), torch.zeros(H + 1, B, 16), torch.zeros(H, B, 101))) == {"reward_distill_loss", "reward_ce_distill_loss"}


@pytest.mark.parametrize(("weights", "what"), [(dict(reward_coef=0.), ()), (dict(), ("reward",)), (dict(reward_coef=0., policy_kl_coef=1.), ("policy",)),
    (dict(value_distill_coef=1., policy_nll_coef=1., plan_coef=1.), ("reward", "value", "policy", "plan")), (dict(reward_coef=0., latent_coef=1., relation_coef=1., long_coef=1.), ())])
def test_what_follows_from_the_weights(weights, what):
    assert Weights(**weights).what == what


def test_the_policy_is_evaluated_once(teachers):
    l, count = learner(), []
    real = l.model.pi_params
    l.model.pi_params = lambda *a: count.append(0) or real(*a)
    zs, b = torch.rand(H + 1, B, 16), batch()
    Distill(Planned(teachers, ("policy",)), 0., 1., policy_kl_coef=1., policy_nll_coef=1., plan_coef=1.)(l, b, zs, None)
    assert len(count) == 1


def test_other_actions_are_imagined_by_both(teachers):
    "Against a rollout step by step, a row at a time, in the teachers and in the student."
    l, b, zs = learner(), batch((CATCH, SPIN, WALKER)), torch.rand(H + 1, B, 16)
    terms = Distill(teachers, 0., other_coef=2.)
    assert terms.what == ()
    g = torch.Generator(); g.set_state(terms.generator.get_state())
    got, m = terms(l, b, zs, None)["other_distill_loss"], l.model
    action = other_actions(b.action, m.mask(b.task), g)
    assert (action != b.action).any() and (action * (1 - m.mask(b.task)) == 0).all()
    value, reward, policy = [], [], []
    with torch.no_grad():
        for i in range(B):
            if int(b.task[i]) == WALKER: continue  # Nobody teaches it
            t = teachers.model_for(next(s for s in MT30 if s.index == int(b.task[i])))
            own, task, A = torch.zeros(1, dtype=torch.int64), b.task[i:i + 1], t.cfg.action_dim
            z, zt = zs[0, i:i + 1], t.encode(b.obs[0, i:i + 1, :t.cfg.obs_dim], own)
            for h in range(H + 1):
                if h:
                    p, pt = m.pi_params(z, task)[0].tanh()[:, :A], t.pi_params(zt, own)[0].tanh()
                    policy.append(float((p - pt).square().mean()))
                a = action[h, i:i + 1] if h < H else torch.nn.functional.pad(pt, (0, 6 - A))
                q = t.Q(zt, a[:, :A], own).softmax(-1).mean(0)
                value.append(float((q * (q.log() - m.Q(z, a, task).log_softmax(-1))).sum(-1).mean()))
                if h == H: break
                reward.append(float(-(two_hot(from_two_hot(t.reward(zt, a[:, :A], own))) * m.reward(z, a, task).log_softmax(-1)).sum()))
                z, zt = m.next(z, a, task), t.next(zt, a[:, :A], own)
    assert float(got.detach()) == pytest.approx(2 * (np.mean(value) + np.mean(reward) + 10 * np.mean(policy)), rel=1e-4)
    assert not torch.equal(terms(l, b, zs, None)["other_distill_loss"], got)  # Other ones the next time
    with pytest.raises(ConfigError, match="other_coef"): Distill(lambda b: None, 0., other_coef=1.)


def test_a_scale_divides_squared_errors_only(teachers):
    b, l, scale = batch(), learner(), torch.full((30,), 0.25)
    zs, logits = torch.rand(H + 1, B, 16), torch.randn(H, B, 101)
    a, z = (Distill(teachers, 1., reward_ce_coef=1., scale=s)(l, b, zs, logits) for s in (None, scale))
    assert float(z["reward_distill_loss"]) == pytest.approx(0.25 * float(a["reward_distill_loss"])) and torch.equal(a["reward_ce_distill_loss"], z["reward_ce_distill_loss"])


# ---------------------------------------------------------------- in a pair

def config(**kw): return from_preset(DistillConfig, DISTILL_PRESETS, "tiny", **kw)

def weights(pair):
    return [p for m in (*pair.models.values(), *([pair.terms.projections] if pair.terms.projections is not None else [])) for p in m.state_dict().values()]


def test_resumed_equals_uninterrupted_with_a_projection(teachers):
    "Projections and their optimizer are part of the state; a teacher without rows in a batch makes no step."
    cfg = config(latent_coef=1., relation_coef=1., other_coef=0.3, lr_final=0.1, steps=8)
    batches = [batch(t, seed=i) for i, t in enumerate([(CATCH, SPIN), (CATCH,), (CATCH, SPIN), (WALKER,), (SPIN,), (CATCH, SPIN)])]
    whole, parts = Pair(cfg, teachers), Pair(cfg, teachers)
    for b in batches: whole.update(b)
    for b in batches[:3]: parts.update(b)
    saved, parts = copy.deepcopy(parts.state_dict()), Pair(cfg, teachers)
    parts.load_state_dict(saved)
    for b in batches[3:]: parts.update(b)
    assert len(weights(whole)) == len(weights(parts)) and all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts)))
    first = Projections(16, teachers, cfg.seed)
    assert not torch.equal(whole.terms.projections[0].weight, first[0].weight)


def test_projections_are_not_in_the_student(teachers):
    a, b = Pair(config(), teachers), Pair(config(latent_coef=1.), teachers)
    for p in (a, b): p.update(batch())
    assert set(a.models["student"].state_dict()) == set(b.models["student"].state_dict())
    assert "terms" not in a.state_dict() and "terms" in b.state_dict()


def test_states_of_older_runs(teachers):
    "A state without terms loads where no projection is used, and is refused where one is."
    old = Pair(config(), teachers)
    old.update(batch())
    state = old.state_dict()
    assert set(state) == {"student", "scratch"}
    Pair(config(value_distill_coef=1.), teachers).load_state_dict(copy.deepcopy(state))
    for k in ("latent_coef", "other_coef"):
        with pytest.raises(ConfigError, match=k): Pair(config(**{k: 1.}), teachers).load_state_dict(copy.deepcopy(state))


def test_longer_slices_leave_the_baseline_alone(teachers):
    "Slices of five steps: the baseline learns what it learns from their first three, the student does not."
    long = batch(steps=5)
    short = long._replace(obs=long.obs[:H + 1], action=long.action[:H], reward=long.reward[:H])
    a, b = Pair(config(long_horizon=5), teachers), Pair(config(), teachers)
    stats = a.update(long)
    b.update(short)
    assert "student/long_consistency_loss" in stats and "scratch/long_consistency_loss" not in stats
    equal = {k: all(torch.equal(x, y) for x, y in zip(a.models[k].state_dict().values(), b.models[k].state_dict().values())) for k in a.models}
    assert equal == dict(student=False, scratch=True)


def test_labels_of_any_kind(teachers):
    "A function of a batch in the place of teachers."
    seen = []
    def labels(b):
        seen.append(b)
        return Labels(torch.ones(len(b.task), dtype=torch.bool), reward=torch.zeros(H, len(b.task), 1), value=torch.zeros(H, len(b.task), 101).log_softmax(-1), mean=torch.zeros(H + 1, len(b.task), 6))
    assert "student/policy_distill_loss" in Pair(config(), labels).update(batch()) and len(seen) == 1
    with pytest.raises(ConfigError, match="give the teachers too"): Pair(config(latent_coef=1.), labels)
    Pair(config(latent_coef=1.), labels, teachers=teachers).update(batch())


@pytest.mark.parametrize(("kw", "word"), [(dict(long_horizon=2), "more than horizon"), (dict(long_horizon=-1), "long_horizon"), (dict(value_distill_coef=-1.), "value_distill_coef"),
    (dict(policy_kl_coef=float("nan")), "policy_kl_coef"), (dict(task_scale="yes"), "task_scale"), (dict(reward_rollout=1), "reward_rollout")])
def test_impossible_values(kw, word):
    with pytest.raises(ConfigError, match=word): config(**kw)


def test_task_scale_needs_a_store(teachers):
    with pytest.raises(ConfigError, match="need the store whose rewards"): Pair(config(task_scale=True), teachers)
