"""Open-loop model error: zero for exact dynamics, that of standing still for the identity, by task and by start. Latents: CKA, probes, embeddings, maps."""
import os, time
import numpy as np
import pytest
import torch
from torch import nn

from tdmpc_opt_kit.analyze import Episode, ModelError, cka, episodes_of, latents, linear_cka, model_error, open_loop, probe, project, quantities, slices, task_similarity, thin, values
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

# ---------------------------------------------------------------- latents

def gram_cka(X, Y):
    "Linear CKA by its other formula: HSIC of centred Gram matrices."
    H = np.eye(len(X)) - 1 / len(X)
    K, L = H @ X @ X.T @ H, H @ Y @ Y.T @ H
    return np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L))

def test_cka_is_that_of_gram_matrices_and_ignores_rotation_and_scale():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(70, 12)) * np.arange(1, 13) + 3
    Y = X[:, :5] @ rng.normal(size=(5, 9)) + 4 * rng.normal(size=(70, 9))
    turn, shear = np.linalg.qr(rng.normal(size=(9, 9)))[0], np.diag(np.arange(1., 10)**2)
    assert 0.05 < linear_cka(X, Y) < 0.95
    assert linear_cka(X, Y) == pytest.approx(gram_cka(X, Y), abs=1e-10) == pytest.approx(linear_cka(Y, X), abs=1e-10)
    assert linear_cka(X, -2 * Y @ turn + 7) == pytest.approx(linear_cka(X, Y), abs=1e-10)
    assert abs(linear_cka(X, Y @ shear) - linear_cka(X, Y)) > 0.01, "invariant to turning, not to every linear map"
    assert linear_cka(X, X) == pytest.approx(1) and np.isnan(linear_cka(X, np.ones((70, 3))))

def test_cka_of_episodes_has_an_interval_and_a_floor():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a = [rng.normal(size=(n, 6)) * [5, 1, 1, 1, 1, 1] for n in (60, 80, 50)]
    noisy = [x @ turn + rng.normal(size=x.shape) for x in a]
    got = cka(a, noisy, 200)
    assert got["value"] == pytest.approx(gram_cka(np.concatenate(a), np.concatenate(noisy)), abs=1e-9)
    assert got["low"] < got["value"] < got["high"] <= 1 and got["floor"] < 0.3 < got["low"]
    same = [a[0]] * 3  # Episodes that take the very same course say nothing about the two models
    assert cka(same, [x @ turn for x in same])["floor"] == pytest.approx(1)
    assert cka(a, noisy, 200) == got and cka(a[:1], noisy[:1])["low"] is None

def test_probe_reads_what_is_planted_and_no_more():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(8), 40)
    Z = rng.normal(size=(320, 20)).astype("f4")
    who = rng.normal(size=(8, 6))[groups]  # Features that only tell which episode it is
    q = dict(planted=3 + Z @ rng.normal(size=20), half=Z[:, 0] + rng.normal(size=320), noise=rng.normal(size=320), luck=rng.normal(size=8)[groups], still=np.full(320, 2.))
    got = probe(np.concatenate([Z, who], 1), q, groups)
    assert list(got) == ["planted", "half", "noise", "luck"] and got["planted"]["r2"] > 0.999
    assert 0.3 < got["half"]["r2"] < 0.6 and got["noise"]["r2"] < 0.05
    assert got["luck"]["r2"] < 0.3, "rows of an episode are on one side: what is the same all through an episode cannot be looked up"
    assert len(got["half"]["folds"]) == 4 and min(got["half"]["folds"]) <= got["half"]["r2"] <= max(got["half"]["folds"])
    with pytest.raises(ConfigError, match="at least 2"): probe(Z, q, np.zeros(320))

