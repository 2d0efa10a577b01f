"""The thirty environments against TD-MPC2's, on its own actions."""
import numpy as np
import pytest

from tdmpc_opt_kit.envs import VecEnv, make_env
from tdmpc_opt_kit.tasks import MT30

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden(reference):
    with np.load(reference / "golden" / "mt30_env_rollouts.npz") as file: return dict(file)


def test_every_task_is_there(golden):
    assert {k.split("/")[0] for k in golden} - {"seed"} == {t.name for t in MT30}


@pytest.mark.parametrize("task", MT30, ids=lambda t: t.name)
def test_rollout(task, golden):
    actions, obs, reward = (golden[f"{task.name}/{k}"] for k in ("action", "obs", "reward"))
    env = make_env(task.name, seed=int(golden["seed"]))
    first, steps = env.reset()[0], [env.step(a) for a in actions]
    np.testing.assert_allclose(np.stack([first] + [s[0] for s in steps]), obs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose([s[1] for s in steps], reward, rtol=0, atol=TOLERANCE)


def test_vector_env(golden):
    "All tasks at once, stepped by workers."
    length = min(len(golden[f"{t.name}/action"]) for t in MT30)
    with VecEnv(MT30, [int(golden["seed"])] * 30) as vec:
        seen = [vec.reset()]
        for i in range(length):
            action = np.zeros((30, 6), np.float32)
            for t in MT30: action[t.index, :t.action_dim] = golden[f"{t.name}/action"][i]
            obs, reward, _, _ = vec.step(action)
            seen.append(obs)
            np.testing.assert_allclose(reward, [golden[f"{t.name}/reward"][i] for t in MT30], rtol=0, atol=TOLERANCE)
    seen = np.stack(seen, 1)
    for t in MT30: np.testing.assert_allclose(seen[t.index, :, :t.obs_dim], golden[f"{t.name}/obs"][:length + 1], rtol=0, atol=TOLERANCE)
