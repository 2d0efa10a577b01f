"Evaluation: the same numbers whatever runs beside it, exact resuming, intervals, and the published tables."
import json, os
from pathlib import Path

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.agent import PlanAgent, RandomAgent, TaskModels, make_agent
from tdmpc_opt_kit.checkpoint import save_world_model
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.envs import make_env
from tdmpc_opt_kit.evaluate import (EVALUATE_PRESETS, PUBLISHED, EvaluateConfig, Report, compare, compare_runs, data_dir, difference, equal_return, evaluate, evaluate_config,
                                    find_checkpoint, fingerprint, interval, load_models, paired, published, separate)
from tdmpc_opt_kit.planner import plan_config
from tdmpc_opt_kit.tasks import MT30, task_set
from tdmpc_opt_kit.world_model import WorldModel, model_size

ROOT = Path(__file__).resolve().parents[1]
FEW = dict(max_steps=8, progress=False, num_workers=0)


def tiny(tasks="mt30", seed=0, **kw):
    torch.manual_seed(seed)
    return WorldModel(model_size("tiny", **kw), tasks).eval()


def same(a, b):
    assert a.tasks == b.tasks
    for t in a.tasks: np.testing.assert_array_equal(a.returns[t], b.returns[t])


@pytest.mark.parametrize("mode", ["policy", "plan"])
@pytest.mark.parametrize("explore", [False, True])
def test_same_numbers_whatever_the_workers(mode, explore):
    kw = dict(tasks="cup-catch,walker-walk,pendulum-spin", episodes=2, mode=mode, explore=explore, plan_config="tiny", **FEW)
    a = evaluate(tiny(), **kw)
    same(a, evaluate(tiny(), **kw))
    same(a, evaluate(tiny(), **kw | dict(num_workers=2)))
    assert any((a.returns[t] != evaluate(tiny(), **kw | dict(seed=1)).returns[t]).any() for t in a.tasks)


@pytest.mark.parametrize("mode", ["policy", "plan"])
def test_groups_take_turns(mode):
    "A policy's returns do not depend on the groups; a planner's draws do, and are the same for any workers."
    kw = dict(tasks="cup-catch,walker-walk,pendulum-spin", episodes=2, mode=mode, plan_config="tiny", **FEW)
    one, two, again = (evaluate(tiny(), **kw | k) for k in (dict(groups=1), dict(groups=2), dict(groups=2, num_workers=2)))
    same(two, again)
    if mode == "policy":
        for t in one.tasks: np.testing.assert_allclose(one.returns[t], two.returns[t], atol=1e-4)
    assert one.seconds["overlap"] == 0 < two.seconds["overlap"] <= two.seconds["agent"] <= two.seconds["total"] and two.seconds["physics"] > 0
    assert evaluate(tiny(), **kw).seconds["overlap"] == 0 if mode == "plan" else True  # As before there were groups


def test_threads_are_given_back():
    n = torch.get_num_threads()
    seen = []
    class Light(RandomAgent):
        light = True
        def choose(self, *args): seen.append(torch.get_num_threads()); return super().choose(*args)
    evaluate(Light(), "cup-catch", 1, **FEW)
    assert set(seen) == {1} and torch.get_num_threads() == n


def test_rounds_of_earlier_versions(tmp_path):
    "Their record goes on, and their time is still told."
    kw = dict(tasks="cup-catch", episodes=4, num_envs=2, mode="plan", plan_config="tiny", out=tmp_path/"rounds.json", **FEW)
    whole = evaluate(tiny(), **kw)
    got = json.loads((tmp_path/"rounds.json").read_text())
    del got["settings"]["groups"]
    got["rounds"] = [dict(returns=r["returns"], agent=2., physics=1., decisions=r["decisions"]) for r in got["rounds"][:1]]
    (tmp_path/"rounds.json").write_text(json.dumps(got))
    with pytest.raises(ConfigError, match="groups = "): evaluate(tiny(), **kw | dict(groups=2))
    on = evaluate(tiny(), **kw)
    same(on, whole)
    assert on.seconds["agent"] > 2 and on.seconds["waited"] > 1 and on.seconds["physics"] is None
    assert Report.from_dict(json.loads(json.dumps(on.to_dict()))).seconds == on.seconds


