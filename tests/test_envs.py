"""Environments: all thirty tasks, the vector env, and what happens when something goes wrong."""
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.envs import Sim, VecEnv, WorkerError, _build, _quick, assign, make_env, render_backend, render_episode
from tdmpc_opt_kit.tasks import ACTION_REPEAT, EPISODE_LENGTH, MT30

each_task = pytest.mark.parametrize("task", MT30, ids=lambda t: t.name)


def actions_for(task, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, task.action_dim)).astype(np.float32)


def play(env, actions, **kw):
    obs = [env.reset(**kw)[0]]
    steps = [env.step(a) for a in actions]
    return np.stack(obs + [s[0] for s in steps]), np.array([s[1] for s in steps])


def alive(pid):
    "Whether a process runs; one that has ended and waits to be collected does not."
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" if Path("/proc").is_dir() else os.kill(pid, 0) is None
    except (FileNotFoundError, ProcessLookupError): return False


def all_end(pids, seconds=15):
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(map(alive, pids)): time.sleep(.05)
    return not any(map(alive, pids))


# One env

@each_task
def test_gymnasium_accepts(task):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(env.spec|infinity).*")
        check_env(make_env(task.name, seed=1), skip_render_check=True)


@each_task
def test_same_seed_same_episode(task):
    actions, used = actions_for(task, 20), make_env(task.name, seed=5)
    play(used, actions_for(task, 7, seed=1))
    fresh = play(make_env(task.name, seed=3), actions)
    again, other = play(used, actions, seed=3), play(used, actions)
    for a, b in zip(fresh, again): np.testing.assert_array_equal(a, b)
    assert (fresh[0] != other[0]).any(), "the next episode starts elsewhere"
    assert fresh[0].shape == (21, task.obs_dim) and fresh[0].dtype == np.float32
    assert (0 <= fresh[1]).all() and (fresh[1] <= ACTION_REPEAT).all()


@each_task
def test_equals_dm_control(task):
    "Nothing that makes a step cheaper changes it."
    actions, plain, sim, obs = actions_for(task, 30), _build(task, 2, draw=True), Sim(task, 2), np.zeros(task.obs_dim, np.float32)
    flat = lambda step: np.concatenate([np.ravel(v) for v in step.observation.values()]).astype(np.float32)
    sim.reset(obs)
    np.testing.assert_array_equal(obs, flat(plain.reset()))
    for a in actions:
        reward = sim.step(a, obs)
        steps = [plain.step(a.astype(np.float64)) for _ in range(ACTION_REPEAT)]
        np.testing.assert_array_equal(obs, flat(steps[-1]))
        assert reward == sum(s.reward for s in steps)


def test_workers_equal_dm_control():
    "In workers rewards have a quicker `tolerance`; every task, to the last bit, in groups too."
    steps, plain = 25, [_build(t, 2) for t in MT30]
    flat = lambda step: np.concatenate([np.ravel(v) for v in step.observation.values()]).astype(np.float32)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 30, 6)).astype(np.float32)
    with VecEnv(MT30, [2] * 30, num_workers=2, groups=2) as vec:
        obs = vec.reset()
        for t, env in zip(MT30, plain): np.testing.assert_array_equal(obs[t.index, :t.obs_dim], flat(env.reset()))
        for a in actions:
            obs, reward, *_ = vec.step(a)
            for t, env in zip(MT30, plain):
                got = [env.step(a[t.index, :t.action_dim].astype(np.float64)) for _ in range(ACTION_REPEAT)]
                np.testing.assert_array_equal(obs[t.index, :t.obs_dim], flat(got[-1]))
                assert reward[t.index] == np.float32(sum(s.reward for s in got)), t.name


def test_quick_tolerance():
    "Equal to dm_control's at, near and far from bounds, for numbers and arrays, and where it raises."
    from dm_control.utils.rewards import tolerance as exact
    quick, inf = _quick(exact), float("inf")
    special = [0., 1., -1., np.nextafter(1, 2), np.nextafter(1, 0), 1e-300, 1e300, inf, -inf, np.nan]
    xs = special + list(np.random.default_rng(1).normal(0, 3, 2000))
    for kw in (dict(), dict(margin=2), dict(bounds=(1, 1), margin=1), dict(bounds=(1, inf), margin=.5, value_at_margin=.5, sigmoid="linear"), dict(bounds=(0, np.float64(.3))),
               dict(bounds=(-.5, .5), margin=.5, value_at_margin=0, sigmoid="linear"), dict(margin=1, value_at_margin=0, sigmoid="quadratic"), dict(bounds=(.6, 2), margin=np.float64(.3))):
        with np.errstate(all="ignore"):
            for x in xs:
                for v in (float(x), np.float64(x), np.array([x])):
                    a, b = quick(v, **kw), exact(v, **kw)
                    assert type(a) is type(b) and np.array_equal(a, b, equal_nan=True), (x, kw)
            np.testing.assert_array_equal(quick(np.array(xs), **kw), exact(np.array(xs), **kw))
    for kw in (dict(bounds=(1, 0)), dict(margin=-1), dict(margin=1, value_at_margin=1.5), dict(margin=1, sigmoid="none"), dict(margin=1, value_at_margin=0)):
        for f in (quick, exact):
            with pytest.raises(ValueError): f(2., **kw)


