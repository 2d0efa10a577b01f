"""Ablations: children run, fail, are interrupted and go on; grids are checked before anything starts; statistics equal what one counts by hand."""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import pytest

from tdmpc_opt_kit.ablate import (GRIDS, Scores, ablation_config, ablation_table, check_folder, improvement, iqm, iqm_interval, load_grid, make_children,
    papermill_command, read_scores, run_children, state, summarize)
from tdmpc_opt_kit.checkpoint import RunFolder
from tdmpc_opt_kit.config import ConfigError, to_json
from tdmpc_opt_kit.plots import ablation
from processes import ROOT, run

# What stands in for the notebook: trains for as long as it is told, saves where it is when it is interrupted, and reports returns that depend on setting and seed.
STAND_IN = '''
import json, pathlib, signal, sys, time
path, cfg, resume, what = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", json.loads(sys.argv[4])
had = (path/"config.json").exists()
assert had == resume, "begun without resume, or the other way round"
(path/"config.json").write_text(cfg)
with open(path/"calls", "a") as f: f.write("resumed " if resume else "started ")
if what.get("fails"): print("first line"); sys.exit("it was not to be")
steps = json.loads(cfg)["steps"]
at = int((path/"at").read_text()) if (path/"at").exists() else 0
try:
    while at < steps:
        time.sleep(what.get("step", 0.))
        at += 1
        with open(path/"metrics.jsonl", "a") as f: f.write(json.dumps(dict(step=at)) + chr(10))
except KeyboardInterrupt:
    (path/"at").write_text(str(at))
    sys.exit(1)
scores = dict(student=dict(policy=dict(returns=what["returns"]), plan=None))
(path/"report.json").write_text(json.dumps(dict(scores=scores)))
'''

def stand_in(**by_name):
    "A command for `run_children`; keywords by a child's setting."
    def command(child, resume):
        what = dict(returns={"cup-catch": 100. * child.seed + 10, "cup-spin": 500.}) | by_name.get(child.setting, {})
        return [sys.executable, "-c", STAND_IN, str(child.path), to_json(child.cfg), str(resume), json.dumps(what)]
    return command

def children(out, grid=None, seeds=2, **kw):
    return make_children(grid or {"a": {}, "b": dict(lr=1e-4)}, seeds, out, "tiny", **kw)

def calls(child): return (child.path/"calls").read_text().split()


# ---------------------------------------------------------------- grids

@pytest.mark.parametrize("grid, words", [
    ("papre", "Did you mean 'paper'"), ("nowhere.json", "does not exist"), ({}, "settings by name"), ({"a": 3}, "needs its parameters"), ({"store": {}}, "name of a folder"),
    ({"../a": {}}, "name of a folder"), ({"A": {}, "a": {}}, "capitals"), ({"a": dict(reward_coeff=1)}, "'a': DistillConfig has no field 'reward_coeff'. Did you mean 'reward_coef'"),
    ({"a": dict(recipe="papr")}, "Did you mean 'paper'"), ({"a": dict(reward_coef=-1.)}, "'a': reward_coef must be"), ({"a": dict(seed=3)}, "seed is the same"), ({"a": dict(data_dir="x")}, "data_dir is the same"),
    ({"a": {}, "b": dict(lr=3e-4)}, "'a' and 'b' are the same run")])
def test_bad_grids_are_refused(grid, words, tmp_path):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")): make_children(grid, 2, tmp_path, "tiny")
    assert not list(tmp_path.iterdir())

def test_bad_json(tmp_path):
    for text, words in (('{"a": {}, "a": {"lr": 1}}', "twice"), ('{"a": {"lr": 1, "lr": 2}}', "twice"), ("{", "not valid JSON"), ("[1]", "settings by name")):
        (tmp_path/"g.json").write_text(text)
        with pytest.raises(ConfigError, match=words): load_grid(tmp_path/"g.json")
    (tmp_path/"g.json").write_text('{"low": {"lr": 1e-4}}')
    assert load_grid(tmp_path/"g.json") == {"low": {"lr": 1e-4}}

def test_grids_that_ship():
    assert [kw["reward_coef"] for kw in GRIDS["paper"].values()] == [0, 0.05, 0.25, 0.4, 0.55, 0.6, 0.9] and all(kw["recipe"] == "paper" for kw in GRIDS["paper"].values())
    assert len(make_children("paper", 3, "runs/x", "quick")) == 21
    assert all(load_grid(g) for g in GRIDS)