def test_paired_difference():
    "Finds what is hidden by good and bad starts, has the right width, and refuses what is not paired."
    rng = np.random.default_rng(0)
    starts = {t: rng.normal(m, 200, 40) for t, m in (("walker-walk", 500), ("cup-catch", 700))}
    report = lambda by, noise, **kw: Report({t: r + by + rng.normal(0, noise, 40) for t, r in starts.items()}, "plan", **kw)
    a, b = report(10, 20), report(0, 20)
    d = paired(a, b)
    assert d.low < 10 < d.high and d.low > 0 and difference(a, b).low < 0 < difference(a, b).high
    gaps = np.concatenate([(a.returns[t] - b.returns[t]) for t in a.tasks])
    assert d.mean == pytest.approx(gaps.mean()) and (d.high - d.low) == pytest.approx(2 * 1.96 * gaps.std() / 80**.5, rel=.15)
    assert paired(b, a).mean == -d.mean and paired(a, a)[:3] == (0, 0, 0)
    assert equal_return(a, b).equal and not equal_return(a, b, margin=0.01).equal and not equal_return(report(-25, 20), b).equal
    assert "not shown to be equal" in str(equal_return(report(0, 400), b))  # Too few episodes to tell
    other = Report({t: r[:39] for t, r in b.returns.items()}, "plan")
    for r, word in ((other, "episodes"), (report(0, 1, seed=2), "seed"), (report(0, 1, max_steps=9), "max_steps"), (Report({"cup-spin": [1.]}, "plan"), "tasks")):
        with pytest.raises(ConfigError, match=f"differ in {word}"): paired(a, r)
    one = Report({"cup-catch": [500.]}, "plan")
    assert not equal_return(one, one).equal and "single episode" in str(equal_return(one, one))


def test_compare_runs(tmp_path):
    r = Report({"cup-catch": [500., 510.], "cup-spin": [300., 290.]}, "plan")
    for name in "ab":
        (tmp_path/name).mkdir()
        (tmp_path/name/"report.json").write_text(json.dumps(dict(scores=dict(agent=dict(plan=r.to_dict(), policy=None)))))
    assert compare_runs(tmp_path/"a", tmp_path/"b"/"report.json").equal
    with pytest.raises(ConfigError, match="policy"): compare_runs(tmp_path/"a", tmp_path/"b", mode="policy")
    with pytest.raises(ConfigError, match="no such report"): compare_runs(tmp_path/"a", tmp_path/"c")
    (tmp_path/"b"/"report.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a report"): compare_runs(tmp_path/"a", tmp_path/"b")


def test_global_random_state_is_left_alone():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    evaluate(RandomAgent(), "cup-catch", 1, **FEW)
    assert torch.equal(torch.rand(2), want)
    same(evaluate(RandomAgent(), "cup-catch", 2, **FEW), evaluate(RandomAgent(), "cup-catch", 2, **FEW))


def test_all_tasks_once():
    r = evaluate(tiny(), episodes=1, mode="policy", **FEW)
    assert r.tasks == tuple(t.name for t in MT30) and r.episodes == 1
    assert r.seconds["decisions"] == 30 * FEW["max_steps"]
    assert all(np.isfinite(v).all() for v in r.returns.values())
    assert r.interval.kind == "tasks" and r.low <= r.score <= r.high


def test_an_episode_does_not_depend_on_the_other_tasks():
    "Nor on how many episodes are asked for: initial states belong to (seed, task, number)."
    agent = lambda: make_agent(tiny(), "policy")
    one = evaluate(agent(), "cup-spin", 2, **FEW)
    many = evaluate(agent(), "walker-run,cup-spin", 3, **FEW)
    np.testing.assert_allclose(one.returns["cup-spin"], many.returns["cup-spin"][:2], atol=1e-4)


def test_returns_are_those_of_a_single_env():
    from tdmpc_opt_kit.data import episode_seed
    from tdmpc_opt_kit.evaluate import FIRST_EPISODE
    report, model, spec = evaluate(tiny(), "cup-spin", 1, mode="policy", max_steps=30, progress=False, num_workers=0), tiny(), task_set("cup-spin")[0]
    env, agent = make_env(spec, max_steps=30), make_agent(model, "policy")
    obs, total, done = env.reset(seed=episode_seed(0, spec.index, FIRST_EPISODE))[0], 0., False
    while not done:
        padded = torch.from_numpy(np.pad(obs, (0, 24 - len(obs))))[None]
        action = agent.act(padded, torch.tensor([spec.index]), torch.tensor([False]))[0, :2].numpy()
        obs, reward, _, done, _ = env.step(action)
        total += reward
    assert report.returns["cup-spin"][0] == pytest.approx(total, abs=1e-3)