def test_groups():
    "Any number of groups and workers, the same episodes; reseeding equals a new start."
    names, seeds, actions = ["walker-walk", "cup-catch", "pendulum-spin", "hopper-hop", "cup-spin"], range(5), np.random.default_rng(0).uniform(-1, 1, (9, 5, 6)).astype(np.float32)
    def play(vec): return [vec.reset()] + [x for a in actions for x in vec.step(a)[:3]]
    with VecEnv(names, seeds, num_workers=0, max_steps=4) as vec: want = play(vec)
    for workers, groups in ((0, 3), (1, 2), (3, 2), (2, 9)):
        with VecEnv(names, [9] * 5, num_workers=workers, max_steps=4, groups=groups) as vec:
            assert sorted(sum(vec.shares, [])) == list(range(5)) and len(vec.parts) == min(groups, 5)
            other = play(vec)
            assert (other[0] != want[0]).any()
            vec.reseed(seeds)
            with pytest.raises(RuntimeError, match="reset"): vec.step_async(np.zeros((vec.parts[0].stop, 6)))
            for a, b in zip(play(vec), want): np.testing.assert_array_equal(a, b)
            assert vec.busy > 0
            with pytest.raises(IndexError, match="groups"): vec.step_wait(9)
            with pytest.raises(ConfigError, match="seeds"): vec.reseed([1])
    with pytest.raises(ConfigError, match="groups"): VecEnv(names, seeds, groups=0)


def test_episode_length():
    env = make_env("pendulum-swingup", seed=1)
    with pytest.raises(RuntimeError, match="reset"): env.step(np.zeros(1))
    env.reset()
    ends = [env.step(np.zeros(1))[2:4] for _ in range(EPISODE_LENGTH)]
    assert ends == [(False, False)] * (EPISODE_LENGTH - 1) + [(False, True)]
    with pytest.raises(RuntimeError, match="reset"): env.step(np.zeros(1))


@pytest.mark.parametrize("name, message", [("walker-wlak", "Did you mean 'walker-walk'"), ("mt30", "One task"), ("", "No task")])
def test_unknown_task(name, message):
    with pytest.raises(ConfigError, match=message): make_env(name)


def test_bad_action():
    env = make_env("cup-catch")
    env.reset()
    with pytest.raises(ValueError, match=r"cup-catch: an action of shape \(2,\)"): env.step(np.zeros(6))


def test_no_torch():
    "Workers stay small: neither the module nor an env needs torch."
    subprocess.run([sys.executable, "-c", "import sys; from tdmpc_opt_kit.envs import make_env; make_env('cup-spin').reset(); assert 'torch' not in sys.modules"],
                   check=True, env=os.environ | dict(MUJOCO_GL="disable"))


# Rendering

def test_render():
    if render_backend() is None: pytest.skip("nothing draws here")
    env = make_env("cup-spin", seed=1, render_mode="rgb_array")
    env.reset()
    picture = env.render()
    assert picture.shape == (240, 320, 3) and picture.dtype == np.uint8 and picture.std() > 5
    env.close()
    actions = actions_for(env.task, 6)
    frames, rewards = render_episode("cup-spin", 1, actions, episode=1, every=3, height=60, width=80)
    assert frames.shape == (3, 60, 80, 3)
    plain = make_env("cup-spin", seed=1)
    plain.reset()
    np.testing.assert_array_equal(rewards, play(plain, actions)[1])
    with pytest.raises(RuntimeError, match="rgb_array"): plain.render()
    with pytest.raises(ConfigError, match="rgb_array"): make_env("cup-spin", render_mode="human")


