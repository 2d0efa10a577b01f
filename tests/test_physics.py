"""The true physics: snapshots, rollouts from many states, and the planner as an agent."""
import numpy as np
import pytest

from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.data import Store, collect
from tdmpc_opt_kit.envs import SNAPSHOT, VecEnv
from tdmpc_opt_kit.evaluate import evaluate
from tdmpc_opt_kit.physics import PhysicsAgent, PhysicsPlanConfig, TaskPhysics, plan_physics
from tdmpc_opt_kit.tasks import MT30

SMALL = PhysicsPlanConfig(horizon=5, num_samples=8, num_elites=3, keep=2, iterations=1)


def test_snapshots_of_workers():
    "Every task's snapshot crosses the process boundary, and the task goes on from it as the environment does."
    rng = np.random.default_rng(0)
    with VecEnv(MT30, range(30), num_workers=2) as envs:
        with pytest.raises(RuntimeError, match="reset"): envs.snapshot()
        envs.reset()
        action = rng.uniform(-1, 1, (4, 30, 6)).astype(np.float32)
        for a in action[:2]: envs.step(a)
        begin = envs.snapshot()
        assert begin.shape == (30, SNAPSHOT)
        steps = [envs.step(a)[:2] for a in action[2:]]
    for t in MT30:
        seen, paid, _ = TaskPhysics(t).roll(begin[t.index], action[2:, t.index, :t.action_dim].swapaxes(0, 0)[None])
        for k, (obs, reward) in enumerate(steps):
            np.testing.assert_allclose(seen[0, k], obs[t.index, :t.obs_dim], rtol=1e-5, atol=2e-6, err_msg=t.name)
            np.testing.assert_allclose(paid[0, k], reward[t.index], rtol=0, atol=1e-5, err_msg=t.name)


@pytest.mark.parametrize("task", ["reacher-three-hard", "finger-turn-easy", "fish-swim"])
def test_targets_of_their_own(task):
    "States with different targets in one call give what each gives alone."
    p, rng = TaskPhysics(task), np.random.default_rng(0)
    begin = []
    for _ in range(3):
        p.sim.reset(np.empty(p.spec.obs_dim, np.float32))
        begin.append(p.sim.snapshot())
    action = rng.uniform(-1, 1, (3, 4, p.spec.action_dim))
    together = p.roll(np.stack(begin), action)
    alone = [p.roll(b, a[None]) for b, a in zip(begin, action)]
    for k in range(3): np.testing.assert_array_equal(together[k], np.concatenate([x[k] for x in alone]))
    assert len(np.unique(together[0][:, 0], axis=0)) == 3


def test_threads_change_nothing():
    rng = np.random.default_rng(0)
    one, two = TaskPhysics("hopper-hop"), TaskPhysics("hopper-hop", threads=2)
    action, begin = rng.uniform(-1, 1, (16, 6, 4)), one.sim.snapshot()
    for a, b in zip(one.roll(begin, action), two.roll(begin, action)): np.testing.assert_array_equal(a, b)


def test_agent_everywhere(tmp_path):
    "`evaluate` and `collect` show it the environments; the same seed gives the same episodes."
    play = dict(episodes=1, max_steps=30, progress=False)
    returns = [evaluate(PhysicsAgent(SMALL), "pendulum-spin,cup-spin", **play).returns for _ in range(2)]
    for t in returns[0]: np.testing.assert_array_equal(returns[0][t], returns[1][t])
    collect(PhysicsAgent(SMALL), "reacher-easy", 2, tmp_path / "store", max_steps=8, progress=False)
    assert Store.open_or_create(tmp_path / "store").num_episodes("reacher-easy") == 2


def test_better_than_chance():
    "Planned actions earn more than any fixed push does, on the same start."
    p, rng, plan, total = TaskPhysics("cheetah-run"), np.random.default_rng(0), None, 0.
    at = p.sim.snapshot()
    cfg = PhysicsPlanConfig(num_samples=32, num_elites=6, keep=3, horizon=12, iterations=2)
    for _ in range(40):
        action, plan = plan_physics(p, at, plan, cfg, rng)
        _, reward, after = p.roll(at, action[None, None])
        at, total = after[0, 0], total + reward.sum()
    still = p.roll(p.sim.snapshot(), np.linspace(-1, 1, 9)[:, None, None] * np.ones((9, 40, 6)))[1].sum(1)
    assert total > 2 * still.max()


def test_refusals():
    class Blind:
        pass
    with pytest.raises(ConfigError, match="Blind"): PhysicsAgent().watch(Blind())
    with pytest.raises(ConfigError, match="num_elites"): PhysicsPlanConfig(num_samples=8)
    with pytest.raises(ConfigError, match="discount"): PhysicsPlanConfig(discount=0)
    with pytest.raises(ConfigError, match="walker-wlk"): TaskPhysics("walker-wlk")