def test_config():
    assert (c := ablation_config("quick")).steps >= 5000 and c.batch_size == 256 and c.seeds == 3 and c.against == "d=0"
    for kw, words in ((dict(reference="d=0.41"), "Did you mean 'd=0.4'"), (dict(seeds=0), "seeds"), (dict(jobs=0), "jobs"), (dict(preset="tinny"), "Did you mean 'tiny'")):
        with pytest.raises(ConfigError, match=words): ablation_config(**dict(preset="quick") | kw)

def test_every_grid_with_every_preset(tmp_path):
    for preset in ("tiny", "quick"):
        for grid in GRIDS:
            cfg = ablation_config(preset, grid=grid)
            assert len(make_children(grid, cfg.seeds, tmp_path, preset, **cfg.common)) == cfg.seeds * len(GRIDS[grid])

def test_folders_from_before_the_newest_fields(tmp_path):
    "An ablation and a child whose config.json is older than policy_steps, enc_lr_scale and eval_others."
    import dataclasses
    from tdmpc_opt_kit.checkpoint import RunFolder
    old = lambda cfg: {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("policy_steps", "enc_lr_scale", "eval_others")}
    run = RunFolder(tmp_path)
    run.write_config(old(cfg := ablation_config("quick", grid="tiny")))
    run.check_config(cfg, ("eval_others",))
    child = make_children("tiny", 1, tmp_path, "quick", **cfg.common)[0]
    assert child.cfg.policy_steps == 0 and child.cfg.enc_lr_scale == 0.3
    RunFolder(child.path).write_config(old(child.cfg))
    (child.path/"report.json").write_text('{"scores": {}}')
    assert state(child) == "done"
    assert state(make_children("tiny", 1, tmp_path, "quick", **cfg.common | dict(eval_others=True))[0]) == "done"  # It evaluated all of them then

def test_more_can_be_evaluated_afterwards(tmp_path):
    common = ablation_config("quick", grid="tiny").common
    child, more = (make_children("tiny", 1, tmp_path, "quick", **common | dict(eval_others=v))[0] for v in (False, True))
    from tdmpc_opt_kit.checkpoint import RunFolder
    RunFolder(child.path).write_config(child.cfg)
    (child.path/"report.json").write_text('{"scores": {}}')
    assert [state(child), state(more)] == ["done", "begun"]
    RunFolder(child.path).write_config(more.cfg)
    assert [state(child), state(more)] == ["done", "done"]

def test_papermill_gets_what_the_config_has(tmp_path):
    "The parameters on the command line, read as papermill reads them, give the child's own config."
    from papermill.cli import _resolve_type
    from tdmpc_opt_kit.config import from_preset
    from tdmpc_opt_kit.distill import DISTILL_PRESETS, DistillConfig
    child, = make_children({"a": dict(lr=1e-5, scratch=False, recipe="paper")}, 1, tmp_path, "tiny", eval_planning="1", tasks="cup-catch,cup-spin", noise_stds=(0., 0.5))
    cmd = papermill_command(child, True)
    got = {cmd[i + 1]: cmd[i + 2] if cmd[i] == "-r" else _resolve_type(cmd[i + 2]) for i in range(len(cmd)) if cmd[i] in ("-r", "-p")}
    assert got.pop("resume") is True and got.pop("out_dir") == str(child.path.absolute())
    assert from_preset(DistillConfig, DISTILL_PRESETS, got.pop("preset"), **got) == child.cfg


# ---------------------------------------------------------------- children

def test_finished_children_are_not_run_again(tmp_path):
    first = run_children(children(tmp_path), 2, command=stand_in(), progress=False)
    assert [r["state"] for r in first.values()] == ["done"] * 4
    again = run_children(children(tmp_path, seeds=3), 2, command=stand_in(), progress=False)  # one more seed of each
    assert len(again) == 6 and all(calls(c) == ["started"] for c in children(tmp_path, seeds=3))

def test_a_failed_child_stops_nobody_and_is_tried_again(tmp_path):
    said = run_children(children(tmp_path), 2, command=stand_in(a=dict(fails=True)), progress=False)
    assert {n: r["state"] for n, r in said.items()} == {"a, seed 0": "failed", "b, seed 0": "done", "a, seed 1": "failed", "b, seed 1": "done"}
    assert said["a, seed 0"]["error"].splitlines() == ["exit status 1", "first line", "it was not to be"]
    s = read_scores(children(tmp_path))
    assert list(s.table) == ["b"] and s.table["b"].tolist() == [[1, 50], [11, 50]]
    run_children(children(tmp_path), 2, command=stand_in(), progress=False)
    assert [calls(c) for c in children(tmp_path)] == [["started", "resumed"], ["started"]] * 2

