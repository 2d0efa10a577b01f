"""An update by the fused kernels against the same update in PyTorch's autograd."""
import copy
import sys

import pytest
import torch

from tdmpc_opt_kit.benchmark import random_batch
from tdmpc_opt_kit.distill import reward_distill_loss
from tdmpc_opt_kit.fused import Program, fusable
from tdmpc_opt_kit.kernels import kernels
from tdmpc_opt_kit.train import Learner, TrainConfig
from tdmpc_opt_kit.world_model import WorldModel, model_size
from processes import ROOT, run

pytestmark = pytest.mark.skipif(kernels() is None, reason="there is no C++ compiler")
SINGLE = dict(tasks=None, obs_dim=5, action_dim=1, task_dim=0)


def updated(fused, size="tiny", precision="float32", batch=33, horizon=3, steps=1, tasks="mt30", alone=False, **kw):
    "Numbers, gradients and weights after some updates with every kind of further loss."
    torch.manual_seed(0)
    m = WorldModel(model_size(size, **kw), tasks).eval()
    for head in (m.reward_head[-1], m.q_heads[-1], m.target_q_heads[-1]): torch.nn.init.normal_(head.weight, std=0.05)
    b, teacher = random_batch(m.cfg, len(m.action_mask), batch, horizon), torch.rand(batch, 1)
    def terms(learner, b, zs, logits):
        ours = learner.model.pi_params(learner.model.encode(b.obs[1:], b.task), b.task)[0].tanh()
        return dict(reward=0.45 * reward_distill_loss(logits[0], teacher), latent=0.1 * (zs[1:] ** 3).mean(), policy=ours.square().mean())
    learner = Learner(m, TrainConfig(precision=precision, dropout=0.2))
    if not fused: learner._program = lambda batch: None
    for _ in range(steps): stats = learner.update(b, None if alone else terms)
    assert bool(learner.program) == fused
    grads = {k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}
    return {k: float(v) for k, v in stats.items()}, grads, {k: v.clone() for k, v in m.state_dict().items()}


