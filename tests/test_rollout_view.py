"""The rollout view without a browser: traces that repeat exactly, a cursor that only moves, choices that cannot be."""
import json, re, threading, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastcore.test import test_close as close
from fastcore.test import test_eq as eq
from tdmpc_opt_kit import rollout_view
from tdmpc_opt_kit.agent import make_agent
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.evaluate import data_dir
from tdmpc_opt_kit.planner import plan_config
from tdmpc_opt_kit.rollout import Stage, imagine, record, trace
from tdmpc_opt_kit.rollout_view import Plane, RolloutView, ghost, limits, path, planes, timeline
from tdmpc_opt_kit.tasks import MT30
from tdmpc_opt_kit.widgets import agent_models, known_tasks

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

def test_worker_and_page_draw_at_once(monkeypatch):
    "A run comes in while the cursor moves and the page turns dark: nobody changes a figure under another's hands."
    v, runs = RolloutView(second="none", task="cup-catch", mode="policy", steps=6), []
    monkeypatch.setattr(rollout_view, "render_backend", lambda: None)
    for task in ("cup-catch", "walker-walk"): runs.append(v.play(lambda *_: None, names=["student"], task=task, seed=0, mode="policy", cfg=None, steps=6))
    v.take(runs[0])
    eq([r["traces"][0].action.shape[1] for r in runs], [2, 6])
    said, failed, taken, moves, end = [], [], 0, 0, time.monotonic() + 60
    v.observe(lambda c: said.append(c.new), "message")
    def takes():
        nonlocal taken
        try:
            while (taken < 8 or moves < 30) and time.monotonic() < end:
                for r in runs[::-1]: v.take(r)
                taken += 2
                time.sleep(0.01)  # A lock is not fair: who takes it again at once keeps the other waiting
        except Exception as e: failed.append(e)
    worker = threading.Thread(target=takes)
    worker.start()
    while worker.is_alive():
        v.at = moves % 6; v.time.value = (moves + 2) % 6; moves += 1
        if moves % 9 == 0: v.theme.dark = not v.theme.dark
    worker.join()
    assert not failed and not any("Error" in s for s in said), (failed, set(said))
    eq(v.at, v.time.value); eq(v.columns[0].line.layout.shapes[0].x0, v.at); assert taken >= 8 and moves >= 30, (taken, moves)

def test_the_last_value_is_named():
    "Part of the return to go is the model's own: the words above the row and under the mouse say so."
    tr = trace(agent_models("student"), "cup-catch", mode="policy", max_steps=4)
    fig = timeline(tr, "#1d4ed8")
    assert "observed + last value" in fig.layout.annotations[1].text and "observed + last value" in fig.data[2].hovertemplate and fig.data[2].name == "observed + last value"
    eq((fig.data[2].y[-1], fig.data[0].name), (np.float32(tr.value[-1]), "observed"))

def test_tasks_that_were_learned():
    v = RolloutView(second="none", mode="policy", steps=6)
    eq(v.task_menu.options, known_tasks("student")); assert len(v.task_menu.options) < len(agent_models("student").tasks)
    v.task = "walker-run"
    eq((v.task_menu.value, v.message), ("walker-run", "task: student was not trained on walker-run."))
    v.third = "student int4"; eq(v.task, "walker-run")
    v.run(wait=True); assert v.message.startswith("6 decisions of walker-run") and v.message.endswith("student and student int4 were not trained on walker-run."), v.message
    v.task_menu.value = "cup-catch"; v.third = "none"
    eq(v.task_menu.options, known_tasks("student"))
    v.task = "no-task"; eq(v.task, "cup-catch"); assert v.message.startswith("task: no-task is not known to student")
    eq(RolloutView(second="none", task="walker-run").task_menu.value, "walker-run")

def test_agents_by_file_from_the_start():
    file = str(data_dir()/"teachers"/"walker-walk.safetensors")
    v = RolloutView(first=file, second="student")
    assert v.first == file and all(file in m.options for m, _ in v.box.menus)
    with pytest.raises(ConfigError, match="There is no agent 'nothing.pt'"): RolloutView(first="nothing.pt")

def test_the_head_fits_a_third_of_the_page(view):
    "Three agents at 1,000 pixels leave about 30 letters to each."
    for c in view.columns: assert len(re.sub("<.*?>", "", c.head.value)) <= 30, c.head.value

def test_the_notebook_leaves_stop_to_the_page():
    cells = [c for c in json.loads((Path(__file__).parents[1]/"nbs"/"explore_rollouts.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    i, = [i for i, c in enumerate(cells) if "display(view)" in "".join(c["source"])]
    assert cells[i]["source"][-1] == "view.run()" and cells[i + 1]["source"][0].strip() == "view.job.wait()"
