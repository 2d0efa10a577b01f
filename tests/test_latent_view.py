"""The latent view without a browser: what its figures say, what its controls do, what wrong choices are answered."""
import threading, time

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.analyze import ModelError
from tdmpc_opt_kit.checkpoint import save_world_model
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.evaluate import data_dir
from tdmpc_opt_kit.latent_view import TABS, LatentView, Points, cka_figure, error_figure, looks, map_figure, probe_figure
from tdmpc_opt_kit.tasks import MT30
from tdmpc_opt_kit.widgets import agent_models, known_tasks
from tdmpc_opt_kit.world_model import SIZES, WorldModel, policy_only

@pytest.fixture(scope="module")
def view():
    v = LatentView("tiny", wait=True)
    assert 0 in v.data, v.message
    return v

@pytest.fixture(autouse=True)
def as_it_was(request):
    "The shared view goes back to its first choices."
    yield
    if "view" not in request.fixturenames: return
    v = request.getfixturevalue("view")
    v.tab, v.tasks, v.map_a, v.map_b, v.map_c, v.method, v.together, v.colour, v.follow, v.actor, v.episodes = 0, ("walker-walk", "cup-catch", "cartpole-swingup"), "student", "none", "none", "PCA", False, "task", "hover", "student", 2
    v.job.wait()

def states(fig): return [t for t in fig.data if t.name != "chosen"]

def test_first_map(view):
    p = view.points
    assert len(p) == 120 and p.tasks == ["walker-walk", "cartpole-swingup", "cup-catch"] and p.method == "PCA" and len(view.recorded) == 6
    assert sum(len(t.x) for t in states(view.figures[0])) == 120
    for i in (0, 50, 119):  # every point is the state that it says
        e = view.recorded[p.episode[i]]
        assert e.task == p.task[i] and e.reward[p.decision[i]] == pytest.approx(p.reward[i])

@pytest.mark.parametrize("colour", ["reward", "value", "time"])
def test_colours_are_numbers(view, colour):
    view.colour = colour
    p, fig = view.points, view.figures[0]
    want = dict(reward=p.reward, value=p.value["student"], time=p.decision)[colour]
    got = np.empty(len(p))
    for t in states(fig): got[np.asarray(t.customdata)[:, 0].astype(int)] = t.marker.color
    assert np.allclose(got, want, atol=1e-4) and fig.layout.coloraxis.colorbar.title.text and not any(t.showlegend for t in states(fig))

def test_a_ring_and_a_frame(view):
    view.point = 30
    p = view.points
    ring = view.figures[0].data[-1]
    assert np.allclose([ring.x[0], ring.y[0]], p.xy["student"][30])
    view.filmed()
    first = bytes(view.image.value)
    assert first[:2] == b"\xff\xd8" and p.task[30] in view.caption.value and view.image.layout.display == "block"
    view.point = 70
    assert bytes(view.filmed().image.value) != first
    assert view.image.layout.visibility == "visible"
    view.point = 30
    assert bytes(view.filmed().image.value) == first, "kept, or drawn the same"

def test_only_the_last_of_many_points_is_drawn(view):
    for i in range(20): view.point = i
    view.filmed()
    e = view.recorded[view.points.episode[19]]
    assert len([k for k in view.camera.frames if k[1] == e.seed]) < 15 and f"{view.points.decision[19]} of" in view.caption.value

def test_hover_and_click(view):
    class At: point_inds = [3]
    trace = states(view.figures[0])[1]
    want = int(trace.customdata[3][0])
    view.follow = "click"
    trace._dispatch_on_hover(At, None); assert view.point != want
    trace._dispatch_on_click(At, None); assert view.point == want
    view.follow, view.point = "hover", -1
    trace._dispatch_on_hover(At, None); assert view.point == want
    view.colour = "agent"  # traces are new; they listen too
    view.point = -1
    states(view.figures[0])[1]._dispatch_on_click(At, None); assert view.point == want

def test_agents_beside_each_other_and_together(view):
    view.map_b = "teachers"
    view.job.wait()
    assert view.points.agents == ["student", "teachers"] and len({t.xaxis for t in view.figures[0].data}) == 2
    view.point = 11
    assert [len(t.x) for t in view.figures[0].data[-2:]] == [1, 1]
    view.together = True
    assert "one map for all" in view.message and "teachers: 64" in view.message.replace("sorted", "")
    view.map_b = "student int4"
    view.job.wait()
    p = view.points
    assert p.together and p.agents == ["student", "student int4"] and len({t.xaxis for t in view.figures[0].data}) == 1
    z = np.linalg.norm(p.xy["student"] - p.xy["student int4"], axis=1).mean()
    assert 0 < z < p.xy["student"].std(), "four bits move a latent, but not to elsewhere"
    view.point = 5
    assert len(view.figures[0].data[-1].x) == 2

