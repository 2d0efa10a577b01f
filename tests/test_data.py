"""Stores, samplers, collection and the chunk reader: bad inputs, crashes, resuming, random draws."""
import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tdmpc_opt_kit import data
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.kernels import _openmp, kernels
from tdmpc_opt_kit.data import (EPISODE, Batch, Sampler, Store, card, chunk_files, collect, convert_chunks, episode_seed, figures, is_store, iter_chunk,
                                open_chunk, pack_rows, read_chunk)
from tdmpc_opt_kit.tasks import ACTION_DIMS, MT30, OBS_DIMS

CUP, WALKER, PENDULUM = MT30[12], MT30[1], MT30[29]
same = np.testing.assert_array_equal


def episodes(task, n, length=20, seed=0):
    rng = np.random.default_rng([seed, task.index])
    obs = rng.normal(size=(n, length + 1, task.obs_dim)).astype(np.float32)
    action = rng.uniform(-1, 1, (n, length + 1, task.action_dim)).astype(np.float32)
    reward = rng.uniform(0, 2, (n, length + 1)).astype(np.float32)
    action[:, 0], reward[:, 0] = np.nan, np.nan
    return obs, action, reward


def ragged(task, lengths, seed=0):
    return tuple(zip(*[[x[0] for x in episodes(task, 1, n, seed + i)] for i, n in enumerate(lengths)]))


def chunk(tasks, seed=0, dtype=torch.float32, task_dtype=torch.int64):
    rng, task = np.random.default_rng(seed), np.array(tasks)
    obs = rng.normal(size=(len(task), 501, 24)) * (np.arange(24) < OBS_DIMS[task][:, None, None])
    action = rng.uniform(-1, 1, (len(task), 501, 6)) * (np.arange(6) < ACTION_DIMS[task][:, None, None])
    reward = rng.uniform(0, 2, (len(task), 501))
    action[:, 0], reward[:, 0] = np.nan, np.nan
    return dict(obs=torch.tensor(obs).to(dtype), action=torch.tensor(action).to(dtype), reward=torch.tensor(reward).to(dtype),
                task=torch.tensor(task).to(task_dtype)[:, None].repeat(1, 501))


@pytest.fixture
def store(tmp_path):
    s = Store.create(tmp_path / "store")
    s.append("cup-catch", *episodes(CUP, 4), origin="a")
    return s.append("walker-walk", *episodes(WALKER, 2, 30), origin=dict(name="b", noise=.3))


def content(path):
    "All that a reader can see of a store."
    s = Store(path)
    return s.manifest, {t: (s.episodes(t).tobytes(), *(np.array(x).tobytes() for x in s.rows(t))) for t in s.tasks}


# --- the store ---

@pytest.mark.parametrize("task", MT30, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_goes_in_comes_out(task, dtype, tmp_path):
    s = Store.create(tmp_path / "s", dtype)
    obs, action, reward = episodes(task, 3)
    s.append(task, obs, action, reward)
    got = Store(tmp_path / "s").rows(task.name)
    for x, want in zip(got, (obs, action, reward)):
        same(x, want.reshape(-1, *want.shape[2:]).astype(dtype))
        assert x.dtype == dtype and not x.flags.writeable
    np.testing.assert_allclose(s.returns(task), reward[:, 1:].astype(np.float64).sum(1), rtol=1e-12)
    assert s.verify() == []


def test_ragged_episodes(tmp_path):
    s = Store.create(tmp_path / "s")
    lengths = [1, 30, 2, 7]
    parts = ragged(CUP, lengths)
    s.append("cup-catch", *parts)
    s.append("cup-catch", *ragged(CUP, [5], 9))
    table = s.episodes("cup-catch")
    assert table["length"].tolist() == [2, 31, 3, 8, 6] and table["start"].tolist() == [0, 2, 33, 36, 44]
    assert table["number"].tolist() == [0, 1, 2, 3, 4]
    for i in range(4): same(s.episode("cup-catch", i).obs, parts[0][i])


def test_figures_of_the_manifest(store):
    for t in store.tasks:
        r, m = store.returns(t), store.manifest["tasks"][t]
        np.testing.assert_allclose([m["return"][k] for k in ("mean", "min", "max")], [r.mean(), r.min(), r.max()])
        assert (m["episodes"], m["rows"]) == (len(r), len(store.rows(t).reward))
    store.append("cup-catch", *episodes(CUP, 5, seed=3), origin="a")
    r = store.returns("cup-catch")
    np.testing.assert_allclose(store.manifest["tasks"]["cup-catch"]["return"]["mean"], r.mean())


@pytest.mark.parametrize("change, words", [
    (lambda o, a, r: (o[:, :, :7], a, r), ["cup-catch: obs", "[21, 7]", "[rows, 8]"]),
    (lambda o, a, r: (o, a[:, :, :1], r), ["cup-catch: action", "[rows, 2]"]),
    (lambda o, a, r: (o, a, r[:, :, None]), ["cup-catch: reward", "[rows]"]),
    (lambda o, a, r: (o, a[:, 1:], r), ["action and obs differ"]),
    (lambda o, a, r: (o, a, r[:2]), ["reward and obs differ"]),
    (lambda o, a, r: (o[:0], a[:0], r[:0]), ["no episodes"]),
    (lambda o, a, r: (o[:, :1], a[:, :1], r[:, :1]), ["at least two rows"]),
    (lambda o, a, r: (o, np.nan_to_num(a), r), ["row 0", "must be NaN"]),
    (lambda o, a, r: (o, a, np.where(np.arange(21) == 5, np.inf, r)), ["reward is inf in row 5 of episode 0"]),
    (lambda o, a, r: (np.where(np.arange(21)[:, None] == 20, np.nan, o), a, r), ["obs is nan in row 20 of episode 0"]),
    (lambda o, a, r: (o[0], a[0], r[0]), ["cup-catch: obs"]),
])
def test_bad_episodes_change_nothing(change, words, store):
    before = content(store.path)
    with pytest.raises(ConfigError) as e: store.append("cup-catch", *change(*episodes(CUP, 3)))
    for w in words: assert w in str(e.value)
    assert content(store.path) == before


def test_float16_overflow(tmp_path):
    s = Store.create(tmp_path / "s", "float16")
    o, a, r = episodes(CUP, 2)
    o[1, 3, 2] = 1e5
    with pytest.raises(ConfigError, match="obs is inf in row 3 of episode 1.*float32 store"): s.append("cup-catch", o, a, r)


def edit(path, f):
    p = path / "manifest.json"
    m = json.loads(p.read_text())
    f(m)
    p.write_text(json.dumps(m))


@pytest.mark.parametrize("damage, words", [
    (lambda p: (p / "manifest.json").unlink(), ["not a store", "manifest.json"]),
    (lambda p: (p / "manifest.json").write_text('{"format": '), ["manifest.json", "not valid JSON"]),
    (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), ["manifest.json", "not valid JSON"]),
    (lambda p: (p / "manifest.json").write_text("[]"), ["not the manifest of a store"]),
    (lambda p: edit(p, lambda m: m.update(version=99)), ["version 99", "update tdmpc_opt_kit"]),
    (lambda p: edit(p, lambda m: m.update(dtype="int8")), ["dtype 'int8'", "float32, float16"]),
    (lambda p: edit(p, lambda m: m.pop("origins")), ["'origins' is missing"]),
    (lambda p: edit(p, lambda m: m["tasks"].update({"cup-cach": m["tasks"]["cup-catch"]})), ["cup-cach", "Did you mean 'cup-catch'?"]),
    (lambda p: edit(p, lambda m: m["tasks"]["cup-catch"].update(obs_dim=9)), ["cup-catch has obs_dim 9, expected 8"]),
    (lambda p: edit(p, lambda m: m["tasks"]["cup-catch"].pop("rows")), ["cup-catch", "'rows' is missing"]),
    (lambda p: os.truncate(p / "tasks/cup-catch/rows.bin", 100), ["cup-catch/rows.bin", "truncated", "100 bytes"]),
    (lambda p: os.truncate(p / "tasks/walker-walk/episodes.bin", 3), ["walker-walk/episodes.bin", "truncated"]),
    (lambda p: (p / "tasks/walker-walk/rows.bin").unlink(), ["walker-walk/rows.bin", "missing"]),
])
def test_damaged_store(damage, words, store):
    damage(store.path)
    with pytest.raises(ConfigError) as e: Store(store.path)
    for w in [str(store.path), *words]: assert w in str(e.value)