@pytest.mark.parametrize("gl", ["disable", "nonsense"])
def test_without_pictures(gl, tmp_path):
    "Where nothing draws, physics works, and asking for a picture says what is missing."
    code = """
import warnings
import tdmpc_opt_kit.envs as envs
if GL == 'nonsense': envs._draw = 'raise SystemExit(1)'
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    assert envs.render_backend() is None
assert 'libegl1' in str(caught[0].message)
env = envs.make_env('cup-catch', render_mode='rgb_array')
env.reset(); env.step([0, 0])
try: env.render()
except RuntimeError as e: assert 'render_backend' in str(e)
else: raise SystemExit('a picture?')
""".replace("GL", repr(gl))
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | dict(MUJOCO_GL=gl))


# The vector env

@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_equals_single_envs(num_workers):
    "Thirty tasks, padded, truncated, reset by themselves: the same as one at a time."
    steps, length = 7, 3
    action = np.random.default_rng(0).uniform(-1, 1, (steps, 30, 6)).astype(np.float32)
    with VecEnv(MT30, range(100, 130), num_workers, max_steps=length) as vec:
        np.testing.assert_array_equal(vec.task, np.arange(30))
        first, got = vec.reset(), [vec.step(a) for a in action]
        np.testing.assert_array_equal([g[2].all() for g in got], [(i + 1) % length == 0 for i in range(steps)])
        np.testing.assert_array_equal([g[2].any() for g in got], [(i + 1) % length == 0 for i in range(steps)])
        restarted = vec.reset()
    for t in MT30:
        env, n = make_env(t, seed=100 + t.index, max_steps=length), t.obs_dim
        np.testing.assert_array_equal(first[t.index, :n], env.reset()[0])
        for a, (obs, reward, done, info) in zip(action[:, t.index, :t.action_dim], got):
            one, r, terminated, truncated, _ = env.step(a)
            assert reward[t.index] == np.float32(r) and not terminated and done[t.index] == truncated
            np.testing.assert_array_equal((info["final_obs"] if truncated else obs)[t.index, :n], one)
            if truncated: np.testing.assert_array_equal(obs[t.index, :n], env.reset()[0])
            assert not obs[t.index, n:].any()
        np.testing.assert_array_equal(restarted[t.index, :n], env.reset()[0])


def test_full_length():
    with VecEnv(["pendulum-swingup", "cup-catch"], [0, 0]) as vec:
        vec.reset()
        done = np.stack([vec.step(np.zeros((2, 6)))[2] for _ in range(2 * EPISODE_LENGTH)])
    np.testing.assert_array_equal(np.flatnonzero(done[:, 0]), [EPISODE_LENGTH - 1, 2 * EPISODE_LENGTH - 1])
    np.testing.assert_array_equal(done[:, 0], done[:, 1])


def test_padding_of_actions_is_ignored():
    action = np.random.default_rng(0).uniform(-1, 1, (5, 2, 6)).astype(np.float32)
    wild = action.copy()
    wild[:, 0, 1:] = wild[:, 1, 2:] = np.nan
    results = []
    for a in (action, wild):
        with VecEnv(["pendulum-spin", "cup-spin"], [1, 2], num_workers=0) as vec: results.append([vec.reset()] + [x for s in a for x in vec.step(s)[:2]])
    for x, y in zip(*results): np.testing.assert_array_equal(x, y)


def test_active():
    "An environment that waits is not stepped, counted, or ended."
    names, active = ["cup-catch", "finger-spin", "cup-catch"], np.array([True, False, True])
    action = np.ones((3, 6), np.float32)
    with VecEnv(names, [1, 2, 1], num_workers=2, max_steps=3) as vec:
        first = vec.reset()
        for _ in range(2):
            obs, reward, done, _ = vec.step(action, active)
            np.testing.assert_array_equal(obs[1], first[1])
            assert reward[1] == 0 and not done.any()
        np.testing.assert_array_equal(obs[0], obs[2])
        assert vec.step(action)[2].tolist() == [True, False, True]
        assert [vec.step(action, ~active)[2].tolist() for _ in range(2)] == [[False] * 3, [False, True, False]]


def test_results_are_copies():
    with VecEnv(["cup-catch"], [1]) as vec:
        obs = vec.reset()
        before = obs.copy()
        vec.step(np.ones((1, 6)))
        np.testing.assert_array_equal(obs, before)


@pytest.mark.parametrize("tasks, seeds, kw, message", [
    (["cup-catch"], [1, 2], {}, "1 tasks and 2 seeds"), ([], [], {}, "0 tasks"), (["cup-cach"], [1], {}, "cup-catch"),
    (["cup-catch"], [1], dict(max_steps=0), "max_steps"), (["mt30"], [1], {}, "One task")])
