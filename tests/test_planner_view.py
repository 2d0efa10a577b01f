"""The view of one MPPI decision: its arrays, its figures and its handlers, without a browser."""
import json, re, threading, time
from html import unescape

import numpy as np
import pytest
import torch

import tdmpc_opt_kit.planner_view as module
from tdmpc_opt_kit.agent import TaskModels
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.evaluate import data_dir, repo_root
from tdmpc_opt_kit.planner import PLAN_PRESETS, PlanConfig, plan, plan_config
from tdmpc_opt_kit.planner_view import FIELDS, PlannerView, comparison, decision, horizon_figure, imagine, moves_figure, plan_ms, returns_figure, samples_figure
from tdmpc_opt_kit.tasks import ACTION_DIMS, MT30
from tdmpc_opt_kit.widgets import INK, agent_models, in_worker, known_tasks
from tdmpc_opt_kit.world_model import SIZES, WorldModel

OBS = np.zeros(24, np.float32)

@pytest.fixture(scope="module")
def student(): return agent_models("student")

@pytest.fixture(scope="module")
def anybody():
    "A tiny model of all tasks."
    torch.manual_seed(0)
    m = WorldModel(SIZES["tiny"]).eval()
    for p in m.parameters(): p.data += 0.1 * torch.randn_like(p)
    return TaskModels(m)

@pytest.fixture
def view():
    v = PlannerView("student", "cup-catch", plan="tiny", max_steps=12, moment=6, wait=True)
    assert v.job.error is None and v.quiet.error is None
    yield v
    v.wait()

# ---------------------------------------------------------------- one decision

@pytest.mark.parametrize("task", ["pendulum-spin", "cup-catch", "reacher-three-easy", "hopper-hop", "fish-swim", "walker-walk"])
def test_every_width(anybody, task):
    "One to six actions: arrays of the task's own width, a panel for each, whatever round and imagined decision."
    d, A = decision(anybody, task, OBS, plan_config("tiny")), next(ACTION_DIMS[t.index] for t in MT30 if t.name == task)
    assert d.candidates.shape == (2, 3, 32, A) and d.mean.shape == d.std.shape == (3, 3, A) and d.action.shape == (A,) and d.policy.shape == (3, A)
    fig = samples_figure(d, 1, 2)
    assert len({t.xaxis for t in fig.data}) == A
    assert all(a.title.text == f"action {k + 1} (−1 to 1)" for k, a in enumerate(fig.select_xaxes()) if k < A)
    with_itself = moves_figure(d, 1, 2, ghost=d).data  # As it is when somebody has just pinned it
    assert [(s.mode, s.line.dash, s.showlegend) for s in with_itself[:4]] == [("lines", "dot", False)] * 2 + [("lines+markers", None, True), ("lines+markers", None, False)] and len(with_itself) == 4 * A
    assert len(moves_figure(d, 1, 2).data) == 2 * A and len(horizon_figure(d, 2).data) == 3 * A