def test_create_and_open(tmp_path, store):
    with pytest.raises(ConfigError, match="no such folder"): Store(tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").touch()
    with pytest.raises(ConfigError, match="not an empty folder"): Store.create(tmp_path / "full")
    with pytest.raises(ConfigError, match="not an empty folder"): Store.create(tmp_path / "full/thing")
    with pytest.raises(ConfigError, match="is a store already"): Store.create(store.path)
    with pytest.raises(ConfigError, match="float32 or float16"): Store.create(tmp_path / "i", "float64")
    assert is_store(store.path) and not is_store(tmp_path / "full") and not is_store(tmp_path / "none")
    half = tmp_path / "half"  # A crash within create
    half.mkdir()
    (half / "manifest.json.new").write_text("{")
    assert Store.create(half).tasks == ()


def test_origins(store):
    assert [o["name"] for o in store.origins] == ["a", "b"]
    store.append("cup-catch", *episodes(CUP, 1), origin=dict(name="b", noise=.3))
    assert len(store.origins) == 2
    before = content(store.path)
    with pytest.raises(ConfigError, match="noise = 0.3, not 0.5"): store.append("cup-catch", *episodes(CUP, 1), origin=dict(name="b", noise=.5))
    with pytest.raises(ConfigError, match="needs a name"): store.append("cup-catch", *episodes(CUP, 1), origin=dict(noise=.5))
    assert content(store.path) == before


def test_verify_names_the_damage(store):
    def flip(f, at):
        with open(store.path / "tasks" / f, "r+b") as f:
            f.seek(at); b = f.read(1)[0]; f.seek(at); f.write(bytes([b ^ 4]))
    width = 4 * 11
    for e in (0, 3):
        for at in (e * 21 * width, (e + 1) * 21 * width - 1):
            flip("cup-catch/rows.bin", at)
            problems = Store(store.path).verify()
            assert len(problems) == 1 and f"cup-catch/rows.bin: episode {e}" in problems[0]
            flip("cup-catch/rows.bin", at)
    flip("walker-walk/episodes.bin", EPISODE.itemsize + 8)
    assert "walker-walk/episodes.bin" in store.verify()[0]


# --- crashes and writers ---

@pytest.mark.parametrize("task", ["cup-catch", "pendulum-spin"])
def test_a_crash_anywhere_leaves_the_old_or_the_new(store, task, tmp_path):
    "The process dies at its n-th call that touches the disk, for every n."
    spec = next(s for s in MT30 if s.name == task)
    parts = {task: episodes(spec, 3, seed=5), "walker-walk": episodes(WALKER, 1, seed=6)}
    before = content(store.path)
    died = 0
    for n in range(1, 100):
        pid = os.fork()
        if pid == 0:
            left = [n]
            def dying(f):
                def g(*a, **kw):
                    left[0] -= 1
                    if left[0] <= 0: os._exit(7)
                    return f(*a, **kw)
                return g
            for name in ("fsync", "replace"): setattr(os, name, dying(getattr(os, name)))
            data._extend, data._running = dying(data._extend), dying(data._running)
            try: Store(store.path).commit(parts, "new")
            except BaseException: os._exit(9)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 7)
        now = content(store.path)
        if code == 0 or now != before: break
        died += 1
    assert died >= 8  # Before, between and after the files, and before the rename
    assert Store(store.path).num_episodes(task) == (before[0]["tasks"].get(task, dict(episodes=0))["episodes"] + 3)
    assert Store(store.path).verify() == []
    want = Store.create(tmp_path / "want")
    want.append("cup-catch", *episodes(CUP, 4), origin="a")
    want.append("walker-walk", *episodes(WALKER, 2, 30), origin=dict(name="b", noise=.3))
    want.commit(parts, "new")
    assert content(want.path) == content(store.path)
    store.append(task, *episodes(spec, 1), origin="after")
    assert store.verify() == []