def test_bad_input(tasks, seeds, kw, message):
    with pytest.raises(ConfigError, match=message): VecEnv(tasks, seeds, **kw)


def test_order_of_calls():
    action = np.zeros((1, 6))
    vec = VecEnv(["cup-catch"], [1])
    with pytest.raises(RuntimeError, match="reset"): vec.step(action)
    vec.reset()
    with pytest.raises(RuntimeError, match="step_async"): vec.step_wait()
    with pytest.raises(ValueError, match="action has shape"): vec.step(action[0])
    vec.step_async(action)
    with pytest.raises(RuntimeError, match="step_wait"): vec.step_async(action)
    vec.close(); vec.close()
    with pytest.raises(RuntimeError, match="closed"): vec.reset()


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_assign(num_workers):
    shares = assign(MT30, num_workers)
    assert sorted(sum(shares, [])) == list(range(30)) and all(shares)
    assert sorted(sum(assign(MT30[:3], 3), [])) == [0, 1, 2]


# When something goes wrong

def two_workers():
    vec = VecEnv(["walker-walk", "cup-catch"], [1, 7], num_workers=2)
    vec.reset()
    return vec, [p.pid for p, _ in vec.workers]


@pytest.mark.parametrize("when", ["before", "during", "reset"])
def test_killed_worker(when):
    vec, pids = two_workers()
    if when == "during": vec.step_async(np.zeros((2, 6)))
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 1 \(cup-catch\) was killed by signal 9"):
        if when == "during":
            vec.step_wait()   # its answer may have been on the way already
            vec.step(np.zeros((2, 6)))
        elif when == "before": vec.step(np.zeros((2, 6)))
        else: vec.reset()
    assert all_end(pids) and all(p.poll() is not None for p, _ in vec.workers)
    with pytest.raises(RuntimeError, match="closed"): vec.reset()


def test_error_in_a_step():
    vec, pids = two_workers()
    action = np.zeros((2, 6))
    action[0, 0] = np.nan
    with pytest.raises(WorkerError, match=r"worker 0 \(walker-walk\) failed in walker-walk \(seed 1\): PhysicsError"): vec.step(action)
    assert all_end(pids)


def test_error_at_the_start():
    with pytest.raises(WorkerError, match=r"worker 0 \(cup-catch\) failed in .*ValueError"): VecEnv(["cup-catch"], [-1], num_workers=1)


def test_forgotten():
    "Nobody calls close: the workers end with the object."
    vec, pids = two_workers()
    del vec
    assert all_end(pids)


PARENT = """
import sys, time
import numpy as np
from tdmpc_opt_kit.envs import VecEnv
vec = VecEnv(["walker-walk"] * 40, range(40), num_workers=2)
vec.reset()
print(*[p.pid for p, _ in vec.workers], flush=True)
while True: {body}
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL", "group"])
@pytest.mark.parametrize("body", ["vec.step(np.zeros((40, 6)))", "time.sleep(.01)"], ids=["stepping", "idle"])
def test_parent_ends(how, body):
    "A script without a __main__ guard ends in any way: no worker stays."
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    time.sleep(.2)
    os.killpg(parent.pid, signal.SIGINT) if how == "group" else parent.send_signal(getattr(signal, how))
    err = parent.communicate(timeout=20)[1]
    assert all_end(pids)
    if how in ("SIGINT", "group"): assert "KeyboardInterrupt" in err and err.count("Traceback") == 1, err


def test_inherited_socket():
    "Another child that keeps the parent's sockets open does not keep the workers alive."
    code = PARENT.format(body="time.sleep(1)").replace("print(", "import os\nif os.fork() == 0: os.closerange(0, 3); time.sleep(30); os._exit(0)\nprint(")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, process_group=0)
    pids = [int(p) for p in parent.stdout.readline().split()]
    try:
        parent.kill(); parent.wait()
        assert all_end(pids)
    finally:
        try: os.killpg(parent.pid, signal.SIGKILL) # The child that slept
        except ProcessLookupError: pass


def test_interrupted_step():
    "Ctrl-C while a step is under way, in a session that goes on: the vector env is closed."
    vec = VecEnv(["walker-walk"] * 200, range(200), num_workers=2)
    vec.reset()
    pids = [p.pid for p, _ in vec.workers]
    def interrupt(*_): raise KeyboardInterrupt
    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, .1)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True: vec.step(np.zeros((200, 6)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    with pytest.raises(RuntimeError, match="closed"): vec.reset()
    assert all_end(pids)