@pytest.mark.parametrize("kw", [dict(), dict(batch=1), dict(size="1M", batch=64), dict(size="5M", batch=24), dict(size="0.2M", batch=7, horizon=2), SINGLE,
                                dict(tasks=None, obs_dim=17, action_dim=6, task_dim=0, num_q=5, mlp_dim=48, enc_dim=80, batch=21, horizon=1)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_equals_autograd(kw, precision):
    (stats, grads, _), (want_stats, want_grads, _) = (updated(f, precision=precision, **kw) for f in (True, False))
    close = 1e-4 if precision == "float32" else 1e-2
    assert stats.keys() == want_stats.keys() and grads.keys() == want_grads.keys()
    for k, v in want_stats.items(): assert stats[k] == pytest.approx(v, rel=close, abs=1e-6), k
    for k, g in want_grads.items():
        if k == "task_emb.weight": continue  # PyTorch's has the policy's share too, which no step ever takes
        assert (grads[k] - g).norm() <= close * g.norm() + 1e-9, k


def test_several_updates_stay_together():
    _, _, ours = updated(True, steps=20)
    _, _, theirs = updated(False, steps=20)
    for k, v in theirs.items(): assert (ours[k] - v).norm() <= 2e-2 * v.norm() + 1e-6, k


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_threads_change_no_gradient(precision):
    before, out = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out.append(updated(True, precision=precision, batch=70, alone=True)[1])  # PyTorch's sums, of further losses, do depend on it
    finally: torch.set_num_threads(before)
    for o in out[1:]:
        for k, g in o.items(): assert torch.equal(g, out[0][k]), k


def test_frozen_or_moved_models_go_through_pytorch():
    m = WorldModel(model_size("tiny"))
    assert fusable(m)
    m.encoder[0].weight.requires_grad_(False)
    assert not fusable(m)
    learner, b = Learner(m, TrainConfig()), random_batch(m.cfg, 30, 16)
    learner.update(b)
    assert learner.program is None and m.encoder[0].weight.grad is None
    m = WorldModel(model_size("tiny"))
    learner = Learner(m, TrainConfig())
    learner.update(b)
    old = learner.program
    assert learner._program(b) is old
    m.load_state_dict(copy.deepcopy(m.state_dict()))  # the same places
    assert learner._program(b) is old
    m.reward_head[0].weight.data = m.reward_head[0].weight.data.clone()
    assert learner._program(b) is not old


def test_unknown_tasks_are_refused():
    m = WorldModel(model_size("tiny"))
    b = random_batch(m.cfg, 30, 16)
    with pytest.raises(IndexError): Learner(m, TrainConfig()).update(b._replace(task=torch.full((16,), 30)))
    with pytest.raises(ValueError): Program(m, 8, 3).world(b, torch.zeros(3, 8, 6), [0, 1], 0.99, 0.5)


def test_what_a_term_keeps_is_not_overwritten():
    m, kept = WorldModel(model_size("tiny")), []
    learner, g = Learner(m, TrainConfig()), torch.Generator().manual_seed(0)
    for _ in range(2):
        learner.update(random_batch(m.cfg, 30, 16), lambda l, b, zs, r: kept.append((zs.detach(), r.detach())) or {})
    assert not torch.equal(kept[0][0], kept[1][0]) and not torch.equal(kept[0][1], kept[1][1])


def test_replaced_target_heads_are_noticed():
    m, b = WorldModel(model_size("tiny")), random_batch(WorldModel(model_size("tiny")).cfg, 30, 16)
    learner = Learner(m, TrainConfig())
    learner.update(b)
    old = learner.program
    for p in m.target_q_heads.parameters(): p.data = p.data.clone()
    assert learner._program(b) is not old
    learner.update(b)
    old = learner.program
    m.target_q_heads = copy.deepcopy(m.target_q_heads)
    assert learner._program(b) is not old


def test_a_nan_is_not_hidden():
    b = random_batch(WorldModel(model_size("tiny")).cfg, 30, 16)
    b.reward[1, 3] = float("nan")
    stats = Learner(WorldModel(model_size("tiny")), TrainConfig()).update(b)
    assert stats["reward_loss"].isnan() and stats["value_loss"].isnan()


def test_the_policy_s_half_has_its_own_tasks():
    m, out = WorldModel(model_size("tiny")), []
    b, noise, zs = random_batch(m.cfg, 30, 16), torch.randn(4, 16, 6), torch.rand(4, 16, 16)
    for fused in (True, False):
        learner = Learner(copy.deepcopy(m), TrainConfig(dropout=0.))
        learner.program = Program(learner.model, 16, 3) if fused else None
        if fused: learner.program.world(b, torch.zeros(3, 16, 6), [0, 1], 0.99, 0.5)
        out.append(learner.pi_update(zs, (b.task + 1) % 30, noise)["entropy"])
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-3)


def test_a_learner_can_be_copied_and_goes_on():
    b = random_batch(WorldModel(model_size("tiny")).cfg, 30, 16)
    learner = Learner(WorldModel(model_size("tiny")), TrainConfig())
    learner.update(b)
    other = copy.deepcopy(learner)
    for l in (learner, other): l.update(b)
    for p, q in zip(learner.model.parameters(), other.model.parameters()): assert torch.equal(p, q)


def test_gradients_add_up_and_order_is_kept():
    m = WorldModel(model_size("tiny"))
    b, noise, p = random_batch(m.cfg, 30, 16), torch.randn(3, 16, 6), Program(m, 16, 3)
    def once():
        cons, r, v, zs, logits = p.world(b, noise, [0, 1], 0.99, 0.5)
        (cons + r + v).backward()
        return zs
    zs = once()
    with pytest.raises(RuntimeError, match="after Program.backward"): p.policy(zs.detach(), b.task, torch.zeros(4, 16, 6), [0, 1])
    p.backward()
    first = m.reward_head[0].weight.grad.clone()
    once(); p.backward()
    torch.testing.assert_close(m.reward_head[0].weight.grad, 2 * first)
    loss = p.world(b, noise, [0, 1], 0.99, 0.5)[0]
    p.world(b, noise, [0, 1], 0.99, 0.5)
    with pytest.raises(RuntimeError, match="overwritten"): loss.backward()


def test_narrow_vectors(tmp_path):
    "The kernels as a processor without AVX-512 gets them; on such a one all other tests ran on them."
    if kernels().lanes == 8: return
    code = "from tdmpc_opt_kit.kernels import kernels; assert kernels().lanes == 8, kernels(); import pytest, sys; sys.exit(pytest.main(['-q', '-k', 'autograd and not 5M', 'tests/test_fused.py']))"
    out = run([sys.executable, "-c", code], CXX="g++ -mno-avx512f", XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=str(ROOT)).check()
    assert " passed" in out and "failed" not in out