def test_tsne_goes_through_the_cache(view, tmp_path, monkeypatch):
    import tdmpc_opt_kit.analyze as analyze
    monkeypatch.setattr(analyze, "repo_root", lambda: tmp_path)
    view.neighbours, view.method = 10, "t-SNE"
    view.job.wait()
    assert "t-SNE took" in view.message and view.points.method == "t-SNE" and "no unit" in view.figures[0].layout.xaxis.title.text
    view.method = "PCA"; view.job.wait()
    view.method = "t-SNE"; view.job.wait()
    assert "from the cache" in view.message
    view.neighbours = 60; view.job.wait()
    assert "neighbours: 60 is too many for 120 points" in view.message and view.job.error is not None

@pytest.mark.parametrize(("change", "said"), [
    (dict(tasks=()), "tasks: none is chosen"), (dict(tasks=("walker-run",)), "played by: student does not know walker-run"),
    (dict(tab=1, tree="teachers"), "networks of single tasks without task embeddings"), (dict(tab=2, cka_b="teachers"), "agent 2: choose another agent"),
    (dict(tab=3, probe_task="hopper-hop"), "does not know hopper-hop")])
def test_wrong_choices_are_a_line(view, change, said):
    first = {k: getattr(view, k) for k in change}
    for k, v in change.items(): setattr(view, k, v)
    view.job.wait()
    assert said in view.message and "\n" not in view.message and "Error" not in view.message
    for k, v in reversed(first.items()): setattr(view, k, v)
    view.job.wait()

def test_every_tab(view):
    for tab in range(1, len(TABS)):
        view.tab = tab
        view.job.wait()
        assert tab in view.data, view.message
        assert len(view.figures[tab].data) and (view.figures[tab].layout.xaxis.title.text or view.figures[tab].layout.yaxis.title.text)
    assert set(view.data[1][0][0].tasks) == set(known_tasks("student")) and view.data[1][0][1] == "student"
    out, names = view.data[2][0]
    assert names == ("teachers", "student") and set(out) == set(view.tasks) and all(0 <= r["floor"] <= 1 and 0 < r["low"] <= r["high"] <= 1 for r in out.values())
    results, task = view.data[3][0]
    assert list(results) == ["observation", "teachers", "student", "student int4"] and task == "walker-walk" and results["observation"]["torso height, m"]["r2"] > 0.9
    assert list(view.data[4][0]) == ["student", "teachers"]
    before = list(view.figures[4].data[2].x)
    view.step = 1
    assert list(view.figures[4].data[2].x) != before and view.figures[4].layout.shapes[0].x0 == 1
    view.tab, view.order = 2, "task"
    assert list(view.figures[2].data[0].y) == [t.name for t in MT30 if t.name in view.tasks]

def test_dark_repaints_everything_and_computes_nothing(view):
    told = []
    view.job.observe(lambda c: told.append(c.new), "running")
    view.theme.dark = True
    assert view.figures[0].layout.font.color == "#e5e7eb" and not told
    view.theme.dark = False
    assert view.figures[0].layout.font.color == "#1f2937"

def test_a_change_ends_what_is_computed(view):
    view.cfg = view.cfg | dict(max_steps=400)
    view.episodes = 11
    time.sleep(0.2)
    view.cfg = view.cfg | dict(max_steps=60)
    view.episodes = 3
    view.job.wait()
    assert len(view.recorded) == 9 and len(view.recorded[0]) == 60

def test_chips_and_tasks_are_the_same(view):
    chips = {c.description: c for c in view.chips.children if hasattr(c, "value") and isinstance(c.value, bool)}
    assert {n for n, c in chips.items() if c.value} == set(view.tasks) and len(chips) == 14
    chips["walker-walk"].value = False
    view.job.wait()
    assert set(view.tasks) == {"cup-catch", "cartpole-swingup"} and set(view.points.tasks) == set(view.tasks)

def test_an_agent_of_ones_own(view, tmp_path):
    torch.manual_seed(0)
    m = WorldModel(SIZES["tiny"]).eval()
    file, alone = str(tmp_path/"mine.safetensors"), str(tmp_path/"alone.safetensors")
    save_world_model(m, file); save_world_model(policy_only(m), alone)
    ran = []
    view.job.observe(lambda c: ran.append(c.new), "running")
    for f in (file, alone): view.box.add(f)
    assert not ran and (view.map_a, view.map_b, view.probe_b) == ("student", "none", "student"), "adding changes no choice and computes nothing"
    assert sum(hasattr(c, "value") and isinstance(c.value, bool) for c in view.chips.children) == 30, "it knows all thirty"
    view.map_b = file
    view.job.wait()
    assert view.points.agents == ["student", file]
    view.map_b = alone
    view.job.wait()
    view.colour = "value"
    assert "policy alone" in view.message
    view.tab, view.error_b = 4, alone
    view.job.wait()
    assert f"agent: {alone} is a policy alone" in view.message and "choose the whole model" in view.message
    view.error_b = "teachers"

def test_agents_by_path_from_the_start():
    cup = str(data_dir()/"teachers"/"cup-catch.safetensors")
    v = LatentView("tiny", wait=True, actor=cup, map_b=cup, tasks=("cup-catch",), episodes=1)
    assert (v.actor, v.map_b) == (cup, cup) and v.points.agents == ["student", cup], v.message
    with pytest.raises(ConfigError, match="There is no agent 'studnet'"): LatentView("tiny", map_a="studnet")