def test_probe_equals_a_regression_by_hand():
    "One part held out at a time, predicted by the normal equations with scikit-learn's chosen penalty all but absent."
    rng, groups = np.random.default_rng(1), np.repeat([0, 1], 100)
    Z = rng.normal(size=(200, 3))
    y = Z @ [1., -2, 0.5] + 0.01 * rng.normal(size=200)
    wrong = spread = 0
    for k in (0, 1):
        A, B = (np.c_[Z[groups != k], np.ones(100)], y[groups != k]), (np.c_[Z[groups == k], np.ones(100)], y[groups == k])
        w = np.linalg.lstsq(*A, rcond=None)[0]
        wrong, spread = wrong + ((B[0] @ w - B[1])**2).sum(), spread + ((B[1] - A[1].mean())**2).sum()
    assert probe(Z, dict(y=y), groups)["y"]["r2"] == pytest.approx(1 - wrong / spread, abs=1e-5)

def embedded(vectors, tasks):
    m = WorldModel(model_size("tiny", task_dim=len(vectors[0])), tasks).eval()
    with torch.no_grad(): m.task_emb.weight.copy_(torch.tensor(vectors))
    return m

def test_similar_tasks_come_beside_each_other():
    tasks = ["walker-walk", "cup-catch", "walker-run", "cup-spin", "reacher-easy"]
    m = embedded([[1., 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0.1, 0.9, 0.1], [0, 0, 0.5]], tasks)
    for linkage in ("average", "complete", "single"):
        s = task_similarity(m, linkage=linkage)
        at = s.tasks.index
        assert sorted(s.tasks) == sorted(tasks) and abs(at("walker-walk") - at("walker-run")) == abs(at("cup-catch") - at("cup-spin")) == 1
        for i, a in enumerate(s.tasks):
            for j, b in enumerate(s.tasks):
                x, y = (m.task_emb.weight[tasks.index(t)].detach().numpy() for t in (a, b))
                assert s.cosine[i, j] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
        assert s.linkage[0, 2] == pytest.approx(1 - s.cosine[np.triu_indices(5, 1)].max(), abs=1e-6), "the nearest two are joined first"
    assert task_similarity(m, "cup-spin,walker-run").tasks in (["cup-spin", "walker-run"], ["walker-run", "cup-spin"])
    with pytest.raises(ConfigError, match="does not know hopper-hop"): task_similarity(m, "hopper-hop,cup-spin")
    with pytest.raises(ConfigError, match="two or more"): task_similarity(m, "cup-spin")
    with pytest.raises(ConfigError, match="linkage is"): task_similarity(m, linkage="ward")

@pytest.fixture(scope="module")
def played():
    torch.manual_seed(0)
    m = WorldModel(SIZES["tiny"]).eval()
    return m, episodes_of(m, "walker-walk,cup-catch,fish-swim,hopper-hop,finger-spin", 2, max_steps=25)

def test_quantities_are_those_of_the_simulator(played):
    _, eps = played
    of = {e.task: (e, quantities(e)) for e in eps}
    for e, q in of.values(): assert all(v.shape == (26,) and np.isfinite(v).all() for v in q.values()) and len(q) >= 8
    e, q = of["walker-walk"]  # observed: orientations, height, velocities
    assert np.allclose(q["torso height, m"], e.obs[:, 14], atol=1e-5) and np.allclose(q["rootx speed, m/s"], e.obs[:, 16], atol=1e-5)
    assert np.allclose(q["uprightness, cosine"], e.obs[:, 0], atol=1e-5) and np.allclose(q["cos rooty"], q["uprightness, cosine"], atol=1e-5)
    e, q = of["cup-catch"]
    assert np.allclose(q["ball_z, m"], e.obs[:, 3], atol=1e-5) and "root speed, m/s" in of["fish-swim"][1]
    other = Episode(e.task, e.seed + 1, e.noise, e.obs, e.action, e.reward)
    with pytest.raises(ConfigError, match="another way"): quantities(other)

def test_latents_and_values_are_the_models(played):
    m, eps = played
    models = TaskModels(m)
    for e, z, v in zip(eps, latents(models, eps), values(models, eps)):
        spec, = task_set(e.task)
        task = torch.full((26,), spec.index)
        want = m.encode(torch.from_numpy(e.obs), task)
        assert np.allclose(z, want.detach(), atol=1e-6) and v.shape == (26,) and np.isfinite(v).all()
    with pytest.raises(ConfigError, match="No model for .*cup-catch"): latents(TaskModels(WorldModel(SIZES["tiny"], "walker-walk,walker-run")), eps)