def test_rubbish_behind_the_end_is_ignored(store):
    before = content(store.path)
    for f in ("rows.bin", "episodes.bin"):
        with open(store.path / "tasks/cup-catch" / f, "ab") as g: g.write(b"x" * 1001)
    assert content(store.path) == before
    store.append("cup-catch", *episodes(CUP, 1, seed=8))
    assert store.verify() == [] and store.num_episodes("cup-catch") == 5
    assert (store.path / "tasks/cup-catch/rows.bin").stat().st_size == 5 * 21 * 11 * 4


def test_one_writer(store):
    code = f"""
import sys
from tdmpc_opt_kit.data import Store
with Store({str(store.path)!r}).lock():
    print("held", flush=True)
    sys.stdin.read()
"""
    p = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"is being written by process {p.pid}"): store.append("cup-catch", *episodes(CUP, 1))
        assert store.num_episodes() == 6  # Reading goes on
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert store.append("cup-catch", *episodes(CUP, 1)).num_episodes() == 7  # The dead process holds nothing
    finally:
        p.kill()
        p.wait()
        p.stdin.close(); p.stdout.close()


def test_two_writers_in_turn(store):
    other = Store(store.path)
    other.append("cup-catch", *episodes(CUP, 2, seed=2))
    store.append("cup-catch", *episodes(CUP, 1, seed=3))  # Sees what the other wrote
    assert store.num_episodes("cup-catch") == 7 and other.reload().num_episodes("cup-catch") == 7 and store.verify() == []


# --- sampling ---

@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "Thirty tasks, ragged episodes, some too short for a slice."
    s = Store.create(tmp_path_factory.mktemp("mixed") / "s")
    rng = np.random.default_rng(0)
    return s.commit({t.name: ragged(t, [3, *rng.integers(1, 25, 4).tolist(), 6 + t.index], t.index) for t in MT30})


WAYS = ["memory", "kernels", "python"]
needs_kernels = pytest.mark.skipif(kernels() is None and os.environ.get("CI") != "true", reason="there is no C++ compiler")


def sampler_of(store, way, monkeypatch, **kw):
    "A sampler that reads in one of `WAYS`, and does."
    if way == "kernels" and kernels() is None and os.environ.get("CI") != "true": pytest.skip("there is no C++ compiler")
    with monkeypatch.context() as m:
        if way == "python": m.setenv("TDMPC_KERNELS", "off")
        s = Sampler(store, preload=way == "memory", **kw)
    assert s._gather.__name__ == dict(memory="_gather_memory", kernels="_gather_kernel", python="_gather_disk")[way]
    return s


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("balance", ["rows", "tasks"])
@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_slices_are_what_the_store_holds(mixed, way, balance, horizon, monkeypatch):
    sampler = sampler_of(mixed, way, monkeypatch, batch_size=333, horizon=horizon, balance=balance)
    tables, rows = {t: mixed.episodes(t) for t in mixed.tasks}, {t: mixed.rows(t) for t in mixed.tasks}
    for _ in range(2):
        b = sampler.sample()
        assert isinstance(b, Batch) and [x.dtype for x in b] == [torch.float32] * 3 + [torch.int64] * 2 and all(x.is_contiguous() for x in b)
        for i, (t, r) in enumerate(zip(b.task.tolist(), b.index.tolist())):
            s = MT30[t]
            e = tables[s.name][np.searchsorted(tables[s.name]["start"], r, "right") - 1]
            assert r + horizon < e["start"] + e["length"]
            same(b.obs[:, i, :s.obs_dim], rows[s.name].obs[r:r + horizon + 1])
            same(b.action[:, i, :s.action_dim], rows[s.name].action[r + 1:r + horizon + 1])
            same(b.reward[:, i, 0], rows[s.name].reward[r + 1:r + horizon + 1])
            assert not b.obs[:, i, s.obs_dim:].any() and not b.action[:, i, s.action_dim:].any()
        assert all(x.isfinite().all() for x in b[:3])


def slices(store, task, horizon):
    "All first rows of slices of a task, the slow way."
    return [int(e["start"]) + k for e in store.episodes(task) for k in range(max(0, int(e["length"]) - horizon))]


def test_uniform_over_rows(mixed):
    horizon, n = 4, 200_000
    j, row = Sampler(mixed, horizon=horizon).draw(n)
    want = [(s, r) for s, t in enumerate(mixed.tasks) for r in slices(mixed, t, horizon)]
    got, counts = np.unique(np.stack([j, row]), axis=1, return_counts=True)
    assert sorted(map(tuple, got.T.tolist())) == sorted(want)  # Every slice and no other
    expected = n / len(want)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - len(want)) < 5 * np.sqrt(2 * len(want))


def test_balanced_over_tasks(mixed):
    horizon, n = 4, 300_000
    j, row = Sampler(mixed, horizon=horizon, balance="tasks").draw(n)
    counts = np.bincount(j)
    assert ((counts - n / 30) ** 2 / (n / 30)).sum() < 30 + 5 * np.sqrt(60)
    mine = row[j == 7]
    want = slices(mixed, mixed.tasks[7], horizon)
    assert sorted(set(mine.tolist())) == want
    c, e = np.unique(mine, return_counts=True)[1], len(mine) / len(want)
    assert ((c - e) ** 2 / e).sum() < len(want) + 5 * np.sqrt(2 * len(want))


def test_some_tasks_only(mixed):
    b = Sampler(mixed, "cup-catch,walker-walk", batch_size=500).sample()
    assert set(b.task.tolist()) == {12, 1}


def test_float16_store(tmp_path, monkeypatch):
    s = Store.create(tmp_path / "s", "float16").append("cup-catch", *episodes(CUP, 3))
    a, *others = (sampler_of(s, way, monkeypatch, seed=2).sample() for way in WAYS)
    for b in others:
        for x, y in zip(a, b): assert torch.equal(x, y)
    assert a.obs.dtype == torch.float32