def test_a_child_without_a_report_has_failed(tmp_path):
    a, _ = children(tmp_path, seeds=1)
    said = run_children([a], command=lambda c, resume: [sys.executable, "-c", "pass"], progress=False)
    assert said[a.name]["state"] == "failed" and "without a report" in said[a.name]["error"]

def test_a_child_with_another_config_has_failed(tmp_path):
    a, b = children(tmp_path, seeds=1)
    said = run_children([a], command=lambda c, resume: [*stand_in()(c, resume)[:4], to_json(b.cfg), *stand_in()(c, resume)[5:]], progress=False)
    assert said[a.name]["state"] == "failed" and "another lr" in said[a.name]["error"]

def test_other_evaluations_are_made_again_and_other_trainings_refused(tmp_path):
    run_children(children(tmp_path), 2, command=stand_in(), progress=False)
    assert {state(c) for c in children(tmp_path, log_every=9)} == {"done"} and {state(c) for c in children(tmp_path, eval_episodes=9)} == {"begun"}
    run_children(children(tmp_path, eval_episodes=9), 2, command=stand_in(), progress=False)
    assert all(calls(c) == ["started", "resumed"] for c in children(tmp_path))
    with pytest.raises(ConfigError, match="another batch_size.*remove the folder"): run_children(children(tmp_path, batch_size=9), command=stand_in(), progress=False)
    with pytest.raises(ConfigError, match="a setting that the grid does not have"): check_folder(children(tmp_path, {"a": {}}), tmp_path)
    with pytest.raises(ConfigError, match="'b'|another lr"): check_folder(children(tmp_path, {"a": dict(lr=1e-4), "b": {}}), tmp_path)  # names that changed places

def test_an_old_report_does_not_outlive_a_new_start(tmp_path):
    "An interrupted second evaluation must not pass for a finished one."
    a, _ = children(tmp_path, seeds=1)
    run_children([a], command=stand_in(), progress=False)
    b, _ = children(tmp_path, seeds=1, eval_episodes=9)
    run_children([b], command=stand_in(a=dict(fails=True)), progress=False)
    assert state(b) == "begun"

def test_interrupt_stops_all_children_and_a_rerun_goes_on(tmp_path):
    mine = children(tmp_path, seeds=1, steps=200)
    slow = stand_in(a=dict(step=0.05), b=dict(step=0.05))
    def interrupt():
        while not all((c.path/"metrics.jsonl").exists() for c in mine): time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt): run_children(mine, 2, command=slow, progress=False)
    assert not left(tmp_path)
    assert {state(c) for c in mine} == {"begun"}
    before = [int((c.path/"at").read_text()) for c in mine]  # each child was told, and saved
    assert all(0 < n < 200 for n in before)
    said = run_children(mine, 2, command=stand_in(), progress=False)
    assert {r["state"] for r in said.values()} == {"done"} and all(calls(c) == ["started", "resumed"] for c in mine)