def test_equals_the_planner(student):
    "What is shown is what an agent does: the same noise gives the same action and the same last mean."
    m, own = student.model_for("cup-catch"), student.own[[12]]
    cfg = plan_config("light")
    action, state, info = plan(m, torch.zeros(1, m.cfg.obs_dim), own, None, cfg, torch.Generator().manual_seed(7))
    d = decision(student, "cup-catch", OBS, cfg, 7)
    np.testing.assert_array_equal(d.action, action[0, :2].numpy())
    np.testing.assert_array_equal(d.mean[-1], state.mean[0, :, :2].numpy())
    np.testing.assert_allclose(d.weights[-1], info.elite_weights[0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(d.std[1:], info.std[0, ..., :2].numpy())

def test_predicted_return_is_the_planners(student):
    "With samples that hardly differ, the planner's own values are the predicted return of their mean."
    cfg = PlanConfig(num_samples=8, num_pi_trajs=0, num_elites=8, iterations=1, min_std=1e-6, max_std=1e-6)
    d = decision(student, "cup-catch", OBS, cfg)
    assert abs(d.returns["plan"] - d.values[0].mean()) < 0.02 * abs(d.values[0].mean()) + 0.05
    m, own = student.model_for("cup-catch"), student.own[[12]]
    actions, promised = imagine(m, torch.zeros(1, m.cfg.obs_dim), own, cfg)
    again = imagine(m, torch.zeros(1, m.cfg.obs_dim), own, cfg, actions)[1]
    assert promised == pytest.approx(again, abs=1e-4) == pytest.approx(d.returns["policy"], abs=1e-4)

def test_temperature_keeps_the_samples(student):
    cold, hot = (decision(student, "cup-catch", OBS, plan_config("reduced", temperature=t)) for t in (0., 1000.))
    np.testing.assert_array_equal(cold.candidates[0], hot.candidates[0])
    assert cold.counting == pytest.approx(16, rel=1e-4) and hot.counting[0] < 8

def test_timing_ends_when_told(anybody):
    asked = []
    assert plan_ms(anybody, "cup-catch", OBS, plan_config("tiny"), repeats=50, enough=lambda: asked.append(1) or len(asked) > 1) > 0
    assert len(asked) == 2

def test_wrong_questions(student):
    with pytest.raises(ConfigError, match="No model for fish-swim"): decision(agent_models("teachers"), "fish-swim", OBS)
    with pytest.raises(ConfigError, match="policy alone"): decision(agent_models(str(data_dir()/"students"/"student_policy_fp16.safetensors")), "cup-catch", OBS)

# ---------------------------------------------------------------- figures

@pytest.fixture(scope="module")
def both(anybody): return [decision(anybody, "walker-walk", OBS, plan_config(**o)) for o in (dict(), dict(horizon=2, iterations=3, num_samples=64, num_elites=8, anchor=20.))]

def test_samples(both):
    "All elites and all of the policy's, some of the others, nobody twice."
    d, other = both
    fig = samples_figure(d, 2, 1, most=50)
    few, elites, policy = fig.data[:3]
    assert (len(few.x), len(elites.x), len(policy.x)) == (50, 64, 24)
    assert not set(zip(few.x, few.y)) & (set(zip(elites.x, elites.y)) | set(zip(policy.x, policy.y)))
    assert min(elites.y) >= max(few.y), "an elite is better than any sample that is none"
    assert "64 elites, 24 of the policy, 50 of 4" in fig.layout.title.text
    ranges = {samples_figure(d, i, h).layout.yaxis.range for i in range(6) for h in (0, 2)}
    assert len(ranges) == 1, "the axes stay while rounds go by"
    assert len(samples_figure(d, 0, 0, ghost=other).layout.shapes) == len(samples_figure(d, 0, 0).layout.shapes) + 6
    assert len(samples_figure(d, 0, 2, ghost=other).layout.shapes) == len(samples_figure(d, 0, 2).layout.shapes), "the pinned plan does not look that far"
    assert "anchor" in samples_figure(other, 0, 0).layout.yaxis.title.text

@pytest.mark.parametrize("dark", [False, True])
def test_themes_and_axes(both, dark):
    d, g = both
    for fig in (samples_figure(d, 0, 0, ghost=g, dark=dark), moves_figure(d, 0, 0, ghost=g, dark=dark), returns_figure(d, 0, g, dark), horizon_figure(d, 0, ghost=g, dark=dark)):
        assert fig.layout.font.color == INK[dark]["text"] and fig.layout.paper_bgcolor == "rgba(0, 0, 0, 0)"
        assert all(a.title.text for a in fig.select_xaxes()) and next(iter(fig.select_yaxes())).title.text
        said = str(fig.to_plotly_json())
        assert ("#1d4ed8" in said) != dark, "the house's blue on white, its bright sister on black"

def test_without_the_policys_candidates(anybody):
    d = decision(anybody, "cup-catch", OBS, plan_config("tiny", num_pi_trajs=0))
    assert len(samples_figure(d, 0, 0).data[2].x) == 0 and "policy's" not in str([t.name for t in returns_figure(d, 0).data])

def test_all_candidates_are_elites(anybody):
    d = decision(anybody, "cup-catch", OBS, plan_config("tiny", num_elites=32))
    assert len(samples_figure(d, 0, 0).data[0].x) == 0

def test_table(both):
    table = comparison(dict(now=both[0], before=both[1], pinned=None), 4, [f"<{k}>" for k in "abcdef"])
    assert table.count("<tr>") == 1 + 6 + 3 and "&lt;a&gt;" in table and "…" in table

def test_table_fits_its_column(both, view):
    "With a pinned plan and times of four digits there are still five columns in the left half."
    d = both[0]
    d.ms = 1234.
    table = comparison(dict(now=d, before=d, pinned=d), 4, ["right_ankle", *"abcde"])
    size, padding = (float(re.search(rf"{k}[^;\"]*?(\d+)px", table)[1]) for k in ("font-size:", "padding:"))
    rows = [[unescape(re.sub("<[^>]+>", "", c)) for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in re.findall("<tr>.*?</tr>", table)]
    needed = sum(0.56 * size * max(map(len, column)) + 2 * padding for column in zip(*rows, strict=True))
    assert needed < float(view.widget.children[1].children[0].layout.flex.split()[-1].removesuffix("px")) - 20

# ---------------------------------------------------------------- the view

@pytest.mark.parametrize(("name", "value"), [("iterations", 3), ("num_samples", 64), ("num_elites", 4), ("horizon", 2), ("temperature", 0.7), ("num_pi_trajs", 0), ("anchor", 20.), ("min_std", 0.2), ("max_std", 1.)])
def test_each_setting_plans_anew(view, name, value):
    "From the page, from code, also a value that is no rung of its ladder."
    before, drawn = view.decision, [list(t.x) + list(t.y) for t in view.figures["samples"].data]
    if value in [o[-1] if isinstance(o, tuple) else o for o in getattr(view.sliders[name], "options", [value])]: view.sliders[name].value = value
    else: setattr(view, name, value)
    view.wait()
    assert getattr(view.decision.cfg, name) == value == view.sliders[name].value == getattr(view, name)
    assert view.decision is not before and view.before is before
    assert view.decision.ms > 0 and f"Replanned in {view.decision.ms:.0f} ms" in view.message and f"{name} " in view.message
    assert drawn != [list(t.x) + list(t.y) for t in view.figures["samples"].data]

def test_presets(view):
    for n, b in view.presets.items():
        b.click()
        view.wait()
        assert view.decision.cfg == plan_config(n) and all(view.sliders[f].value == getattr(plan_config(n), f) for f in FIELDS)
    assert set(view.presets) < set(PLAN_PRESETS)

def test_moment_seed_and_warm_start(view):
    images, means = [view.picture.value], [view.decision.mean[0].copy()]
    assert view.warm and np.abs(means[0]).max() > 0, "the plan before is where this one starts"
    view.warmth.value = False
    view.wait()
    assert np.abs(view.decision.mean[0]).max() == 0
    view.sliders["moment"].value = 9
    view.wait()
    assert "decision 9 of 12" in view.caption.value and (not images[0] or view.picture.value != images[0])
    view.warm, view.moment = True, 0
    assert np.abs(view.wait().decision.mean[0]).max() == 0, "an episode's start has no plan before"
    obs = view.episode.obs.copy()
    view.sliders["seed"].value = 1
    view.wait()
    assert np.abs(view.episode.obs - obs).max() > 0

def test_looking_only_redraws(view):
    d, n = view.decision, lambda name: [list(t.y) for t in view.figures[name].data]
    x = lambda: [list(t.x) for t in view.figures["samples"].data]
    was = x()
    view.sliders["shown"].value = 2
    assert x() != was and view.player.value == 2
    assert {s.x0 for s in view.figures["moves"].layout.shapes[:2]} == {view.figures["returns"].layout.shapes[0].x0} == {2}
    was, moves = x(), n("moves")
    view.sliders["imagined"].value = 3
    assert x() != was and n("moves") != moves and view.figures["horizon"].layout.shapes[0].x0 == 2.6
    view.player.value = 1
    assert view.shown == 1
    assert view.decision is d and not view.job.running and not view.quiet.running
    view.shown = 7
    assert view.message == "round: this plan has 2, counted from 1; there is none of number 7."
    view.shown = 1
    view.imagined = 0
    assert "imagined decision: this plan has 3" in view.message

def test_redraw_is_quick():
    "Six panels at the published settings: what only redraws takes little of the processor, whoever else uses it."
    v = PlannerView("student", "walker-walk", max_steps=3, moment=1, wait=True)
    took = []
    for k in range(5):
        t0 = time.process_time()
        v.shown = k + 2
        took.append(time.process_time() - t0)
    for h in (2, 3, 1):
        t0 = time.process_time()
        v.imagined = h
        took.append(time.process_time() - t0)
    assert np.median(took[:5]) < 0.4 and np.median(took[5:]) < 0.4, took

def test_quick_ways_end_where_the_figures_do(view):
    "What only moves numbers shows what a figure made anew would show."
    def same():
        d, i, h = view.decision, view.shown - 1, view.imagined - 1
        made = dict(samples=samples_figure(d, i, h, view.names, view.pin, view.most), moves=moves_figure(d, i, h, view.names, view.pin), returns=returns_figure(d, i, view.pin), horizon=horizon_figure(d, h, view.names, view.pin))
        for n, fig in made.items():
            for a, b in zip(view.figures[n].data, fig.data, strict=True):
                np.testing.assert_array_equal(a.x, b.x)
                np.testing.assert_array_equal(a.y, b.y)
            assert [s.to_plotly_json() for s in view.figures[n].layout.shapes] == [s.to_plotly_json() for s in fig.layout.shapes], n
            assert view.figures[n].layout.yaxis.range == fig.layout.yaxis.range and view.figures[n].layout.title.text == fig.layout.title.text
    for trait, value in (("shown", 2), ("temperature", 5.), ("imagined", 3), ("anchor", 20.), ("seed", 1), ("pinned", True), ("temperature", 1.), ("horizon", 2), ("moment", 3), ("imagined", 1), ("pinned", False), ("task", "walker-walk"), ("temperature", 2.), ("task", "pendulum-spin"), ("iterations", 4), ("shown", 3)):
        setattr(view, trait, value)
        view.wait()
        same()

def test_fewer_rounds_than_shown(view):
    view.shown, view.imagined = 2, 3
    view.iterations, view.horizon = 1, 1
    view.wait()
    assert (view.shown, view.imagined, view.sliders["shown"].max, view.sliders["imagined"].max) == (1, 1, 1, 1)

def test_refused_settings(view):
    d = view.decision
    for name, value, said in (("num_elites", 64, "num_elites must be at most num_samples = 32, not 64"), ("num_pi_trajs", 48, "num_pi_trajs must be from 0 to"), ("min_std", 5., "min_std <= max_std"), ("temperature", -1., "temperature must not be negative"), ("iterations", 0, "iterations must be at least 1"), ("moment", 99, "moment: the episode has decisions 0 to 11")):
        was = getattr(view, name)
        setattr(view, name, value)
        assert said in view.message and view.wait().decision is d
        setattr(view, name, was)
        view.wait()
    assert view.decision is d and view.quiet.error is None

def test_last_wish_counts(view, monkeypatch):
    "A slider that is dragged leaves no queue of plans behind."
    made, real = [], module.decision
    def slowly(*args, **kwargs):
        made.append(1)
        time.sleep(0.1)
        return real(*args, **kwargs)
    monkeypatch.setattr(module, "decision", slowly)
    for t in np.linspace(0.1, 3, 20): view.temperature = float(t)
    assert view.wait().decision.cfg.temperature == 3.
    assert len(made) <= 6, "two or three plans, each with its warm start"

def test_pin(view):
    was = len(view.figures["moves"].data)
    view.pinning.value = True
    pinned = view.decision
    assert view.pin is pinned and len(view.figures["moves"].data) == 2 * was and view.pinning.description == "Unpin"
    view.temperature = 5.
    view.wait()
    assert view.pin is pinned is not view.decision and "pinned" in view.numbers.value
    view.pinned = False
    assert view.pin is None and len(view.figures["moves"].data) == was and "pinned" not in view.numbers.value
    view.pinned = True
    view.task = "pendulum-spin"
    view.wait()
    assert view.pin is None and not view.pinned and view.pinning.description == "Pin this plan", "plans of two tasks are not compared"

def test_tasks_and_agents(view):
    view.menus["task"].value = "walker-walk"
    view.wait()
    assert view.decision.action.shape == (6,) and "right_hip" in view.numbers.value
    view.menus["task"].value = "cartpole-balance"
    view.wait()
    assert view.decision.action.shape == (1,) and len(view.figures["samples"].data) == 3
    view.menus["agent"].value = "teachers"
    view.wait()
    assert view.task == "cartpole-balance" and "teachers, cartpole-balance" in view.caption.value
    path = str(data_dir()/"teachers"/"cup-spin.safetensors")
    d = view.decision
    view.box.text.value = path
    view.box.button.click()
    view.wait()
    assert (view.agent, view.menus["agent"].value) == ("teachers", "teachers") and view.decision is d, "a longer menu is no other choice"
    assert view.message == f"{path} is in the menus now; it knows 1 task."
    view.menus["agent"].value = path
    view.wait()
    assert view.task == "cup-spin" == view.menus["task"].value and view.menus["task"].options == ("cup-spin",), "the only task that it knows"

def test_file_from_the_start():
    "The menu shows what the view was given, and whatever code asks for later."
    path, other = (str(data_dir()/"teachers"/f"{t}.safetensors") for t in ("cup-spin", "cup-catch"))
    v = PlannerView(path, "cup-spin", plan="tiny", max_steps=4, moment=2, wait=True)
    agree = lambda name: v.agent == v.menus["agent"].value == name and name in v.caption.value and v.job.error is None
    assert agree(path)
    v.menus["agent"].value = "student"
    assert v.wait() and agree("student") and v.task == "cup-spin"
    v.agent, v.task = other, "cup-catch"
    assert v.wait() and agree(other)
    v.menus["agent"].value = path
    assert v.wait() and agree(path) and v.task == "cup-spin"

def test_tasks_by_card(view, monkeypatch, anybody):
    "What the card says was trained on; everything where nothing does."
    assert view.menus["task"].options == known_tasks("student") and len(view.menus["task"].options) == 14
    view.task = "fish-swim"
    view.wait()
    assert "task: student does not know 'fish-swim'" in view.message and view.task == "cup-catch"
    monkeypatch.setattr(module, "agent_models", lambda name: anybody)
    monkeypatch.setattr(module, "known_tasks", lambda name: tuple(t.name for t in anybody.tasks))
    view.seed = 1
    view.wait()
    assert len(view.menus["task"].options) == 30

def test_slow_wishes_get_the_bar(view, monkeypatch):
    "Whatever the quiet job is at: another episode, or a slow plan, is left to the job with bar and Stop."
    jobs, timing, go = [], threading.Event(), threading.Event()
    def noting(name):
        real = getattr(module, name)
        def f(*args, **kwargs):
            jobs.append((name, view.job.running, view.quiet.running))
            return real(*args, **kwargs)
        monkeypatch.setattr(module, name, f)
    def slow_timing(*args, **kwargs):
        timing.set()
        assert go.wait(20)
        return 1.
    def while_quiet(wish):
        for e in (timing, go): e.clear()
        view.temperature += 1
        assert timing.wait(20) and view.quiet.running and not view.job.running
        jobs.clear()
        wish()
        go.set()
        view.wait()
    view.warm = False
    view.wait()
    monkeypatch.setattr(module, "plan_ms", slow_timing)
    for n in ("play", "decision"): noting(n)
    while_quiet(lambda: setattr(view, "task", "walker-walk"))
    assert jobs == [("play", True, False), ("decision", True, False)] and view.decision.task.name == "walker-walk"
    def slow():
        monkeypatch.setattr(module, "_SLOW", 0.)
        view.temperature += 1
    while_quiet(slow)
    assert jobs == [("decision", True, False)] and view.decision.cfg.temperature == view.temperature

def test_wrong_agents_and_tasks(view):
    view.agent = "teachers"
    view.wait()
    d = view.decision
    for trait, value, said in (("agent", "studnet", "There is no agent 'studnet'"), ("agent", str(data_dir()/"students"/"student_policy_fp16.safetensors"), "is a policy alone, so nobody can plan with it"), ("task", "fish-swim", "task: teachers does not know 'fish-swim'; it knows walker-stand"), ("task", "nonsense", "does not know 'nonsense'")):
        setattr(view, trait, value)
        view.wait()
        assert said in view.message and view.decision is d
        assert (view.agent, view.task, view.menus["agent"].value, view.menus["task"].value) == ("teachers", "cup-catch", "teachers", "cup-catch")
    view.temperature = 1.
    assert view.wait().decision.cfg.temperature == 1., "and it goes on"

def test_nothing_at_first():
    v = PlannerView("studnet", wait=True)
    assert "There is no agent 'studnet'" in v.message and v.decision is None and v.menus["agent"].value == "studnet"
    v.shown, v.pinned, v.theme.dark = 1, True, True
    assert "there is none yet" in v.message
    v.pinned, v.max_steps, v.moment = False, 2, 1
    v.menus["agent"].value = "student"
    assert v.wait().decision is not None and "student, walker-walk" in v.caption.value

def test_stop(view, monkeypatch):
    d = view.decision
    def endless(models, task, seed, max_steps, tell):
        while True:
            tell(1, 2)
            time.sleep(0.01)
    monkeypatch.setattr(module, "play", endless)
    view.task = "cup-spin"
    view.job.stop()
    view.wait()
    assert view.message == "Stopped." and view.decision is d and view.task == "cup-catch"

def test_without_pictures(monkeypatch):
    monkeypatch.setattr(module, "render_backend", lambda: None)
    v = PlannerView("student", "cup-catch", plan="tiny", max_steps=4, moment=2, wait=True)
    assert v.job.error is None and v.decision is not None and v.picture.layout.display == "none"

def test_old_renderers_are_freed(anybody):
    "Pictures of many views do not pile up; the oldest lose theirs, and nothing else."
    played = [in_worker(module.play, anybody, "cup-catch", k, 2) for k in range(module._most_open + 2)]
    if module.render_backend() is None: pytest.skip("nothing draws here")
    assert [bool(in_worker(e.jpeg, 1)) for e in played] == [False] * 2 + [True] * module._most_open and len(module._open) == module._most_open
    in_worker(module._close_all)
    assert not module._open

def test_pages_that_come_late(view):
    "Whatever the page draws a figure from is what the view shows; a figure drawn before that is put there again."
    for n, w in view.figures.items():
        assert len(w._widget_data) == len(w.data) > 0 and w._widget_layout["title"]["text"] == w.layout.title.text
    put = []
    view.places["moves"].observe(lambda c: put.append(len(c.new)), "children")
    view._mounted("moves", dict(layout_delta=dict(height=350)))
    assert put == []
    view._mounted("moves", dict(layout_delta=dict(height=360)))
    assert put == [0, 1]

def test_theme(view):
    view.theme.dark = True
    assert {f.layout.font.color for f in view.figures.values()} == {INK[True]["text"]}

def test_notebook_for_readers():
    "Whoever only reads finds the view's place, and a picture right below it."
    cells = [c for c in json.loads((repo_root()/"nbs"/"explore_planner.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    kinds = [{k for o in c["outputs"] for k in o.get("data", ())} for c in cells[:2]]
    assert "application/vnd.jupyter.widget-view+json" in kinds[0] and "image/png" in kinds[1]