def test_every_number_of_half_precision(tmp_path, monkeypatch):
    "Zeros of both signs, subnormal numbers, the largest: all that a store may hold."
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
    bits = np.resize(bits[np.isfinite(bits)], (66, 120, 8))
    _, action, reward = episodes(CUP, 66, 119)
    s = Store.create(tmp_path / "s", "float16").append("cup-catch", bits, action, reward)
    j, row = np.zeros(66 * 60, int), np.arange(0, 66 * 120, 2)
    for way in WAYS[1:]:
        x = sampler_of(s, way, monkeypatch, horizon=1).read(j, row).obs[..., :8].transpose(0, 1).reshape(-1, 8).numpy()
        same(x.view(np.uint32), bits.reshape(-1, 8).astype(np.float32).view(np.uint32))


@needs_kernels
def test_threads_read_the_same(mixed, monkeypatch):
    "One thread or many, PyTorch's or the kernels' own; from warm pages or from the disk."
    want, s, lib, openmp, before = Sampler(mixed, seed=6, preload=True), sampler_of(mixed, "kernels", monkeypatch, seed=6), kernels().lib, _openmp(), torch.get_num_threads()
    shared = ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p) if openmp else None
    try:
        for threads, pool in [(1, shared), (2, shared), (5, shared), (2, None), (5, None)]:
            torch.set_num_threads(threads); lib.use_openmp(pool)
            for cold in (False, True):
                if cold and hasattr(os, "posix_fadvise"):
                    for f in s._files: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for x, y in zip(want.sample(), s.sample()): assert torch.equal(x, y)
    finally: torch.set_num_threads(before); lib.use_openmp(shared)


@pytest.mark.parametrize("way", WAYS)
def test_read_outside(store, way, monkeypatch):
    s = sampler_of(store, way, monkeypatch)
    with pytest.raises(IndexError): s.read(np.array([2]), np.array([0]))
    if way == "memory": return
    for row in (82, 10**9):  # The store's end lies at 4 episodes of 21 rows
        with pytest.raises(ConfigError, match="became shorter"): s.read(np.array([s.specs.index(CUP)]), np.array([row]))


def test_equal_and_unequal_episodes_are_numbered_alike(tmp_path):
    s = Store.create(tmp_path / "s").append("cup-catch", *episodes(CUP, 7)).append("walker-walk", *episodes(WALKER, 5))
    a, b = Sampler(s, seed=1), Sampler(s, seed=1)
    assert a._same == 18
    b._same = None
    for x, y in zip(a.draw(5000), b.draw(5000)): same(x, y)
    s.append("cup-catch", *episodes(CUP, 1, 2))
    assert Sampler(s, tasks="cup-catch")._same is None and Sampler(s, tasks="walker-walk")._same == 18


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_sampling_leaves_the_file_on_disk(tmp_path):
    "A store of 60 MB is read from all over, and the process hardly grows."
    s = Store.create(tmp_path / "s").append("walker-walk", *episodes(WALKER, 1000, 500))
    code = f"""
from tdmpc_opt_kit.benchmark import resident_mb
from tdmpc_opt_kit.data import Sampler
import numpy as np
s = Sampler({str(s.path)!r}, preload=False, batch_size=1000)
for _ in range(3): s.sample()
before = resident_mb()
for _ in range(100): s.sample()
print(resident_mb() - before)
"""
    for off in (None, "off"):
        env = {k: v for k, v in (os.environ | dict(TDMPC_KERNELS=off)).items() if v is not None}
        grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout)
        assert grown < 15, f"{grown} MB"


def test_seeds(mixed):
    draws = lambda **kw: torch.stack([Sampler(mixed, **kw).sample().index for _ in range(2)])
    assert torch.equal(*draws(seed=4)) and not torch.equal(draws(seed=4)[0], draws(seed=5)[0])


@pytest.mark.parametrize("kind", ["json", "torch"])
def test_resume_goes_on_exactly(mixed, kind, tmp_path):
    s = Sampler(mixed, balance="tasks", seed=9)
    s.sample()
    if kind == "json": state = json.loads(json.dumps(s.state_dict()))
    else:
        torch.save(s.state_dict(), tmp_path / "s.pt")
        state = torch.load(tmp_path / "s.pt", weights_only=True)
    want = [s.sample() for _ in range(3)]
    again = Sampler(mixed, balance="tasks", seed=0, preload=False).load_state_dict(state)
    for w in want:
        for x, y in zip(w, again.sample()): assert torch.equal(x, y)


def test_resume_refuses_other_data(store):
    state = Sampler(store).state_dict()
    store.append("cup-catch", *episodes(CUP, 1))
    with pytest.raises(ConfigError, match="slices"): Sampler(store).load_state_dict(state)
    with pytest.raises(ConfigError, match="balance"): Sampler(store, balance="tasks").load_state_dict(Sampler(store).state_dict())


def test_a_sampler_keeps_what_it_saw(store):
    "Appending does not disturb a sampler that runs."
    a, b = Sampler(store, seed=1, preload=False), Sampler(store, seed=1, preload=False)
    store.append("cup-catch", *episodes(CUP, 5, seed=4))
    for x, y in zip(a.sample(), b.sample()): assert torch.equal(x, y)


@pytest.mark.parametrize("kw, words", [
    (dict(tasks="walker-run"), "holds no episodes of walker-run"),
    (dict(tasks="walker-wlak"), "Did you mean 'walker-walk'"),
    (dict(horizon=21), "no episode of cup-catch has the 22 rows"),
    (dict(horizon=0), "horizon must be"),
    (dict(batch_size=0), "batch_size must be"),
    (dict(batch_size=2.5), "batch_size must be"),
    (dict(balance="episodes"), "balance must be"),
])
def test_bad_sampler(store, kw, words):
    with pytest.raises(ConfigError, match=words): Sampler(store, **kw)


@pytest.mark.parametrize("way", WAYS[1:])
def test_file_that_shrinks_while_it_is_read(store, way, monkeypatch):
    s = sampler_of(store, way, monkeypatch)
    os.truncate(store.path / "tasks/cup-catch/rows.bin", 50)
    with pytest.raises(ConfigError, match="became shorter"):
        for _ in range(5): s.sample()