def test_slices_are_pieces_of_their_episodes(played):
    m, eps = played
    b = slices(eps, 6, 15, seed=3)
    assert b.obs.shape == (7, 75, 24) and b.task.unique().numel() == 5
    starts = set()
    for i in range(75):
        e, t = next((e, t) for e in eps for t in range(20) if np.array_equal(e.obs[t:t + 7], b.obs[:, i].numpy()))
        assert MT30[int(b.task[i])].name == e.task and np.array_equal(e.action[t + 1:t + 7], b.action[:, i].numpy()) and np.array_equal(e.reward[t + 1:t + 7], b.reward[:, i, 0].numpy())
        starts.add((e.task, e.seed, t))
    assert len({s[1] for s in starts}) == 10 and len(starts) > 40, "from all episodes, and all times"
    assert torch.equal(slices(eps, 6, 15, seed=3).obs, b.obs) and not torch.equal(slices(eps, 6, 15, seed=4).obs, b.obs)
    assert slices(eps, 25, 3).obs.shape[0] == 26
    with pytest.raises(ConfigError, match="have no 26 steps"): slices(eps, 26)

def test_map_is_computed_once(tmp_path):
    rng = np.random.default_rng(0)
    Z = np.concatenate([rng.normal(size=(40, 10)), rng.normal(size=(40, 10)) + 8]).astype("f4")
    one = project(Z, cache=tmp_path)
    C = Z - Z.mean(0)
    assert np.allclose(np.abs(one.xy), np.abs(C @ np.linalg.svd(C, full_matrices=False)[2][:2].T), atol=1e-3) and 0.5 < sum(one.share) <= 1 and not one.cached
    again, = (project(Z, cache=tmp_path),)
    assert again.cached and np.array_equal(again.xy, one.xy) and again.share == one.share
    file, = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    third = project(Z, cache=tmp_path)
    assert not third.cached and np.array_equal(third.xy, one.xy) and project(Z, cache=tmp_path).cached
    assert not project(Z[:-1], cache=tmp_path).cached and not project(Z, seed=1, cache=tmp_path).cached
    assert len(list(tmp_path.iterdir())) == 3 and not project(Z, cache=False).cached and len(list(tmp_path.iterdir())) == 3
    for bad, said in ((dict(method="LDA"), "method is one of"), (dict(method="t-SNE", neighbours=27), "too many for 80 points"), (dict(method="UMAP", neighbours=1), "at least 2")):
        with pytest.raises(ConfigError, match=said): project(Z, cache=tmp_path, **bad)

def test_tsne_keeps_clusters_apart_and_can_be_ended(tmp_path):
    rng = np.random.default_rng(0)
    Z = np.concatenate([rng.normal(size=(40, 10)), rng.normal(size=(40, 10)) + 8]).astype("f4")
    heard = []
    p = project(Z, "t-SNE", 10, cache=tmp_path, tell=lambda *a: heard.append(a))
    a, b = p.xy[:40], p.xy[40:]
    assert np.linalg.norm(a.mean(0) - b.mean(0)) > 2 * max(a.std(), b.std()) and heard[-1][1] == 1000
    class Enough(Exception): pass
    def tell(*a): raise Enough
    before = time.monotonic()
    with pytest.raises(Enough): project(Z, "t-SNE", 11, cache=tmp_path, tell=tell)
    assert time.monotonic() - before < 5 and len(list(tmp_path.iterdir())) == 1, "nothing half done is kept"
    with pytest.raises(ChildProcessError): os.waitpid(-1, os.WNOHANG)  # no child is left

def test_thin_is_even():
    rows = thin([500, 500, 20], 90)
    assert [len(r) for r in rows] == [30, 30, 20] and rows[0][0] == 1 and rows[0][-1] == 500 and np.ptp(np.diff(rows[0])) <= 1 and rows[2].tolist() == list(range(1, 21))