def left(path) -> list:
    "Command lines that name a folder."
    out = []
    for p in Path("/proc").glob("[0-9]*"):
        try: line = (p/"cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError: continue
        if str(path) in line and int(p.name) != os.getpid(): out.append(line)
    return out

@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_children_of_a_killed_ablation_end(tmp_path):
    "Nobody trains on when the ablation died without a word."
    code = f'''
import sys
sys.path.insert(0, {str(ROOT/"tests")!r})
from pathlib import Path
from test_ablate import children, run_children, stand_in
run_children(children(Path({str(tmp_path)!r}), seeds=1, steps=10_000), 2, command=stand_in(a=dict(step=0.05), b=dict(step=0.05)), progress=False)
'''
    p = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + 120
    while not all((c.path/"metrics.jsonl").exists() for c in children(tmp_path, seeds=1, steps=10_000)) and time.monotonic() < end: time.sleep(0.1)
    assert len(left(tmp_path)) >= 2
    p.kill(); p.wait()
    end = time.monotonic() + 20
    while left(tmp_path) and time.monotonic() < end: time.sleep(0.1)
    assert not left(tmp_path)


# ---------------------------------------------------------------- scores and statistics

def test_unequal_seeds_and_tasks(tmp_path):
    some = [c for c in children(tmp_path, seeds=3) if (c.setting, c.seed) != ("b", 2)]
    run_children(some, 3, command=stand_in(), progress=False)
    s = read_scores(children(tmp_path, seeds=3))
    assert (s.tasks, s.seeds) == (("cup-catch", "cup-spin"), dict(a=[0, 1, 2], b=[0, 1])) and s.table["a"].tolist() == [[1, 50], [11, 50], [21, 50]]
    rows = summarize(s, "a", 500)
    assert [r["seeds"] for r in rows] == [3, 2] and rows[0]["better"] is None
    assert rows[1]["better"] == pytest.approx(((0.5 + 1 + 0.5) / 6 + 0.5) / 2)  # b's 1 and 11 against 1, 11, 21; equal on the second task
    assert "P(better than a)" in ablation_table(rows, "a") and ablation(rows, "a").data
    assert not read_scores(children(tmp_path), "plan").table
    c = children(tmp_path)[0]
    RunFolder(c.path).report(dict(scores=dict(student=dict(policy=dict(returns={"fish-swim": 3.})))))
    with pytest.raises(ConfigError, match="Only scores of the same tasks"): read_scores(children(tmp_path))

def test_iqm_by_hand():
    assert iqm(np.arange(8.)) == np.mean([2, 3, 4, 5]) and iqm(np.array([7., 1, 100, 3])) == 5
    assert iqm(np.arange(6.)) == np.mean([1, 2, 3, 4])  # a quarter of six is one and a half: one goes at each end, as in SciPy and rliable
    x = np.random.default_rng(0).normal(size=(5, 7))
    a, b = np.sort(x.reshape(-1))[8:-8].mean(), iqm_interval(x, 200)
    assert b.mean == pytest.approx(a) and b.low < a < b.high and iqm_interval(x, 200) == b

def test_intervals_by_enumeration():
    "Every resample of two seeds and two tasks, counted."
    x = np.array([[0., 50], [10, 60]])
    each = sorted(iqm(np.array([a, b, c, d])) for a in (0, 10) for b in (0, 10) for c in (50, 60) for d in (50, 60))
    i, w = iqm_interval(x, 20_000), iqm_interval(x, 20_000, whole=True)
    assert (i.low, i.high, i.kind) == (each[0], each[-1], "scores") and (w.low, w.high, w.kind) == (25, 35, "seeds")
    assert iqm_interval(x[:1]).low is None and iqm_interval(x[:1]).mean == 25

def test_stratified_draws_stay_in_their_task():
    x = np.array([[0., 100], [1, 101], [2, 102]])
    i = iqm_interval(np.c_[x, x, x], 500)
    assert 40 < i.low < i.high < 62  # tasks drawn across each other would reach 0 and 102

def test_improvement_by_counting():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, (4, 6)).astype(float), rng.integers(0, 5, (3, 6)).astype(float)
    count = np.mean([[(a > b) + 0.5 * (a == b) for a in x[:, t] for b in y[:, t]] for t in range(6)])
    p = improvement(x, y, 300)
    assert p.mean == pytest.approx(count) and p.low <= count <= p.high
    assert improvement(y, x, 300).mean == pytest.approx(1 - count) and improvement(x, x, 10).mean == 0.5
    assert improvement(x + 10, y, 50)[:3] == (1, 1, 1) and improvement(x, y[:1]).low is None

def test_reference_without_scores():
    rows = summarize(Scores(("t",), {}, dict(b=np.ones((2, 1)))), "a", 200)
    assert rows[0]["better"] is None and ablation(rows, "a").data


# ---------------------------------------------------------------- the notebook

@pytest.mark.slow
def test_the_notebook_is_interrupted_and_goes_on(tmp_path):
    "Real children: an interrupt of papermill reaches them all, nothing stays behind, and a rerun finishes."
    cmd = [sys.executable, "-m", "papermill", "nbs/run_ablation.ipynb", tmp_path/"o.ipynb", "--cwd", ".", "--no-progress-bar", "-p", "out_dir", tmp_path/"run", "-p", "steps", 400, "-p", "jobs", 2]
    first = run(cmd, until=lambda text: all((tmp_path/"run"/n/"seed-0"/"metrics.jsonl").exists() for n in ("d=0", "d=0.45")), TDMPC_PRESET="tiny", grace=90)
    assert first.code != 0 and not first.left, first.output[-2000:]
    assert not (tmp_path/"run"/"report.json").exists()
    run([*cmd, "-p", "resume", "True"], TDMPC_PRESET="tiny").check()
    report = json.loads((tmp_path/"run"/"report.json").read_text())
    assert len(report["rows"]) == 2 and not report["failed"] and ((tmp_path/"run"/"ablation.png").exists() or (tmp_path/"run"/"ablation.html").exists())
