"""The rollout view without a browser: traces that repeat exactly, a cursor that only moves, choices that cannot be."""
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fastcore.test import test_close as close
from fastcore.test import test_eq as eq
from tdmpc_opt_kit import rollout_view
from tdmpc_opt_kit.agent import make_agent
from tdmpc_opt_kit.evaluate import data_dir
from tdmpc_opt_kit.planner import plan_config
from tdmpc_opt_kit.rollout import Stage, imagine, record, trace
from tdmpc_opt_kit.rollout_view import Plane, RolloutView, ghost, limits, path, planes, timeline
from tdmpc_opt_kit.tasks import MT30
from tdmpc_opt_kit.widgets import agent_models

TINY = plan_config("tiny")
DOMAINS = list({t.domain + str(t.custom): t.name for t in MT30}.values())

@pytest.mark.parametrize("task", DOMAINS)
def test_any_moment_again(task):
    "From every stored state the rest of the episode comes again, bit by bit, in a simulator that was only reset."
    tr = trace(agent_models("student"), task, seed=4, mode="policy", max_steps=25)
    stage = Stage(task, 4)
    for t in (13, 0, 24):
        obs, reward, moments = stage.play(tr.moments[t], tr.action[t:])
        eq(obs, tr.obs[t + 1:]); eq(reward, tr.reward[t:]); eq(moments, tr.moments[t:])

@pytest.mark.parametrize("agent", ["student", "teachers", "student int8", "student fp16"])
@pytest.mark.parametrize("mode", ["plan", "policy"])
def test_a_trace_is_the_recorded_episode(agent, mode):
    models = agent_models(agent)
    tr = trace(models, "walker-walk", seed=2, mode=mode, plan_config=TINY, max_steps=12)
    obs, action, reward = record(make_agent(models, mode, 2, plan_config=TINY), "walker-walk", seed=2, max_steps=12)
    eq(tr.obs, obs); eq(tr.action, action[1:]); eq(tr.reward.astype(np.float32), reward[1:])
    eq(tr.total, float(tr.reward.sum()))

def test_predictions_are_the_models():
    import torch
    tr = trace(agent_models("teachers"), "cup-catch", seed=0, mode="policy", max_steps=6)
    wide = torch.zeros(6, 24); wide[:, :8] = torch.from_numpy(tr.obs[:6])
    act = torch.zeros(6, 6); act[:, :2] = torch.from_numpy(tr.action)
    close(tr.predicted, agent_models("teachers").reward(wide, act, torch.full((6,), tr.spec.index))[:, 0].numpy(), eps=1e-4)

def test_imagined_steps_are_the_models_own():
    tr = trace(agent_models("student"), "cartpole-swingup", seed=1, plan_config=TINY, max_steps=20)
    d = imagine(tr, 5, 9)
    eq(d.planned, 3); eq(d.action[:3], tr.plan(5)); eq(d.true_obs[1], tr.obs[6]); eq(d.true_reward[0], tr.reward[5])
    close(d.reward[0], tr.predicted[5], eps=1e-4); close(d.value[0], tr.value[5], eps=1e-3); close(d.true_z[1], tr.z[6], eps=1e-5)
    assert d.error[0] < 1e-5 < d.error[1], "imagination is not the truth"
    d.z[3], d.true_z[3] = d.true_z[0], d.true_z[0]  # an error of zero is no smaller than no change
    assert d.usable <= 2

@pytest.fixture(scope="module")
def view():
    v = RolloutView(first="student", second="teachers", third="student int4", task="cartpole-swingup", mode="plan", planner="tiny", steps=30)
    v.run(wait=True)
    assert "30 decisions" in v.message, v.message
    return v

def test_the_cursor_moves_everything(view):
    images = [c.image.value for c in view.columns]
    traces = [t.uid for c in view.columns for t in c.line.data]
    view.time.value = 17
    for c, before in zip(view.columns, images):
        eq(c.line.layout.shapes[0].x0, 17); close(c.path.data[1].x[0], c.plane(c.trace.z)[17, 0], eps=1e-5)
        assert not c.frames or c.image.value == c.frames[17] != before
        assert f"{c.trace.value[17]:.1f}" in c.now.value
    eq([t.uid for c in view.columns for t in c.line.data], traces)
    eq(view.clock.value, "decision 17 of 30, 0.34 s")

def test_a_click_jumps(view):
    line = view.columns[1].line.data[3]
    click = lambda t, i, x: t._dispatch_on_click(SimpleNamespace(point_inds=[i], xs=[x], ys=[0.]), None)
    click(line, 8, 8.)
    eq(view.at, 8)
    click(view.columns[2].path.data[0], 21, -0.3)
    eq((view.at, view.time.value), (21, 21))

