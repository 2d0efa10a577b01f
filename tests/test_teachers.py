"""Teachers and annotations: what is written down is what they say, whatever interrupts the writing."""
import json
import os

import numpy as np
import pytest
import torch

from tdmpc_opt_kit import teachers as module
from tdmpc_opt_kit.agent import TaskModels
from tdmpc_opt_kit.checkpoint import save_upstream, save_world_model
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.data import Batch, Sampler, Store
from tdmpc_opt_kit.planner import plan_config
from tdmpc_opt_kit.tasks import MT30, task_set
from tdmpc_opt_kit.teachers import WHAT, Annotations, Asked, Kept, annotate, annotation_keys, answers, load_teachers, plan_order, untaught
from tdmpc_opt_kit.world_model import WorldModel, model_size

TASKS = ("walker-walk", "cup-catch", "cup-spin", "pendulum-spin")  # Nobody teaches cup-spin
TAUGHT = [t for t in TASKS if t != "cup-spin"]
QUICK = plan_config("tiny")
ALL = tuple(WHAT)
FIELDS = ("reward", "value", "mean", "log_std")


def model(tasks, size="tiny", **kw):
    m = WorldModel(model_size(size, **kw), tasks).eval().requires_grad_(False)
    for last in (m.pi_head[-1].weight, m.reward_head[-1].weight, m.q_heads[-1].weight): last.copy_(torch.randn(last.shape) / 8)
    return m


def specialist(task, size="tiny"):
    s, = task_set(task)
    return model(task, size, task_dim=0, obs_dim=s.obs_dim, action_dim=s.action_dim)


def fill(store, task, lengths, seed=0):
    "Add made-up episodes of some numbers of decisions."
    spec, rng = task_set(task)[0], np.random.default_rng(seed)
    parts = [[rng.uniform(-1, 1, (n + 1, *w)).astype(np.float32) for n in lengths] for w in ((spec.obs_dim,), (spec.action_dim,), ())]
    for a, r in zip(*parts[1:]): a[0], r[0] = np.nan, np.nan
    store.append(task, *parts, origin="noise")


def make_store(path, seed=0, dtype="float32"):
    store = Store.create(path, dtype)
    for i, t in enumerate(TASKS): fill(store, t, (20, 7, 33), seed + i)
    return store


@pytest.fixture
def store(tmp_path): return make_store(tmp_path / "store")


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    return TaskModels({"walker-walk": model("walker-run,walker-walk", "0.2M"), "cup-catch": specialist("cup-catch"), "pendulum-spin": specialist("pendulum-spin", "0.4M")})


def every_slice(store, horizon=3):
    "A batch with each slice that there is."
    s = Sampler(store, horizon=horizon)
    return s.read(*(np.concatenate(x) for x in zip(*((np.full(len(r), j), r) for j, t in enumerate(s.specs) for r in [starts(store, t, horizon)]))))


def starts(store, task, horizon): return np.concatenate([e["start"] + np.arange(max(e["length"] - horizon, 0)) for e in store.episodes(task)]).astype(np.int64)


def agree(read, asked):
    "Equal within the rounding of float16."
    assert torch.equal(read.known, asked.known)
    for f in FIELDS:
        a, b = getattr(asked, f), getattr(read, f)
        assert a.shape == b.shape and b.dtype == torch.float32 and b.is_contiguous()
        assert (a - b).abs().le(a.abs() * (1e-5 if f == "reward" else 2**-11) + 1e-5).all(), f


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("horizon", [1, 3, 6])
def test_written_down_is_what_they_say(tmp_path, teachers, dtype, horizon):
    "Several teachers of several sizes, a task without one, every slice, first and last rows of episodes included."
    store = make_store(tmp_path / "s", dtype=dtype)
    annotate(store, teachers, ("reward", "value", "policy"), batch_size=13, piece=30, progress=False)
    batch = every_slice(store, horizon)
    asked, read = Asked(teachers, ("reward", "value", "policy"))(batch), Annotations(store, teachers, ("reward", "value", "policy"))(batch)
    agree(read, asked)
    spin = batch.task == task_set("cup-spin")[0].index
    assert torch.equal(read.known, ~spin) and spin.any()
    assert all((getattr(read, f)[:, spin] == 0).all() and (getattr(asked, f)[:, spin] == 0).all() for f in FIELDS)
    assert read.reward[:, ~spin].abs().min() > 0 and torch.allclose(read.value[:, ~spin].exp().sum(-1), torch.ones(()), atol=2e-3)
    assert read.plan is None and Annotations(store, teachers, "reward")(batch).mean is None