@pytest.mark.cuda
def test_batches_on_a_gpu(mixed):
    a, b, c = Sampler(mixed, device="cuda", preload=True), Sampler(mixed, device="cuda", preload=False), Sampler(mixed)
    for x, y, z in zip(a.sample(), b.sample(), c.sample()): assert torch.equal(x.cpu(), z) and torch.equal(y.cpu(), z)


# --- collecting ---

class Envs:
    "In place of a `VecEnv`: observations say seed, task and decision; every other environment ends early if `early`."
    made, early = [], False
    def __init__(self, tasks, seeds, num_workers=None, max_steps=500):
        self.task, self.seeds, self.max_steps, self.num_envs = np.array([next(s.index for s in MT30 if s.name == t) for t in tasks]), np.array(seeds), max_steps, len(tasks)
        self.closed = False
        Envs.made.append(self)
    def close(self): self.closed = True
    def reset(self):
        self.t = np.zeros(self.num_envs, int)
        return self.obs()
    def obs(self):
        out = np.zeros((self.num_envs, 24), np.float32)
        out[:, 0], out[:, 1], out[:, 2] = self.seeds % 4096, self.task, self.t
        return out
    def step(self, action, active=None):
        active = np.ones(self.num_envs, bool) if active is None else active
        self.t += active
        end = np.where(self.early * (np.arange(self.num_envs) % 2 == 1), self.max_steps // 2, self.max_steps)
        done, last = active & (self.t == end), self.obs()
        self.t[done] = 0
        return self.obs(), np.where(active, action[:, 0], 0).astype(np.float32), done, dict(final_obs=last) if done.any() else {}


class Seedable(Envs):
    def reseed(self, seeds): self.seeds = np.array(seeds)


class Agent:
    def __init__(self, fail_at=None): self.calls, self.fail_at, self.first = 0, fail_at, []
    def act(self, obs, task, first):
        self.calls += 1
        if self.calls == self.fail_at: raise KeyboardInterrupt
        assert obs.dtype == torch.float32 and task.dtype == torch.int64 and first.dtype == torch.bool
        assert (obs[:, 1].long() == task).all()
        self.first.append(bool(first.all()))
        return torch.ones(len(obs), 6) * .5


ROLL = dict(tasks="walker-walk,cup-catch,pendulum-spin", max_steps=12, progress=False)


@pytest.mark.parametrize("envs", [Envs, Seedable])
@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, None])
def test_collect(tmp_path, envs, num_envs):
    Envs.made = []
    agent = Agent()
    s = collect(agent, episodes=4, store=tmp_path / "s", num_envs=num_envs, vec_env=envs, origin=dict(name="x", noise=.1), seed=3, **ROLL)
    assert [s.num_episodes(t.name) for t in (WALKER, CUP, PENDULUM)] == [4, 4, 4] and s.verify() == []
    assert s.origins == [dict(name="x", noise=.1, seed=3, max_steps=12)]
    assert all(e.closed for e in Envs.made)
    for t in (WALKER, CUP, PENDULUM):
        for i, e in enumerate(s.episodes(t)):
            got = s.episode(t, i)
            assert len(got.obs) == 13 and (got.obs[:, 0] == episode_seed(3, t.index, int(e["number"])) % 4096).all()
            assert np.isnan(got.action[0]).all() and np.isnan(got.reward[0]) and (got.action[1:] == .5).all() and e["return"] == 6
            if t.obs_dim > 2: assert got.obs[:, 2].tolist() == list(range(13))
        assert sorted(s.episodes(t)["number"].tolist()) == [0, 1, 2, 3]
    rounds = len(agent.first) // 12
    assert agent.first == ([True] + [False] * 11) * rounds
    if envs is Seedable and num_envs in (3, 7): assert len(Envs.made) <= 2  # Kept from round to round


@pytest.mark.parametrize("fail_at", [1, 12, 13, 30, 47])
def test_collect_resumes(tmp_path, fail_at):
    whole = collect(Agent(), episodes=4, store=tmp_path / "whole", num_envs=3, vec_env=Envs, **ROLL)
    Envs.made = []
    with pytest.raises(KeyboardInterrupt): collect(Agent(fail_at), episodes=4, store=tmp_path / "s", num_envs=3, vec_env=Envs, **ROLL)
    assert all(e.closed for e in Envs.made)
    assert Store(tmp_path / "s").num_episodes() == (fail_at - 1) // 12 * 3
    s = collect(Agent(), episodes=4, store=tmp_path / "s", num_envs=5, vec_env=Envs, **ROLL)
    for t in (WALKER, CUP, PENDULUM):
        a, b = (x.episodes(t) for x in (s, whole))
        assert sorted(a["number"].tolist()) == sorted(b["number"].tolist())
        for k in range(4): same(s.episode(t, a["number"].tolist().index(k)).obs, whole.episode(t, b["number"].tolist().index(k)).obs)
    agent = Agent()
    collect(agent, episodes=4, store=s, vec_env=Envs, **ROLL)
    assert agent.calls == 0  # Nothing is left to do
    assert collect(agent, episodes=5, store=s, vec_env=Envs, **ROLL).num_episodes() == 15  # One more of each


def test_collect_episodes_that_end_early(tmp_path):
    class Early(Envs): early = True
    s = collect(Agent(), "cup-catch", 4, tmp_path / "s", vec_env=Early, max_steps=12, progress=False)
    assert s.episodes("cup-catch")["length"].tolist() == [13, 7, 13, 7]
    assert s.episode("cup-catch", 1).obs[:, 2].tolist() == list(range(7))