def test_evaluation_never_starts_where_collection_did():
    from tdmpc_opt_kit.data import episode_seed
    from tdmpc_opt_kit.evaluate import FIRST_EPISODE
    seeds = lambda start: {episode_seed(0, t.index, start + k) for t in MT30 for k in range(200)}
    assert not seeds(0) & seeds(FIRST_EPISODE)


class Stop(Exception): pass


class Tired:
    def __init__(self, agent, n): self.agent, self.left, self.models, self.cfg, self.generator = agent, n, agent.models, agent.cfg, agent.generator
    def reset(self): self.agent.reset()
    def act(self, *args):
        self.left -= 1
        if self.left < 0: raise Stop
        return self.agent.act(*args)


def test_resumed_planning_equals_uninterrupted(tmp_path):
    kw = dict(tasks="cup-catch,pendulum-spin", episodes=3, num_envs=2, **FEW)
    agent = lambda n: Tired(PlanAgent(tiny(), plan_config("tiny"), torch.Generator()), n)
    whole = evaluate(agent(99), **kw)
    for n in (12, 10):  # Stopped in the second round, then in the one after
        with pytest.raises(Stop): evaluate(agent(n), out=tmp_path/"r.json", **kw)
    same(whole, evaluate(agent(99), out=tmp_path/"r.json", **kw))
    rest = evaluate(agent(0), out=tmp_path/"r.json", **kw)  # All is there: nothing is played
    same(whole, rest)


def test_resuming_something_else_is_refused(tmp_path):
    out, kw = tmp_path/"r.json", dict(tasks="cup-catch", episodes=1, mode="policy", **FEW)
    evaluate(tiny(), out=out, **kw)
    for other, said in ((dict(seed=1), "seed = 0, not 1"), (dict(episodes=2), "episodes = 1, not 2"), (dict(explore=True), "explore"), (dict(mode="plan"), "mode"), (dict(max_steps=9), "max_steps")):
        with pytest.raises(ConfigError, match=said): evaluate(tiny(), out=out, **kw | other)
    with pytest.raises(ConfigError, match="another model"): evaluate(tiny(seed=1), out=out, **kw)
    out.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"): evaluate(tiny(), out=out, **kw)
    out.write_text("[]")
    with pytest.raises(ConfigError, match="not an evaluation's record"): evaluate(tiny(), out=out, **kw)


def test_files_folders_and_mappings(tmp_path):
    cup, walker = tiny("cup-catch", task_dim=0, obs_dim=8, action_dim=2), tiny("walker-walk", seed=1)
    save_world_model(cup, tmp_path/"cup.safetensors")
    save_world_model(walker, tmp_path/"walker.safetensors")
    kw = dict(episodes=1, mode="policy", **FEW)
    by_folder = evaluate(tmp_path, **kw)
    assert set(by_folder.tasks) == {"cup-catch", "walker-walk"}
    same(by_folder, evaluate({"walker-walk": walker, "cup-catch": tmp_path/"cup.safetensors"}, **kw))
    same(by_folder, evaluate(TaskModels({"walker-walk": walker, "cup-catch": cup}), **kw))
    one = evaluate(str(tmp_path/"walker.safetensors"), **kw)
    assert one.tasks == ("walker-walk",)
    assert fingerprint(load_models(walker)) == fingerprint(load_models(tmp_path/"walker.safetensors")) != fingerprint(load_models(cup))


@pytest.mark.parametrize(("kw", "said"), [
    (dict(tasks="walker-wlak"), "walker-walk"), (dict(tasks="walker-run"), "No model for walker-run"), (dict(episodes=0), "episodes"), (dict(episodes=1.5), "episodes"),
    (dict(mode="planning"), "'plan' or 'policy'"), (dict(device="gpu"), "gpu"), (dict(plan_config="publishd"), "published"), (dict(max_steps=0), "max_steps"), (dict(num_envs=-1), "num_envs")])