def test_answers_are_the_models_own(teachers, store):
    "Against the model's methods, slice by slice, and the mean of softmaxes for the value."
    batch = every_slice(store)
    said = Asked(teachers, ("reward", "value", "policy"))(batch)
    for i in range(0, len(batch.task), 17):
        spec = MT30[int(batch.task[i])]
        if spec.name not in TAUGHT: continue
        m, own = teachers.model_for(spec), teachers.own[spec.index][None]
        for h in range(3):
            obs, action = batch.obs[h, i:i+1, :m.cfg.obs_dim], batch.action[h, i:i+1, :m.cfg.action_dim]
            z = m.encode(obs, own)
            assert torch.allclose(said.value[h, i].exp(), m.Q(z, action, own).softmax(-1).mean(0)[0], atol=1e-5)
            assert torch.allclose(said.reward[h, i], teachers.reward(batch.obs[h, i:i+1], batch.action[h, i:i+1], batch.task[i:i+1])[0], atol=1e-5)
        mean, log_std, _ = teachers.policy(batch.obs[:, i], batch.task[i:i+1].expand(4))
        assert torch.allclose(said.mean[:, i], mean, atol=1e-5) and torch.allclose(said.log_std[:, i], log_std, atol=1e-5)


def test_rows_without_an_action(store, teachers):
    "The last row of an episode has no reward and no value, but a policy; no action crosses into it from the next episode."
    annotate(store, teachers, ("reward", "value", "policy"), progress=False)
    for t in TAUGHT:
        k, e = Kept(store, t, annotation_keys(teachers, task_set(t))[t]), store.episodes(t)
        last = e["start"] + e["length"] - 1
        reward, value = np.fromfile(k.file("reward"), np.float32), np.fromfile(k.file("value"), np.float16).reshape(-1, 101)
        mean = np.fromfile(k.file("mean"), np.float16).reshape(-1, 6)
        assert len(reward) == len(value) == len(mean) == store.num_rows(t)
        assert (np.flatnonzero(reward == 0) == last).all() and (np.flatnonzero((value == 0).all(1)) == last).all()
        assert np.isfinite(reward).all() and np.isfinite(value).all() and (mean[last][:, 0] != 0).all()


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_interrupted_work_goes_on(store, teachers, tmp_path, monkeypatch, after):
    "Stopped in the middle, nothing that was counted is asked again, and the files end as without the interruption."
    import shutil
    shutil.copytree(store.path, tmp_path / "other")
    kw = dict(what=("reward", "value", "policy"), batch_size=8, piece=16, progress=False)
    whole = annotate(tmp_path / "other", teachers, **kw)
    real, calls = module.answers, []
    def tired(*args):
        if len(calls) >= after: raise KeyboardInterrupt
        calls.append(len(args[1]))
        return real(*args)
    monkeypatch.setattr(module, "answers", tired)
    with pytest.raises(KeyboardInterrupt): annotate(store, teachers, **kw)
    monkeypatch.setattr(module, "answers", real)
    keys = annotation_keys(teachers, teachers.tasks)
    counted = sum(Kept(store, t, keys[t]).rows("value") for t in TAUGHT)
    assert counted == 16 * (after // 2)
    assert annotate(store, teachers, **kw)["rows"] == whole["rows"] - counted
    for t in TAUGHT:
        for f in FIELDS: assert Kept(store, t, keys[t]).file(f).read_bytes() == (tmp_path / "other" / "annotations" / keys[t] / t / f"{f}.bin").read_bytes()
    assert annotate(store, teachers, **kw)["rows"] == 0


def test_rows_of_a_crash_are_computed_again(store, teachers):
    "Bytes behind those that the manifest counts are written over."
    annotate(store, teachers, "policy", "cup-catch", progress=False)
    k = Kept(store, "cup-catch", annotation_keys(teachers, task_set("cup-catch"))["cup-catch"])
    before = k.file("mean").read_bytes()
    m = json.loads((k.path / "manifest.json").read_text())
    m["rows"]["mean"] = m["rows"]["log_std"] = 20
    (k.path / "manifest.json").write_text(json.dumps(m))
    k.file("mean").write_bytes(before[:20 * 12] + b"\xff" * 700)
    with pytest.raises(ConfigError, match="20 of 63 rows with mean"): Annotations(store, teachers, "policy", specs="cup-catch")
    assert annotate(store, teachers, "policy", "cup-catch", progress=False)["rows"] == 43
    assert np.allclose(np.frombuffer(k.file("mean").read_bytes(), np.float16), np.frombuffer(before, np.float16), atol=1e-3)


def test_only_appended_rows_are_computed(store, teachers, monkeypatch):
    "Also what was not asked the first time is caught up with, by itself."
    annotate(store, teachers, "policy", progress=False)
    fill(store, "cup-catch", (11, 4), seed=77)
    with pytest.raises(ConfigError, match="cup-catch has 63 of 80 rows with mean"): Annotations(store, teachers, "policy")
    asked, real = [], module.answers
    def note(m, obs, action, own, what):
        asked.append((len(obs), tuple(what)))
        return real(m, obs, action, own, what)
    monkeypatch.setattr(module, "answers", note)
    done = annotate(store, teachers, "policy", progress=False)
    assert asked == [(17, ("policy",))] and done["tasks"] == {"walker-walk": 0, "cup-catch": 17, "pendulum-spin": 0}
    fill(store, "cup-catch", (5,), seed=78)
    asked.clear()
    annotate(store, teachers, ("reward", "policy"), "cup-catch", progress=False)
    assert asked == [(80, ("reward",)), (6, ("reward", "policy"))]
    monkeypatch.undo()
    annotate(store, teachers, ("reward", "value", "policy"), progress=False)
    batch = every_slice(store)
    agree(Annotations(store, teachers, ("reward", "value", "policy"))(batch), Asked(teachers, ("reward", "value", "policy"))(batch))


def test_annotations_opened_before_an_append_say_so(store, teachers):
    annotate(store, teachers, "policy", progress=False)
    old = Annotations(store, teachers, "policy")
    fill(store, "pendulum-spin", (9,), seed=5)
    row = store.num_rows("pendulum-spin") - 5
    new = Sampler(store, "pendulum-spin").read(np.array([0]), np.array([row]))
    with pytest.raises(ConfigError, match="annotate and open them again"): old(new)


def test_changed_weights_are_another_teacher(store, teachers):
    keys = annotation_keys(teachers, teachers.tasks)
    torch.manual_seed(1)
    changed = TaskModels({"walker-walk": teachers.model_for("walker-walk"), "cup-catch": specialist("cup-catch"), "pendulum-spin": teachers.model_for("pendulum-spin")})
    new = annotation_keys(changed, changed.tasks)
    assert [new[t] == keys[t] for t in TAUGHT] == [True, False, True]
    annotate(store, teachers, "policy", progress=False)
    assert annotate(store, changed, "policy", progress=False)["tasks"] == {"walker-walk": 0, "cup-catch": 63, "pendulum-spin": 0}
    batch = every_slice(store)
    a, b = (Annotations(store, t, "policy")(batch) for t in (teachers, changed))
    cup = batch.task == 12
    assert torch.equal(a.mean[:, ~cup], b.mean[:, ~cup]) and not torch.equal(a.mean[:, cup], b.mean[:, cup])
    one = next(p for p in changed.model_for("cup-catch").parameters())
    with torch.no_grad(): one[0] += 1e-3
    with pytest.raises(ConfigError, match="cup-catch has 0 of 63 rows with mean"): Annotations(store, changed, "policy")
    # The same network knows two tasks by two indices
    both = TaskModels(teachers.model_for("walker-walk"))
    assert len(set(annotation_keys(both, both.tasks).values())) == 2


def test_target_heads_do_not_count_but_the_dtype_does(teachers):
    import copy
    m = copy.deepcopy(teachers.model_for("cup-catch"))
    key = lambda m: annotation_keys(TaskModels({"cup-catch": m}), task_set("cup-catch"))["cup-catch"]
    before = key(m)
    with torch.no_grad(): m.target_q_heads[0].weight += 1
    assert key(m) == before == annotation_keys(teachers, task_set("cup-catch"))["cup-catch"] != key(m.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teachers_in_half_precision(store, teachers, dtype):
    import copy
    half = TaskModels({t: copy.deepcopy(teachers.model_for(t)).to(dtype) for t in TAUGHT})
    annotate(store, half, ("reward", "value", "policy"), progress=False)
    batch = every_slice(store)
    a, b = Annotations(store, half, ("reward", "value", "policy"))(batch), Asked(teachers, ("reward", "value", "policy"))(batch)
    assert (a.mean - b.mean).abs().max() < 0.05 and (a.value - b.value).abs().max() < 0.2


def test_two_stores_keep_apart(tmp_path, teachers):
    import shutil
    a, b = make_store(tmp_path / "a"), make_store(tmp_path / "b", seed=50)
    for s in (a, b): annotate(s, teachers, ("reward", "value", "policy"), progress=False)
    for s in (a, b): agree(Annotations(s, teachers, ("reward", "value", "policy"))(every_slice(s)), Asked(teachers, ("reward", "value", "policy"))(every_slice(s)))
    shutil.rmtree(b.path / "annotations")
    shutil.copytree(a.path / "annotations", b.path / "annotations")
    with pytest.raises(ConfigError, match="speaks of other rows than .*; remove the folder .* and annotate again"): Annotations(b, teachers, "policy")
    with pytest.raises(ConfigError, match="speaks of other rows"): annotate(b, teachers, "policy", progress=False)


@pytest.mark.parametrize(("harm", "word"), [
    (lambda p: (p / "value.bin").write_bytes((p / "value.bin").read_bytes()[:-1]), "value.bin: 12725 bytes where 12726 are promised"),
    (lambda p: (p / "mean.bin").unlink(), "mean.bin: 0 bytes where 756 are promised"),
    (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: damaged"),
    (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json: damaged"),
    (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json: damaged"),
    (lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('"version": 1', '"version": 7')), "manifest.json: version 7"),
    (lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('"reward": 63', '"reward": 64')), "manifest.json: promises 64 rows of 'reward'")])
def test_damage_is_named(store, teachers, harm, word):
    annotate(store, teachers, ("reward", "value", "policy"), "cup-catch", progress=False)
    p = store.path / "annotations" / annotation_keys(teachers, task_set("cup-catch"))["cup-catch"] / "cup-catch"
    harm(p)
    for f in (lambda: Annotations(store, teachers, ("reward", "value", "policy"), specs="cup-catch"), lambda: annotate(store, teachers, ("reward", "value", "policy"), progress=False)):
        with pytest.raises(ConfigError) as e: f()
        assert word in str(e.value) and f"remove the folder {p}" in str(e.value)


def test_plans_do_not_depend_on_pieces(store, teachers, tmp_path, monkeypatch):
    "Neither on how many are made at once, nor on an interruption, nor on how many were asked for first."
    import shutil
    shutil.copytree(store.path, tmp_path / "other")
    kw = dict(plan_config=QUICK, progress=False)
    assert annotate(tmp_path / "other", teachers, "plan", plan_rows=30, **kw)["plans"] == 90
    assert annotate(store, teachers, "plan", plan_rows=10, **kw)["plans"] == 30
    real, calls = module.planned, []
    def tired(*args):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(0)
        return real(*args, at_once=3)
    monkeypatch.setattr(module, "planned", tired)
    with pytest.raises(KeyboardInterrupt): annotate(store, teachers, "plan", plan_rows=30, **kw)
    monkeypatch.undo()
    assert annotate(store, teachers, "plan", plan_rows=30, **kw)["plans"] == 20
    assert annotate(store, teachers, "plan", plan_rows=30, **kw)["plans"] == 0
    batch = every_slice(store)
    a, b = (Annotations(s, teachers, "plan", QUICK)(batch) for s in (store, tmp_path / "other"))
    assert torch.equal(a.plan.nan_to_num(9), b.plan.nan_to_num(9))
    known = a.known
    has = ~a.plan[:, known].isnan().any(-1)
    assert 0.3 < has.float().mean() < 0.6 and (a.plan[:, ~known] == 0).all()  # 30 of 63 rows
    asked = Asked(teachers, "plan", QUICK)(batch).plan
    assert not asked.isnan().any() and asked.abs().max() <= 1
    assert (a.plan[:, known][has] - asked[:, known][has]).abs().max() < 6e-4
    assert (asked[:, batch.task == 12, 2:] == 0).all()
    with pytest.raises(ConfigError, match="has 0 of 63 rows with plan"): Annotations(store, teachers, "plan", plan_config("tiny", iterations=3))


def test_plans_of_appended_rows(store, teachers):
    annotate(store, teachers, "plan", plan_config=QUICK, plan_rows=30, progress=False)
    fill(store, "cup-catch", (62,), seed=3)
    done = annotate(store, teachers, "plan", plan_config=QUICK, plan_rows=30, progress=False)
    assert 5 < done["plans"] < 25
    k = Kept(store, "cup-catch", annotation_keys(teachers, teachers.tasks, QUICK)["cup-catch"])
    rows = np.fromfile(k.file("row"), np.int64)
    assert len(set(rows.tolist())) == 30 + done["plans"] and set(plan_order(126, 30).tolist()) <= set(rows.tolist())


def test_every_row_planned(store, teachers):
    annotate(store, teachers, "plan", "pendulum-spin", plan_config=QUICK, progress=False)
    batch = every_slice(store)
    pendulum = Batch(*(x[:, batch.task == 29] for x in batch[:3]), *(x[batch.task == 29] for x in batch[3:]))
    read = Annotations(store, teachers, "plan", QUICK, specs="pendulum-spin")
    assert not read(pendulum).plan.isnan().any()
    with pytest.raises(ConfigError, match="walker-walk has a teacher and was not opened"): read(batch)


@pytest.mark.parametrize(("kw", "word"), [
    (dict(what="polcy"), "Did you mean 'policy'"), (dict(specs="cup-spin"), "No teacher for any task"), (dict(specs="walker-run,cup-catch"), "walker-run"), (dict(batch_size=0), "batch_size must be"),
    (dict(what="plan", plan_rows=0), "plan_rows must be"), (dict(piece=-3), "piece must be")])
def test_impossible_values(store, teachers, kw, word):
    known = TaskModels({"cup-catch": teachers.model_for("cup-catch"), "walker-run": teachers.model_for("walker-walk")})
    with pytest.raises(ConfigError, match=word): annotate(store, known, **(dict(what="policy", progress=False) | kw))


def test_one_writer_at_a_time(store, teachers):
    with module._only_writer(store):
        with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()}"): annotate(store, teachers, "policy", progress=False)
    annotate(store, teachers, "policy", progress=False)


def test_a_store_that_is_not_ours(store, teachers):
    (store.path / "annotations").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written there"): annotate(store, teachers, "policy", progress=False)


def test_nobody_knows_any_of_a_batch(store, teachers):
    batch = Sampler(store, "cup-spin", batch_size=8).sample()
    asked = Asked(teachers, ALL, QUICK)(batch)
    assert not asked.known.any() and all((x == 0).all() for x in asked[1:])
    assert untaught(teachers, TASKS) == ["cup-spin"]


def test_sets_of_teachers(tmp_path, teachers):
    "Layouts and sizes mixed, from a folder, a JSON file and a mapping."
    folder = tmp_path / "teachers"
    folder.mkdir()
    save_world_model(model("walker-walk,walker-stand,walker-run", "0.2M"), folder / "walker.safetensors", torch.float16)
    save_upstream(specialist("cup-catch", "0.4M"), folder / "cup-catch-2.pt", "2025")
    save_upstream(specialist("pendulum-spin"), folder / "pendulum-spin.pt", "2023")
    got = load_teachers(folder)
    assert [t.name for t in got.tasks] == ["walker-stand", "walker-walk", "walker-run", "cup-catch", "pendulum-spin"] and len(got.models) == 3
    assert got.model_for("cup-catch").cfg.mlp_dim == 192 and got.model_for("walker-run").tasks == ("walker-walk", "walker-stand", "walker-run")
    (tmp_path / "map.json").write_text(json.dumps({"walker": "teachers/walker.safetensors", "pendulum-spin,pendulum-swingup": "all.pt", "cup-spin": "teachers/cup-catch-2.pt"}))
    save_upstream(model("mt30"), tmp_path / "all.pt")
    got = load_teachers(tmp_path / "map.json")
    assert [t.name for t in got.tasks] == ["walker-stand", "walker-walk", "walker-run", "pendulum-swingup", "cup-spin", "pendulum-spin"] and len(got.models) == 3
    assert got.model_for("cup-spin").tasks == ("cup-spin",)  # The mapping knows better than the file's name
    one = load_teachers(tmp_path / "all.pt")
    assert len(one.tasks) == 30 and len(one.models) == 1
    three = load_teachers({"walker-walk,walker-stand,walker-run": upstream_of(folder / "walker.safetensors", tmp_path / "three.pt")})  # The order of its rows
    assert three.model_for("walker-stand").tasks == ("walker-walk", "walker-stand", "walker-run") and three.own[:3].tolist() == [1, 0, 2]


def upstream_of(path, to):
    from tdmpc_opt_kit.checkpoint import load_world_model
    return save_upstream(load_world_model(path), to)


def test_narrow_words_win_in_any_order(tmp_path):
    files = {"mt30": "all", "walker": "walker", "walker-run": "run"}
    save_world_model(model("mt30"), tmp_path / "all.safetensors")
    save_world_model(model("walker-run,walker-walk", "0.2M"), tmp_path / "walker.safetensors")
    save_world_model(specialist("walker-run", "0.4M"), tmp_path / "run.safetensors")
    for keys in (["mt30", "walker", "walker-run"], ["walker-run", "walker", "mt30"], ["walker", "walker-run", "mt30"]):
        got = load_teachers({k: tmp_path / f"{files[k]}.safetensors" for k in keys})
        assert [got.model_for(t).cfg.size for t in ("walker-run", "walker-walk", "walker-stand", "cup-spin")] == ["0.4M", "0.2M", "tiny", "tiny"]


@pytest.mark.parametrize(("mapping", "word"), [
    ({"walker": "two.pt"}, "model of 1 task, and tasks names 5"), ({"cup": "all", "ball_in_cup": "cup"}, "Two teachers for cup-catch"), ({"hopper": "cup"}, "The teacher of hopper does not fit"),
    ({"": "all"}, "No task was named"), ({"wlaker": "all"}, "There is no task 'wlaker'"), ({"cup-catch": "two.pt"}, "takes 24 observations")])
def test_mappings_that_will_not_do(tmp_path, mapping, word):
    save_world_model(model("mt30"), tmp_path / "all")
    save_world_model(specialist("cup-catch"), tmp_path / "cup")
    save_upstream(model(None, task_dim=0, obs_dim=24, action_dim=5), tmp_path / "two.pt")
    with pytest.raises(ConfigError, match=word): load_teachers({k: tmp_path / v for k, v in mapping.items()})


def test_folders_that_will_not_do(tmp_path):
    save_upstream(specialist("cup-catch"), tmp_path / "best.pt")
    with pytest.raises(ConfigError, match="best.pt: does not say which task it knows"): load_teachers(tmp_path)
    (tmp_path / "best.pt").rename(tmp_path / "cup-catch-1.pt")
    save_upstream(specialist("cup-catch"), tmp_path / "cup-catch-2.pt")
    with pytest.raises(ConfigError, match="two teachers for cup-catch, cup-catch-2.pt is one of them"): load_teachers(tmp_path)


def test_the_published_student_as_teacher(reference, tmp_path):
    "An upstream file of thirty tasks, against the reference's outputs."
    t = load_teachers(reference / "checkpoints" / "mt30_1M_steps_045dist_fp16.pt")
    g = np.load(reference / "golden" / "world_model_outputs.npz")
    obs, action, task = (torch.from_numpy(g[k]) for k in ("obs", "action", "task"))
    said = Asked(t, ("reward", "value", "policy"))(Batch(obs, action, torch.from_numpy(g["reward"]), task.long(), None))
    assert said.known.all()
    assert np.allclose(said.value[0].exp(), torch.from_numpy(g["q_logits"]).softmax(-1).mean(0), atol=1e-4)
    assert np.allclose(said.reward[0].ravel(), g["reward_pred"].ravel(), atol=1e-4)
    assert np.allclose(said.mean[0].tanh(), torch.from_numpy(g["pi_mean"]), atol=1e-4)