def test_two_origins(tmp_path):
    s = collect(Agent(), episodes=2, store=tmp_path / "s", vec_env=Envs, origin="a", **ROLL)
    collect(Agent(), episodes=1, store=s, vec_env=Envs, origin="b", seed=1, **ROLL)
    assert s.episodes("cup-catch")["origin"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("kw, words", [
    (dict(seed=1), "'collect' is there with seed = 0, not 1"),
    (dict(max_steps=13), "'collect' is there with max_steps = 12, not 13"),
    (dict(episodes=0), "episodes must be"),
    (dict(num_envs=0), "num_envs must be"),
    (dict(tasks="cup-cach"), "Did you mean 'cup-catch'"),
])
def test_bad_collect(tmp_path, kw, words):
    collect(Agent(), episodes=1, store=tmp_path / "s", vec_env=Envs, **ROLL)
    before, agent = content(tmp_path / "s"), Agent()
    with pytest.raises(ConfigError, match=words): collect(agent, **(dict(episodes=2, store=tmp_path / "s", vec_env=Envs) | ROLL | kw))
    assert content(tmp_path / "s") == before and agent.calls == 0


def test_action_that_is_not_finite(tmp_path):
    class Broken(Agent):
        def act(self, obs, task, first): return super().act(obs, task, first) * torch.where(task[:, None] == 12, torch.nan, 1.)
    with pytest.raises(ConfigError, match="action for cup-catch is not finite at decision 1"): collect(Broken(), episodes=1, store=tmp_path / "s", vec_env=Envs, **ROLL)
    assert Store(tmp_path / "s").num_episodes() == 0


def test_collect_in_the_simulator(tmp_path):
    "The real vector env: interrupted or not, the same episodes."
    class Swing:
        def act(self, obs, task, first): return torch.sin(3 * obs[:, :6]).clamp(-1, 1)
    kw = dict(tasks="cup-catch,pendulum-spin", episodes=2, max_steps=20, progress=False, num_workers=1)
    whole = collect(Swing(), store=tmp_path / "whole", num_envs=4, **kw)
    collect(Swing(), store=tmp_path / "s", **(kw | dict(episodes=1)))
    s = collect(Swing(), store=tmp_path / "s", num_envs=1, **kw)
    for t in s.tasks:
        for k in range(2):
            a, b = (x.episode(t, x.episodes(t)["number"].tolist().index(k)) for x in (s, whole))
            for x, y in zip(a, b): np.testing.assert_allclose(x, y, atol=1e-6)
            assert np.isfinite(a.reward[1:]).all() and np.std(a.obs) > 0


# --- chunks ---

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def check(path, want):
    got = read_chunk(path)
    for k, w in want.items(): same(got[k], w.float().numpy() if w.dtype == torch.bfloat16 else w.numpy())
    for i, part in iter_chunk(path, episodes=2):
        n = len(part["task"])
        for k in ("obs", "action", "reward"): same(part[k], got[k][i:i + n])
        same(part["task"], np.asarray(got["task"]).reshape(len(got["task"]), -1)[i:i + n, 0])


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_types(tmp_path, dtype, old):
    want = chunk([3, 12, 29], dtype=dtype)
    torch.save(want, tmp_path / "c.pt", _use_new_zipfile_serialization=not old)
    check(tmp_path / "c.pt", want)


@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_integer_types(tmp_path, dtype):
    want = chunk([3, 12, 29], task_dtype=dtype)
    torch.save(want, tmp_path / "c.pt")
    check(tmp_path / "c.pt", want)
    assert convert_chunks(tmp_path / "c.pt", tmp_path / "s", progress=False).tasks == ("cheetah-run", "cup-catch", "pendulum-spin")


@pytest.mark.parametrize("span", [2**27, 5000], ids=["whole", "split"])
@pytest.mark.parametrize("how", ["slice", "shared", "transposed", "repeated", "one a piece", "long file"])
def test_layouts(tmp_path, how, span, monkeypatch):
    "Tensors need not fill their storage, in this order."
    monkeypatch.setattr(data, "_SPAN", span)
    want = chunk([3, 12, 29, 0])
    x = dict(want)
    if how == "slice": x = {k: torch.cat([v[:1], v, v])[1:5] for k, v in want.items()}
    if how == "shared":
        both = torch.cat([want["obs"], want["action"], want["reward"][..., None]], -1)
        x.update(obs=both[..., :24], action=both[..., 24:30], reward=both[..., 30])
    if how == "transposed": x.update(obs=want["obs"].permute(2, 1, 0).contiguous().permute(2, 1, 0), action=want["action"].transpose(0, 1).contiguous().transpose(0, 1))
    if how == "repeated": x.update(task=want["task"][:, :1].expand(-1, 501))
    if how == "one a piece": x.update(task=want["task"][:, 0].clone()); want = x
    if how == "long file": x["more"] = torch.zeros(1000)
    torch.save(x, tmp_path / "c.pt")
    check(tmp_path / "c.pt", want)


class Runs:
    "Leaves a mark when it is unpickled without care."
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call


def test_no_code_is_run(tmp_path):
    mark = tmp_path / "mark"
    calls = [(os.system, (f"touch {mark}",)), (eval, (f"open({str(mark)!r}, 'w')",)), (exec, (f"open({str(mark)!r}, 'w')",)), (open, (str(mark), "w")),
             (getattr, ("a", "upper")), (subprocess.Popen, (["touch", str(mark)],)), (torch.load, (str(mark),)), (__import__, ("os",)),
             (torch.storage._load_from_bytes, (b"",)), (pickle.loads, (b"",)), (Path, (str(mark),)), (np.frombuffer, (b"1234",))]
    for i, (f, args) in enumerate(calls):
        for old in (False, True):
            path = tmp_path / f"c{i}{old}.pt"
            torch.save(chunk([3]) | dict(more=Runs(f, args)), path, _use_new_zipfile_serialization=not old)
            with pytest.raises(ConfigError) as e: read_chunk(path)
            assert path.name in str(e.value) and "does not need" in str(e.value), e.value
    assert not mark.exists()


@pytest.mark.parametrize("program", [
    b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R.",
    b"cos\nsystem\n(S'echo'\ntR.",
    b"(S'echo'\nios\nsystem\n.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04echo\x85R.",
    b"\x80\x04\x8c\x08builtins\x8c\x0cset.__class__\x93)R.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01s\x86b.",
    b"\x80\x02ctensordict._td\nTensorDict\n)\x81}X\x0b\x00\x00\x00_tensordictK\x01sb.",
    b"\x80\x02K\x01.", b"\x80\x02N.", b"\x80\x02}.", b".", b"", b"\x80", b"\x80\x02X\xff\xff\xff\x7f.", b"\x80\x02(((((.", b"\x80\x02Q.",
    b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ.",
])
def test_hand_written_programs(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as z: z.writestr("c/data.pkl", program)
    with pytest.raises(ConfigError, match="c.pt"): read_chunk(tmp_path / "c.pt")
    assert data._admitted(None)["torch", "FloatStorage"] == "float32"  # Nothing was left behind


def test_files_that_are_no_chunks(tmp_path):
    good = tmp_path / "good.pt"
    torch.save(chunk([3, 12]), good)
    whole = good.read_bytes()
    cases = {"none.pt": (None, "no such file"), "empty.pt": (b"", "is empty"), "text.pt": (b"hello, this is not it", "not a file written by torch.save"),
             "page.pt": (b"<!DOCTYPE html><html>404</html>", "not a file written by torch.save"), "old.pt": (b"\x80\x02\x8a\x0aabcdefghijkl", "old.pt")}
    for name, (content, words) in cases.items():
        if content is not None: (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=words) as e: read_chunk(tmp_path / name)
        assert name in str(e.value)
    for n in (4, 100, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:n])
        with pytest.raises(ConfigError, match="cut.pt.*truncated or damaged"): read_chunk(tmp_path / "cut.pt")
    torch.save(chunk([3, 12]), good, _use_new_zipfile_serialization=False)
    whole = good.read_bytes()
    for n in (20, 100, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:n])
        with pytest.raises(ConfigError, match="cut.pt"): read_chunk(tmp_path / "cut.pt")