def test_bad_arguments(kw, said):
    with pytest.raises(ConfigError, match=said): evaluate(tiny("walker-walk"), **dict(progress=False) | kw)


def test_bad_models(tmp_path):
    for model, said in ((tmp_path/"no.pt", "no.pt"), (tmp_path, str(tmp_path)), (3, "int"), ({}, "empty"), ({"walker-walk": tiny("cup-catch")}, "does not fit")):
        with pytest.raises(ConfigError, match=said): evaluate(model, progress=False)


def test_an_action_that_is_not_a_number():
    class Broken:
        def act(self, obs, task, first): return torch.full((len(obs), 6), torch.nan)
    with pytest.raises(ConfigError, match="cup-catch is not finite"): evaluate(Broken(), "cup-catch", 1, **FEW)


# Intervals

def test_interval_covers_as_often_as_it_says():
    "In 400 worlds with known means, the 95 % interval of ten episodes on six tasks holds the truth about 95 times in 100 (a little less: see the chapter)."
    rng, mean = np.random.default_rng(0), np.linspace(100, 900, 6)
    hits = 0
    for _ in range(400):
        i = interval({k: rng.normal(m, 60, 10) for k, m in enumerate(mean)}, resamples=500)
        hits += i.low <= mean.mean() <= i.high
    assert 0.88 < hits / 400 < 0.98


def test_interval_matches_theory():
    rng = np.random.default_rng(1)
    r = {k: rng.normal(500 + 100 * k, 80, 40) for k in range(3)}
    se = np.sqrt(sum(v.var() / len(v) for v in r.values())) / 3
    i = interval(r)
    assert i.high - i.low == pytest.approx(2 * 1.96 * se, rel=0.03)


def test_degenerate_intervals_are_honest():
    assert interval([5.]).low is None and interval([5.]).kind == "nothing"
    one_each = interval({"a": [0.], "b": [1000.], "c": [500.]})
    assert one_each.kind == "tasks" and one_each.low < 200
    assert interval({"a": [1., 2.], "b": [3.]}).kind == "tasks"
    assert interval({"a": [7.] * 3, "b": [9.] * 3})[:3] == (8, 8, 8)
    for r in ({}, {"a": []}):
        with pytest.raises(ConfigError): interval(r)
    r = Report({"cup-catch": [500.]}, "plan")
    d = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert d["low"] is None and d["tasks"]["cup-catch"]["stderr"] is None and "no interval" in str(r)
    assert not separate(r, r)


def test_report_survives_json_and_compares():
    rng = np.random.default_rng(0)
    a, b = (Report({t: rng.normal(m, 20, 5) for t in ("cup-catch", "walker-walk")}, "policy") for m in (700, 300))
    assert Report.from_dict(json.loads(json.dumps(a.to_dict()))).to_dict() == a.to_dict()
    assert separate(a, b) and separate(a.to_dict(), b.to_dict()) and difference(a, b).low > 0 > difference(b, a).high
    rows = compare(dict(a=a, b=b))
    assert [r["task"] for r in rows] == ["cup-catch", "walker-walk", "**score**", "95 % interval"]
    with pytest.raises(ConfigError, match="Did you mean 'tdmpc2_317M'"): compare(a, ["tdmpc2_317"])
    with pytest.raises(ConfigError, match="no task in common"): difference(a, Report({"fish-swim": [1.]}, "policy"))


# Published tables and checkpoints to be found

def test_published_scores():
    mean = {c: np.mean(list(v.values())) / 10 for c, v in published().items()}
    want = dict(tdmpc2_1M=15.90, tdmpc2_48M=59.86, tdmpc2_317M=73.92, tdmpc2_48M_pwm_eval=59.82, pwm_48M_policies=76.82, tdmpc2_single_task_5M=88.36, td_mpc_opt_1M_fp16=33.75)
    assert mean == pytest.approx(want, abs=0.006) and set(PUBLISHED) == set(want)
    card = (data_dir()/"reference_scores"/"README.md").read_text()
    assert all(f"`{c}`" in card for c in want)


def test_published_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published("cup-catch")["tdmpc2_1M"] == {"cup-catch": 464.0}
    assert data_dir() == ROOT/"data"
    with pytest.raises(ConfigError, match="no.csv"): published(path="no.csv")