def test_a_wrong_choice_ends_no_computation(view):
    begun, go_on, play = threading.Event(), threading.Event(), view._play
    def slow(tell, c):
        begun.set()
        while not go_on.wait(0.02): tell(0, 1)  # Raises where the job was stopped
        return play(tell, c)
    view._play = slow
    try:
        view.episodes = 3
        assert begun.wait(20)
        view.map_b = "teachers"
        view.together = True
        assert "one map for all" in view.message and view.job.running
    finally:
        go_on.set()
        del view._play
    view.job.wait()
    assert len(view.recorded) == 9 and view.points.agents == ["student", "teachers"], "what went on is there"
    assert "one map for all" in view.message, "and the complaint is still to be read"
    view.together = False
    view.job.wait()
    assert "9 episodes" in view.message and view.points.agents == ["student", "teachers"]

def test_points_and_their_episodes_come_together(view):
    seen, draw = [], view.draw_tab
    def look(tab):
        seen.append(all(view.recorded[e].task == t for e, t in zip(view.points.episode, view.points.task)))
        draw(tab)
    view.draw_tab = look
    try:
        view.tasks = ("pendulum-spin",)
        view.job.wait()
    finally: del view.draw_tab
    assert seen and all(seen) and view.points.tasks == ["pendulum-spin"]

def test_known_tasks_come_from_the_card(tmp_path):
    assert len(known_tasks("student")) == len(known_tasks("student int8")) == 14
    m = WorldModel(SIZES["tiny"])
    save_world_model(m, tmp_path/"a.safetensors", metrics=dict(trained_tasks=["cup-catch", "fish-swim"]))
    assert known_tasks(str(tmp_path/"a.safetensors")) == ("cup-catch", "fish-swim") == known_tasks(f"{tmp_path}/a.safetensors int4")
    assert known_tasks(str(data_dir()/"teachers"/"cup-spin.safetensors")) == ("cup-spin",)
    with pytest.raises(ConfigError, match="There is no agent"): known_tasks("nobody")

def test_looks_tell_all_tasks_apart():
    for dark in (False, True):
        look = looks("mt30", dark)
        of = lambda body: {look[t.name] for t in MT30 if t.domain == body}
        for body in {t.domain for t in MT30}: assert len({c for c, _ in of(body)}) == 1 and len(of(body)) == sum(t.domain == body for t in MT30)

def test_probe_figure_clips_and_tells():
    r = lambda v: dict(a=dict(r2=v, folds=[v - 0.1, v + 0.1]))
    f = probe_figure(dict(observation=r(0.5), x=r(-7.), y=r(0.25)))
    dots = {t.name: t for t in f.data if t.type == "scatter" and t.mode == "markers"}
    assert dots["x"].x[0] == -0.25 and dots["x"].customdata[0] == -7 and dots["x"].marker.symbol[0] == "triangle-left"
    bar, = [t for t in f.data if t.type == "bar"]
    assert bar.customdata[0] == pytest.approx(7.25) and bar.x[0] == 1

def test_error_figure_is_the_ratio():
    e = ModelError({"cup-catch": np.array([[1., 1], [4, 2]])}, {"cup-catch": np.array([[2., 2], [2, 2]])})
    f = error_figure(dict(student=e), 2)
    assert list(f.data[1].y) == [0.5, 1.5] and list(f.data[2].x) == [1.5] and f.data[2].customdata[0] == 50
    assert error_figure(dict(student=e), 9).layout.shapes[0].x0 == 2, "no further than there is"

def test_cka_figure_of_one_episode_has_no_interval():
    f = cka_figure({"cup-catch": dict(value=0.5, low=None, high=None, floor=None, observation=0.4)}, ("a", "b"))
    assert f.data[0].error_x.array is None and len(f.data) == 2

def test_no_hover_label_has_a_second_box():
    "Its ground is white on a clear page, whatever the theme."
    n, rng = 4, np.random.default_rng(0)
    p = Points(np.repeat(["cup-catch"], n), np.zeros(n, int), np.arange(n), np.zeros(n), dict(a=rng.random((n, 2)), b=rng.random((n, 2))), dict(a=np.zeros(n), b=None))
    e, r = ModelError({"cup-catch": np.ones((2, 2))}, {"cup-catch": np.ones((2, 2))}), dict(x=dict(r2=0.5, folds=[0.4, 0.6]))
    figures = [map_figure(p, dark=True), error_figure(dict(a=e, b=e), dark=True), probe_figure(dict(observation=r, a=r, b=r), dark=True), cka_figure({"cup-catch": dict(value=0.5, low=0.4, high=0.6, floor=0.1, observation=0.4)}, ("a", "b"), dark=True)]
    for f in figures:
        for t in f.data: assert t.hoverinfo == "skip" or t.hovertemplate.endswith("<extra></extra>"), t.name
        assert f.layout.hoverlabel.bgcolor == "#1f2937" and f.layout.hoverlabel.font.color == "#e5e7eb"