@pytest.mark.parametrize("change, words", [
    (dict(obs=None), "'obs' is missing; there are action, reward, task"),
    (dict(task=None), "'task' is missing"),
    (dict(obs=torch.zeros(2, 501, 25)), r"obs has shape \[2, 501, 25\], expected \[episodes, 501, 24\]"),
    (dict(obs=torch.zeros(2, 101, 24)), r"obs has shape \[2, 101, 24\]"),
    (dict(obs=torch.zeros(())), "obs has shape"),
    (dict(action=torch.zeros(3, 501, 6)), r"action has shape \[3, 501, 6\]"),
    (dict(reward=torch.zeros(2, 501, 1)), r"reward has shape \[2, 501, 1\]"),
    (dict(task=torch.zeros(2, 500, dtype=torch.int64)), "task has shape"),
    (dict(task=torch.zeros(2, 501)), "task has type float32, expected integers"),
    (dict(reward=torch.zeros(2, 501, dtype=torch.int64)), "reward has type int64, expected floats"),
    (dict(task=torch.tensor([3, 30])), "episode 1 has task 30"),
    (dict(task=torch.tensor([-1, 3])), "episode 0 has task -1"),
    (dict(task=torch.tensor([255, 3], dtype=torch.uint8)), "episode 0 has task 255"),
    (dict(task=(torch.arange(1002) // 700).reshape(2, 501)), "task changes within episode 1"),
    (dict(obs=[1, 2]), "'obs' is missing"),
])
def test_wrong_entries(tmp_path, change, words):
    x = {k: v for k, v in (chunk([3, 12]) | change).items() if v is not None}
    torch.save(x, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=words) as e: read_chunk(tmp_path / "c.pt")
    assert "c.pt" in str(e.value)


def test_other_pickles(tmp_path):
    for x in (torch.zeros(3), [1, 2], dict(model=dict(a=torch.zeros(2))), None):
        torch.save(x, tmp_path / "c.pt")
        with pytest.raises(ConfigError, match="c.pt"): read_chunk(tmp_path / "c.pt")


def repack(source, target, change):
    "Copy a zip file with some members changed or left out (None)."
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, "w") as b:
        for i in a.infolist():
            content = change(i.filename.split("/", 1)[1], a.read(i))
            if content is not None: b.writestr(i.filename, content)


def test_damaged_members(tmp_path):
    torch.save(chunk([3, 12]), tmp_path / "good.pt")
    bad = tmp_path / "bad.pt"
    for change, words in [(lambda n, c: None if n == "data/0" else c, "storage '0' is missing"), (lambda n, c: c[:-8] if n == "data/1" else c, "storage '1' has"),
                          (lambda n, c: None if n == "data.pkl" else c, "no data.pkl")]:
        repack(tmp_path / "good.pt", bad, change)
        with pytest.raises(ConfigError, match=words): read_chunk(bad)
    with zipfile.ZipFile(tmp_path / "good.pt") as a, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as b:
        for i in a.infolist(): b.writestr(i.filename, a.read(i))
    with pytest.raises(ConfigError, match="compressed"): read_chunk(bad)


def test_a_tensor_may_not_reach_outside(tmp_path):
    "Shapes of a pickle are only claims; beyond the storage lie other parts of the file."
    torch.save(chunk([3, 12]), tmp_path / "good.pt")
    grow = lambda n, c: c.replace(b"M\xf5\x01K\x18\x87", b"M\xf6\x01K\x18\x87") if n == "data.pkl" else c  # 501 x 24 becomes 502 x 24
    repack(tmp_path / "good.pt", tmp_path / "bad.pt", grow)
    with pytest.raises(ConfigError, match="bad.pt: a tensor of shape .* reaches outside"): read_chunk(tmp_path / "bad.pt")


def test_other_byte_order(tmp_path):
    want = chunk([3, 12])
    torch.save(want, tmp_path / "little.pt")
    def turn(name, content):
        if name == "byteorder": return b"big"
        if name.startswith("data/"): return np.frombuffer(content, "<i8" if name == "data/3" else "<f4").astype(">i8" if name == "data/3" else ">f4").tobytes()
        return content
    repack(tmp_path / "little.pt", tmp_path / "big.pt", turn)
    check(tmp_path / "big.pt", want)


# --- converting ---

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "chunks").mkdir()
    for i, name in enumerate(["chunk_10.pt", "chunk_2.pt"]): torch.save(chunk([12, 1, 12, 29, 1], i), tmp_path / "chunks" / name)
    (tmp_path / "chunks/README.md").write_text("not a chunk")
    return tmp_path / "chunks"


def test_convert_in_order_of_numbers(folder, tmp_path):
    s = convert_chunks(folder, tmp_path / "s", progress=False)
    assert [o["name"] for o in s.origins] == ["chunk_2.pt", "chunk_10.pt"]
    assert s.episodes("cup-catch")["number"].tolist() == [0, 2, 0, 2] and s.episodes("cup-catch")["origin"].tolist() == [0, 0, 1, 1]
    assert s.dtype == "float32" and s.verify() == []


@pytest.mark.parametrize("stop", range(1, 6))
def test_convert_resumes(folder, tmp_path, stop, monkeypatch):
    monkeypatch.setattr(data, "_SPAN", 2 * 501 * (31 * 4 + 8))  # Two episodes at a time
    whole = convert_chunks(folder, tmp_path / "whole", progress=False)
    real, calls = Store.commit, [0]
    def interrupted(self, *a, **kw):
        calls[0] += 1
        if calls[0] == stop: raise KeyboardInterrupt
        return real(self, *a, **kw)
    monkeypatch.setattr(Store, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt): convert_chunks(folder, tmp_path / "s", progress=False)
    monkeypatch.setattr(Store, "commit", real)
    assert Store(tmp_path / "s").num_episodes() == [0, 2, 4, 5, 7][stop - 1]
    convert_chunks(folder, tmp_path / "s", progress=False)
    assert content(tmp_path / "s") == content(whole.path)


def test_bad_convert(folder, tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"): convert_chunks(tmp_path / "none", tmp_path / "s")
    (tmp_path / "void").mkdir()
    with pytest.raises(ConfigError, match="no chunk files"): convert_chunks(tmp_path / "void", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    s = convert_chunks(folder, tmp_path / "s", progress=False)
    before = content(s.path)
    torch.save(chunk([0], 9), folder / "chunk_2.pt")
    with pytest.raises(ConfigError, match="chunk_2.pt: the store has episodes of another file"): convert_chunks(folder, s, progress=False)
    with pytest.raises(ConfigError, match="holds float32, not float16"): convert_chunks(folder, s.path, dtype="float16", progress=False)
    assert content(s.path) == before


@pytest.mark.parametrize("field, value, words", [
    ("obs", torch.nan, "episodes 0 to 3: cup-catch: obs is nan in row 7 of episode 1"),
    ("reward", torch.inf, "cup-catch: reward is inf"),
])
def test_bad_values_in_a_chunk(tmp_path, field, value, words):
    x = chunk([12, 1, 12, 29])
    x[field][2, 7] = value
    torch.save(x, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=words): convert_chunks(tmp_path / "c.pt", tmp_path / "s", progress=False)


def test_chunk_of_other_tasks(tmp_path):
    x = chunk([12, 12])
    x["obs"][1, :, 20] = 1.
    torch.save(x, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="cup-catch has values beyond its 8 entries"): convert_chunks(tmp_path / "c.pt", tmp_path / "s", progress=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("turned", [False, True])
def test_converted_bytes(tmp_path, dtype, turned):
    "Byte by byte what copying the chunk plainly gives, checksums and returns included."
    x = chunk(np.random.default_rng(0).integers(0, 30, 90).tolist(), dtype=getattr(torch, dtype))
    x["reward"] = (x["reward"] * 64).round() / 64  # Sums are exact, in whatever order
    want = {k: v.numpy() for k, v in x.items()}
    if turned: x["obs"] = x["obs"].transpose(0, 1).contiguous().transpose(0, 1)
    torch.save(x, tmp_path / "c.pt")
    s = convert_chunks(tmp_path / "c.pt", tmp_path / "s", progress=False)
    assert s.dtype == dtype and len(s.tasks) > 25
    for t in s.tasks:
        spec = MT30[[m.name for m in MT30].index(t)]
        at = np.flatnonzero(want["task"][:, 0] == spec.index)
        rows = [np.concatenate([want["obs"][e][:, :spec.obs_dim], want["action"][e][:, :spec.action_dim], want["reward"][e][:, None]], 1) for e in at]
        assert (s.path / "tasks" / t / "rows.bin").read_bytes() == b"".join(r.tobytes() for r in rows)
        table = np.array([(501 * i, want["reward"][e][1:].astype(np.float64).sum(), 501, 0, e, zlib.crc32(rows[i].tobytes())) for i, e in enumerate(at)], EPISODE)
        assert (s.path / "tasks" / t / "episodes.bin").read_bytes() == table.tobytes()
        assert s.manifest["tasks"][t]["crc"] == zlib.crc32(table.tobytes())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_converting(tmp_path):
    "A process that converts a 200 MB file, most of it one stride away from the next number, stays far below the file's size above its start."
    n = 3000
    x = {k: v.repeat_interleave(n // 3, 0) for k, v in chunk([3, 12, 29], dtype=torch.float16).items()}
    x["obs"] = x["obs"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    torch.save(x, tmp_path / "c.pt")
    code = f"""
from tdmpc_opt_kit import data
data._SPAN = 2**23
peak = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))  # getrusage counts what the parent had, too
before = peak()
data.convert_chunks({str(tmp_path / 'c.pt')!r}, {str(tmp_path / 's')!r}, progress=False)
print((peak() - before) // 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < 80, f"{out} MB"
    assert Store(tmp_path / "s").num_episodes() == n


# --- what a store holds ---

def test_card_and_figures(store, tmp_path):
    text = card(store)
    for words in ("6 episodes of 2 tasks", "146 rows", "cup-catch", "walker-walk", "b: 2 episodes", "noise 0.3"): assert words in text
    assert card(store.path) == text
    rows = {r["task"]: r for r in store.summary()}
    assert rows["cup-catch"]["episodes"] == 4 and rows["cup-catch"]["bytes"] == 4 * 21 * 11 * 4
    np.testing.assert_allclose(rows["walker-walk"]["mean"], store.returns("walker-walk").mean())
    figs = figures(store)
    assert sum(sum(t.y) for t in figs["episodes"].data) == 6 and {t.name for t in figs["episodes"].data} == {"a", "b"}
    assert sum(sum(t.y) for t in figures(store, origins=False)["episodes"].data) == 6
    empty = Store.create(tmp_path / "empty")
    assert "0 episodes" in card(empty) and len(figures(empty)) == 2