def test_shipped_tables_are_those_of_the_reference(reference):
    for f in (data_dir()/"reference_scores").glob("*.csv"):
        if (reference/"reference_scores"/f.name).exists(): assert f.read_bytes() == (reference/"reference_scores"/f.name).read_bytes()


def test_find_checkpoint(tmp_path):
    assert find_checkpoint(root=tmp_path)[1].startswith("an untrained model")
    (tmp_path/"data"/"teachers").mkdir(parents=True)
    save_world_model(tiny("cup-catch"), tmp_path/"data"/"teachers"/"cup-catch.safetensors")
    assert find_checkpoint(root=tmp_path)[0] == tmp_path/"data"/"teachers"
    (tmp_path/"data"/"students").mkdir()
    save_world_model(tiny("cup-catch"), tmp_path/"data"/"students"/"student.safetensors")
    assert find_checkpoint(root=tmp_path) == (tmp_path/"data"/"students"/"student.safetensors", "the student that ships, data/students/student.safetensors")
    for i, name in enumerate(("b", "a")):
        (tmp_path/"runs"/name).mkdir(parents=True)
        save_world_model(tiny("cup-catch"), tmp_path/"runs"/name/"student.safetensors")
        os.utime(tmp_path/"runs"/name/"student.safetensors", (i, i))
    assert find_checkpoint(root=tmp_path)[0] == tmp_path/"runs"/"a"/"student.safetensors"
    assert find_checkpoint("runs/b/student.safetensors", root=tmp_path)[0] == tmp_path/"runs"/"b"/"student.safetensors"
    with pytest.raises(ConfigError, match="nowhere.pt"): find_checkpoint("nowhere.pt", root=tmp_path)


def test_presets():
    for name in EVALUATE_PRESETS: assert evaluate_config(name).preset == name
    assert evaluate_config("mt30").tasks == "mt30" and evaluate_config("mt30").episodes == 10 and evaluate_config("mt30").mode == "plan"
    with pytest.raises(ConfigError, match="Did you mean 'quick'"): evaluate_config("quik")


@pytest.mark.parametrize("name", ["run_evaluate"])
def test_parameters_are_the_configs_fields(name):
    import ast, dataclasses
    cells = json.loads((ROOT/f"nbs/{name}.ipynb").read_text())["cells"]
    source = "".join("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = {t.id for n in ast.parse(source).body if isinstance(n, ast.Assign) for t in n.targets}
    assert names == {f.name for f in dataclasses.fields(EvaluateConfig)}


@pytest.mark.slow
def test_published_student_by_policy(reference):
    "Reference code had 16.2 with five episodes a task; other initial states and ten episodes are within a few points of it."
    r = evaluate(reference/"checkpoints"/"mt30_1M_steps_045dist_fp16.pt", mode="policy", episodes=5, progress=False)
    assert r.low - 2 < 16.2 < r.high + 2, str(r)


# Figures

def test_figures_take_reports_and_their_json():
    from tdmpc_opt_kit.plots import colours, learning_curves, losses, returns_by_task, score_bars
    r = Report({t.name: np.full(3, 100. * (t.index % 10)) + np.arange(3) for t in MT30}, "policy")
    for x in (r, r.to_dict(), json.loads(json.dumps(r.to_dict()))):
        fig = returns_by_task(dict(student=x, scratch=None), ["tdmpc2_1M"])
        assert [t.name for t in fig.data] == ["student", "TD-MPC2 1M (published)"] and len(fig.data[0].x) == 30
        assert list(score_bars(dict(student=dict(policy=x, plan=None))).data[0].x) == [pytest.approx(r.score)]
    assert len(set(colours(["teacher", "student", "student_fp16", "scratch", "published", "a", "b"]).values())) == 7
    rows = [dict(step=1, agent="student", score=None), dict(step=2, agent="student", total_loss=0.), dict(step=3, agent="student", total_loss=1., score=4.)]
    assert len(losses(rows).data) == 1 and len(learning_curves(rows).data[0].x) == 1
    for f in (lambda: losses([]), lambda: learning_curves([]), lambda: returns_by_task({}), lambda: score_bars({})):
        with pytest.raises(ConfigError): f()
