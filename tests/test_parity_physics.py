"""Vectorised rewards and observations, on TD-MPC2's own actions."""
import numpy as np
import pytest

from tdmpc_opt_kit.physics import TaskPhysics
from tdmpc_opt_kit.tasks import MT30


@pytest.fixture(scope="module")
def golden(reference):
    with np.load(reference / "golden" / "mt30_env_rollouts.npz") as file: return dict(file)


@pytest.mark.parametrize("task", MT30, ids=lambda t: t.name)
def test_golden(task, golden):
    "A whole recorded episode in one call, from its start alone."
    actions, obs, reward = (golden[f"{task.name}/{k}"] for k in ("action", "obs", "reward"))
    p = TaskPhysics(task)
    p.sim.reseed(int(golden["seed"]))
    first = np.empty(task.obs_dim, np.float32)
    p.sim.reset(first)
    seen, paid, _ = p.roll(p.sim.snapshot(), actions[None, :, :task.action_dim])
    np.testing.assert_allclose(paid[0], reward, rtol=0, atol=1e-6)
    # Observations were stored in float32: what is 50 large is known to 2e-6.
    np.testing.assert_allclose(seen[0], obs[1:, :task.obs_dim], rtol=1e-6, atol=1e-6)