def test_imagine_and_its_ghost(view):
    view.at = 12; view.ahead_slider.value = 6
    view.imagine(wait=True)
    eq(view.message, "")
    eq((view.dreamt_at, view.ghost, view.ghost_slider.max), (12, 6, 6))
    c = view.columns[0]
    eq(len(c.dreamt), 6); assert "reward off by" in c.trust.value and len(c.path.data[2].x) == 7
    assert not c.ghosts or c.image.value == c.ghosts[6]
    view.ghost_slider.value = 2
    eq(c.dream.layout.shapes[0].x0, 2); assert not c.ghosts or c.image.value == c.ghosts[2]
    view.at = 20
    assert not c.frames or c.image.value == c.frames[20]
    view.ghost = 3
    eq(view.at, 12); assert not c.ghosts or c.image.value == c.ghosts[3]

def test_redraws_are_quick(view):
    took = []
    for t in range(0, 20):
        t0 = time.perf_counter(); view.at = t; took.append(time.perf_counter() - t0)
    print(f"the cursor moves three agents in {1000 * np.median(took):.0f} ms")
    assert np.median(took) < 0.2

def test_themes(view):
    light = view.columns[0].line.data[1].line.color
    view.theme.dark = True
    assert view.columns[0].line.data[1].line.color != light and view.columns[0].path.layout.font.color == "#e5e7eb"
    click = view.columns[0].line.data[0]._click_callbacks
    view.theme.dark = False
    assert click, "a redrawn curve can still be clicked"

def test_stop_leaves_what_was_played():
    v = RolloutView(first="student", second="none", task="pendulum-swingup", mode="policy", steps=500)
    def stop(change):
        if change.new > 0.02: v.job.stop()
    v.job.observe(stop, "progress")
    said = []
    v.observe(lambda c: said.append(c.new), "message")
    v.run(wait=True)
    assert not any("Error" in s for s in said), said
    n = len(v.traces[0])
    assert 0 < n < 500 and f"Stopped after {n} decisions" in v.message, v.message
    eq((v.time.max, len(v.stand.children), len(v.columns[0].line.data[0].x)), (n, 1, n))

def test_wrong_choices_are_sentences(monkeypatch):
    v = RolloutView(first="none", second="none")
    v.imagine(); assert "press Run first" in v.message
    v.run(); assert v.message == "agents: all three are none; choose at least one."
    walker, cup = (str(data_dir()/"teachers"/f"{t}.safetensors") for t in ("walker-walk", "cup-catch"))
    v.box.add(walker); v.box.add(cup)
    v.task = "cartpole-balance"; v.first = walker
    eq(v.task, "walker-walk"); assert v.message.startswith("task: cartpole-balance is not known")
    v.second = cup; assert v.message.startswith("agents: there is no task") and v.task == "walker-walk"
    v.run(); assert v.message.startswith("task: ") and "does not know walker-walk" in v.message and "cup-catch" in v.message
    v.box.add("nothing.pt"); assert "There is no agent" in v.message
    acting = str(data_dir()/"students"/"student_policy_fp16.safetensors")
    v.box.add(acting); v.first, v.second, v.task = acting, "none", "cup-catch"
    v.run(wait=True); assert "policy alone" in v.message and not v.traces
    v.mode, v.steps = "policy", 8
    v.run(wait=True); assert "8 decisions" in v.message, v.message
    assert np.isnan(v.traces[0].value).all() and "predicted none" in v.columns[0].now.value
    v.imagine(wait=True); assert "policy alone" in v.columns[0].trust.value

def test_without_pictures(monkeypatch):
    monkeypatch.setattr(rollout_view, "render_backend", lambda: None)
    v = RolloutView(second="none", task="cup-catch", mode="policy", steps=8)
    v.run(wait=True); v.at = 3; v.imagine(wait=True)
    assert "No pictures here" in v.pictures.value and v.columns[0].film.layout.display == "none"
    eq(len(v.columns[0].dreamt), v.ahead); eq(v.columns[0].ghosts, [])

def test_figures_of_little():
    "A single decision, and an agent whose latents do not move."
    tr = trace(agent_models("student"), "cup-catch", mode="policy", max_steps=1)
    plane, = planes(["student"], [tr])
    eq(len(timeline(tr, "#1d4ed8", 1, limits([tr]), dark=True).data), 4 + 2 * 2)
    eq(len(path(tr, plane, "#1d4ed8", 1).data[0].x), 2)
    still = Plane([np.ones((5, 8))]); eq(still.shares, [0, 0]); assert np.isfinite(still.limits).all()

def test_the_ghost_is_the_body_alone():
    a, b, where = np.full((6, 6, 3), 90, np.uint8), np.full((6, 6, 3), 230, np.uint8), np.zeros((6, 6), bool)
    where[2:4, 2:4] = True
    out = ghost(a, b, where)
    eq((out != a).any(-1), where); assert (out[2:4, 2:4, 1] > out[2:4, 2:4, 0]).all()
