"""Open-loop model error: zero for exact dynamics, that of standing still for the identity, by task and by start."""
import numpy as np
import pytest
import torch
from torch import nn

from tdmpc_opt_kit.analyze import ModelError, model_error, open_loop
from tdmpc_opt_kit.agent import TaskModels
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.data import Batch, Store
from tdmpc_opt_kit.tasks import MT30, task_set
from tdmpc_opt_kit.world_model import SIZES, WorldModel, model_size

class Known(WorldModel):
    "A world whose latent is the observation's first 16 entries; the truth moves by the first action entry, the model by `gain` times that."
    def __init__(self, gain): super().__init__(SIZES["tiny"]); self.gain = gain; self.eval()
    def encode(self, obs, task): return obs[..., :16]
    def next(self, z, action, task): return z + self.gain * action[..., :1]

def walk(tasks, horizon=6, seed=0):
    "Slices of that world."
    g = torch.Generator().manual_seed(seed)
    action = torch.rand(horizon, len(tasks), 6, generator=g)
    obs = torch.randn(1, len(tasks), 24, generator=g) + torch.cat([torch.zeros(1, len(tasks), 1), action[..., :1].cumsum(0)])
    return Batch(obs, action, torch.zeros(horizon, len(tasks), 1), torch.tensor(tasks), torch.arange(len(tasks)))

def test_exact_dynamics_and_identity():
    b = walk([0, 0, 5])
    m = model_error(Known(1.), b)
    assert m.tasks == (MT30[0].name, MT30[5].name) and m.horizon == 6
    for t in m.tasks:
        assert np.abs(m.error[t]).max() < 1e-5 and m.worse(t).max() == 0 and m.ratio(t).max() < 1e-5 and (m.usable(t) == 6).all()
    m = model_error(Known(0.), b)  # the identity is "nothing changed" itself: a tie, which is not worse
    for t in m.tasks: assert np.array_equal(m.error[t], m.still[t]) and m.worse(t).max() == 0 and np.allclose(m.ratio(t), 1) and (m.usable(t) == 0).all()
    m = model_error(Known(-1.), b)  # the wrong way: twice as far off
    for t in m.tasks: assert (m.worse(t) == 1).all() and np.allclose(m.ratio(t), 2, atol=1e-4)
    m = model_error(Known(0.5), b)
    for t in m.tasks: assert np.allclose(m.ratio(t), 0.5, atol=1e-4)
    assert np.allclose(m.still[MT30[5].name][:, 0], 4 * b.action[:, 2, 0].cumsum(0), atol=1e-4)  # 16 entries move alike: norm 4

def test_several_models_each_with_its_own_tasks():
    specs = task_set("cup-catch,pendulum-spin")
    torch.manual_seed(0)
    models = {s.name: WorldModel(model_size("tiny", task_dim=0, obs_dim=s.obs_dim, action_dim=s.action_dim), s.name).eval() for s in specs}
    b = walk([specs[0].index, specs[1].index, specs[0].index])
    both = TaskModels(models)
    error, still = open_loop(both, b)
    for i, s in ((0, specs[0]), (1, specs[1]), (2, specs[0])):
        m, zero = models[s.name], torch.zeros(1, dtype=torch.int64)
        truth = m.encode(b.obs[:, i:i + 1, :s.obs_dim], zero)
        z = truth[0]
        for k in range(6):
            z = m.next(z, b.action[k, i:i + 1, :s.action_dim], zero)
            assert torch.allclose(error[k, i], (z - truth[k + 1]).norm(), atol=1e-5) and torch.allclose(still[k, i], (truth[0] - truth[k + 1]).norm(), atol=1e-5)

def test_a_task_that_never_moves():
    m = ModelError(dict(a=np.ones((3, 2))), dict(a=np.zeros((3, 2))))
    assert np.isnan(m.ratio("a")).all() and m.to_dict()["a"]["ratio"] == [None] * 3 and m.table()

def test_stored_slices(tmp_path):
    spec, = task_set("cup-catch")
    rng = np.random.default_rng(0)
    obs, action, reward = rng.normal(size=(2, 30, spec.obs_dim)).astype("f4"), rng.uniform(-1, 1, (2, 30, spec.action_dim)).astype("f4"), np.zeros((2, 30), "f4")
    action[:, 0], reward[:, 0] = np.nan, np.nan
    store = Store.create(tmp_path/"s")
    store.append("cup-catch", obs, action, reward)
    model = WorldModel(SIZES["tiny"]).eval()
    m = model_error(model, store, horizon=15, starts=40)
    assert m.error["cup-catch"].shape == (15, 40) and np.isfinite(m.error["cup-catch"]).all()
    assert np.array_equal(model_error(model, tmp_path/"s", starts=40).error["cup-catch"], m.error["cup-catch"])  # the same starts for everybody
    assert [k for k in m.table()[0] if "worse" in k] == [f"worse than nothing changed at {k}, %" for k in (1, 3, 15)]
    with pytest.raises(ConfigError, match="rows of a slice"): model_error(model, store, horizon=30)
    with pytest.raises(ConfigError, match="no episodes of walker-run"): model_error(model, store, "walker-run")
    other = WorldModel(model_size("tiny", task_dim=0, obs_dim=3, action_dim=1), "pendulum-spin")
    with pytest.raises(ConfigError, match="no task that the model knows"): model_error(other, store)
