"""One training update against the reference code: losses, gradient norms, changes (golden/update_step.npz)."""
import numpy as np
import pytest
import torch

from tdmpc_opt_kit.checkpoint import load_world_model, upstream_name
from tdmpc_opt_kit.data import Batch
from tdmpc_opt_kit.distill import reward_distill_loss
from tdmpc_opt_kit import train
from tdmpc_opt_kit.train import Learner, TrainConfig


@pytest.fixture(scope="module")
def update(reference):
    golden = np.load(reference / "golden" / "update_step.npz")
    states = np.load(reference / "golden" / "world_model_outputs.npz")
    t = lambda d, k: torch.from_numpy(d[k])
    model = load_world_model(reference / "checkpoints" / "mt30_1M_steps_045dist_fp16.pt")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learner = Learner(model, TrainConfig(dropout=0.))
    d, seen = float(golden["distill_coef"]), {}

    def terms(learner, batch, zs, logits):
        return dict(reward_distill_loss=d * reward_distill_loss(logits[0], t(golden, "teacher_reward")))

    real = train.clip_gradients
    def spy(params, *args, **kw):  # gradients of each tensor before clipping: world model first, then policy
        params = list(params)
        names = {id(p): n for n, p in model.named_parameters()}
        for p in params:
            if p.grad is not None: seen[names[id(p)]] = float(p.grad.norm())
        return real(params, *args, **kw)

    batch = Batch(t(states, "obs"), t(states, "action"), t(states, "reward"), t(states, "task"), None)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "clip_gradients", spy)
        targets = learner.targets(batch, t(golden, "noise/td_target"))[1]
        stats = learner.update(batch, terms, noise=(t(golden, "noise/td_target"), t(golden, "noise/policy")))
    change = {k: float((v - before[k]).norm()) for k, v in model.state_dict().items()}
    return golden, {k: float(v) for k, v in stats.items()}, seen, change, targets, d


def close(a, b, what): assert abs(a - b) <= 1e-3 * abs(b) + 1e-12, f"{what}: {a} against {b}"


def test_losses(update):
    golden, stats, _, _, _, d = update
    ours = stats | dict(distillation_loss=stats["reward_distill_loss"] / d, reward_distill_loss=stats["reward_distill_loss"] / d)
    keys = [k[5:] for k in golden.files if k.startswith("stat/")]
    assert len(keys) >= 8
    for k in keys: close(ours[k], float(golden[f"stat/{k}"]), k)


def test_td_target(update):
    golden, targets = update[0], update[4]
    assert np.abs(targets.numpy() - golden["td_target"]).max() <= 1e-3 * np.abs(golden["td_target"]).max()


@pytest.mark.parametrize("kind", ["grad_norm", "delta_norm"])
def test_tensors(update, kind):
    golden, _, grads, change, _, _ = update
    keys = [k for k in golden.files if k.startswith(kind + "/")]
    ours = {upstream_name(k): v for k, v in (grads if kind == "grad_norm" else change).items()}
    assert len(keys) > 40
    for k in keys: close(ours[k.split("/", 1)[1]], float(golden[k]), k)
