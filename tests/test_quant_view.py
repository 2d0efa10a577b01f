"""The bench says what quantize_ says, planted faults are found, and every handler of the view answers with a picture or with one line."""
import copy
import json
import threading

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.checkpoint import load_world_model, save_world_model
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.data import Batch
from tdmpc_opt_kit.evaluate import data_dir
from tdmpc_opt_kit.quant_view import BUDGETS, ERRORS, GROUPS, PRESETS, Plot, QuantView, Workbench, agent_path, histogram_figure, in_words, layers_figure, own_states, plane_figure, preset_bits, ranking_figure, sizes_figure
from tdmpc_opt_kit.quantize import SCHEMES, MixedConfig, damage, output_errors, outputs, quantize_, sensitivity
from tdmpc_opt_kit.widgets import agent_models
from tdmpc_opt_kit.world_model import WorldModel, model_size, policy_only

SHORT = dict(slices=16, max_steps=12, num_workers=0)


def slices(B=24, H=3, seed=0, tasks=30):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(H + 1, B, 24, generator=g), torch.rand(H, B, 6, generator=g) * 2 - 1, torch.randn(H, B, 1, generator=g), torch.arange(B) % tasks, torch.zeros(B, dtype=torch.long))


def make(tasks="mt30", seed=0, size="tiny"):
    torch.manual_seed(seed)
    m = WorldModel(model_size(size), tasks).eval()
    with torch.no_grad():
        for n, p in m.named_parameters(): p.add_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.02))
        m.task_emb.weight.renorm_(2, 0, 1.)
    return m.requires_grad_(False)


@pytest.fixture(scope="module")
def bench(): return Workbench(make(), slices())


@pytest.mark.parametrize("seed", range(6))
def test_assess_equals_quantize(bench, seed):
    "In any order of assignments, so that nothing of the last one stays behind."
    rng = np.random.default_rng(seed)
    bits, group = dict(zip(bench.layers, rng.choice([4, 8, 16], len(bench.layers)).tolist())), int(rng.choice(GROUPS))
    m = copy.deepcopy(bench.model)
    c, a = quantize_(m, MixedConfig(bits, group)), bench.assess(bits, group)
    assert [tuple(r.values()) for r in a.coverage.rows] == [tuple(r.values()) for r in c.rows] and a.nbytes == c.nbytes
    said, mine, meant = outputs(m, bench.batch), outputs(bench.mixed, bench.batch), outputs(bench.model, bench.batch)
    assert all(torch.equal(said[k], mine[k]) for k in said)
    assert a.errors == output_errors(said, meant) and a.damage == damage(said, meant)
    acting = policy_only(m)
    assert a.policy_nbytes == sum(acting.quantized[n].nbytes if n in acting.quantized else 2 * p.numel() for n, p in acting.named_parameters())


def test_planted_faults_are_seen(bench):
    "One layer back to front, one forgotten: the comparison above would notice."
    bits, key = dict.fromkeys(bench.layers, 8), "dynamics.1"
    right = bench.assess(bits)
    broken = Workbench(bench.model, bench.batch)
    q = broken.at(8).tensors[f"{key}.weight"]
    broken.at(8).tensors[f"{key}.weight"] = type(q)(q.q.flip(-1), q.scale, q.bits, q.group)
    assert broken.assess(bits).errors["latent 1"] > 2 * right.errors["latent 1"]
    forgotten = Workbench(bench.model, bench.batch)
    forgotten.now[key] = (8, None)  # It believes that this layer has eight bits already
    assert forgotten.assess(bits).errors != right.errors


def test_ranking_finds_the_layer_with_an_outlier():
    m = make(seed=1)
    with torch.no_grad(): m.get_parameter("encoder.1.weight")[:, 0] += 30.  # One huge weight in each row leaves the others no levels
    bench = Workbench(m, slices())
    table = bench.rank(GROUPS[-1])
    worst = max((r for r in table if r["bits"] == 8), key=lambda r: r["damage"])
    assert worst["layer"] == "encoder.1"
    for mine, theirs in zip(table, sensitivity(m, bench.batch, group=GROUPS[-1])): assert mine["damage"] == pytest.approx(theirs["damage"], rel=1e-6) and mine["bytes"] == theirs["bytes"]
    assert ranking_figure(table).data[1].y[0] == max((r for r in table if r["bits"] == 4), key=lambda r: r["damage"])["layer"]


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_presets_are_the_schemes(bench, name):
    c = quantize_(copy.deepcopy(bench.model), SCHEMES[name])
    assert {r["tensor"]: r["bits"] for r in bench.assess(preset_bits(name, bench.layers)).coverage.rows} == {r["tensor"]: r["bits"] for r in c.rows}


def test_bad_assignments(bench):
    for bits, says in (({"dynamics.9": 4}, "no layer 'dynamics.9'"), ({"dynamics.1": 3}, "4, 8 or 16")):
        with pytest.raises(ConfigError, match=says): bench.assess(bits)
    with pytest.raises(ConfigError, match="preset"): preset_bits("int5", bench.layers)
    with pytest.raises(ConfigError, match="quantized already"):
        m = make()
        quantize_(m, SCHEMES["int8"])
        Workbench(m)
    with pytest.raises(ConfigError, match="no states"): Workbench(make()).rank()


def test_a_policy_alone():
    bench = Workbench(policy_only(make()), slices())
    a = bench.assess(preset_bits("int4", bench.layers))
    assert a.nbytes == a.policy_nbytes and set(a.errors) == {"action", "latent 0"} and a.damage > 0
    named, curve = bench.compare(budgets=3)
    assert len(plane_figure(a, named, curve, "value").data) == 3  # Nothing to draw there, and no error


def test_states_are_the_models_own():
    "A specialist's own numbers, slices that fit together, other seeds other states."
    m = make("walker-walk,cup-catch")
    b = own_states(m, "cup-catch,walker-walk", 9, 3, 12, num_workers=0)
    assert set(b.task.tolist()) == {0, 1} and b.obs.shape == (4, 9, 24) and b.action.shape == (3, 9, 6)
    cup = b.task == list(m.tasks).index("cup-catch")
    assert not b.obs[:, cup, 8:].any() and not b.action[:, cup, 2:].any() and b.obs[:, ~cup, 8:].any()
    again, other = own_states(m, "cup-catch,walker-walk", 9, 3, 12, num_workers=0), own_states(m, "cup-catch,walker-walk", 9, 3, 12, seed=1, num_workers=0)
    assert torch.equal(b.obs, again.obs) and not torch.equal(b.obs, other.obs)


def test_figures_say_what_the_numbers_say(bench):
    a = bench.assess(preset_bits("int4", bench.layers))
    for dark in (False, True):
        kb, db = layers_figure(a, "dynamics.1", dark).data
        assert sum(kb.x) == pytest.approx(sum(r["bytes"] for r in a.layers) / 1e3) and list(db.x) == [min(r["SQNR"], 80.) for r in a.layers]
        assert len(set(kb.marker.color)) == 2  # Four bits and eight
    assert list(sizes_figure(a).data[0].customdata) == [4 * a.numbers, 2 * a.numbers, a.nbytes, a.policy_nbytes]
    assert not sizes_figure(a).layout.shapes and len(BUDGETS) == 3  # Budgets of a million parameters say nothing about a tiny model
    w = bench.model.get_parameter("dynamics.1.weight")
    fig = histogram_figure(w, bench.weight("dynamics.1", 4), "dynamics.1", "own steps")
    levels = [x for x, n in zip(fig.data[1].x, fig.data[1].y) if n >= 1]
    assert levels and all(abs(x - round(x)) < 1e-6 and abs(x) <= 7 for x in levels)
    assert sum(n for n in histogram_figure(w, bench.weight("dynamics.1", 8), log=False).data[1].y) == w.numel()


def test_a_plot_sends_only_what_differs(bench, monkeypatch):
    one, two = (sizes_figure.parts(bench.assess(preset_bits(n, bench.layers))) for n in ("int8", "int4"))
    plot, sent = Plot(one), []
    monkeypatch.setattr(plot.widget, "_send_update_msg", lambda restyle_data=None, relayout_data=None, *a, **k: sent.append((restyle_data, relayout_data)))
    plot.show(one)
    assert not any(restyle or relayout for restyle, relayout in sent)
    plot.show(two)
    assert list(plot.widget.data[0].x) == two.traces[0]["x"] and set(sent[-1][0]) == {"x", "customdata"} and set(sent[-1][1]) == {"yaxis.ticktext"}


@pytest.fixture(scope="module")
def view():
    v = QuantView(wait=True, tasks="cup-catch,pendulum-spin", **SHORT)
    assert "Measured on 16 slices" in v.message
    s = v.budget_slider
    assert s.value == 1000 and s.min % s.step == s.value % s.step == s.max % s.step == 0
    return v


def test_sliders_presets_and_budget(view):
    view.presets.value = "all 8"
    before, drawn = view.now, {n: p.shown for n, p in view.plots.items() if n != "returns"}
    view.sliders["dynamics.1"].value = 4
    assert view.bits["dynamics.1"] == 4 and view.preset == "" and view.presets.value is None
    assert view.now.nbytes < before.nbytes and view.now.errors["latent 1"] > before.errors["latent 1"]
    assert all(view.plots[n].shown is not drawn[n] for n in drawn) and f"{view.now.nbytes:,}" in view.head.value
    assert list(view.plots["plane"].widget.data[2].x) == [view.now.nbytes / 1e6]
    view.sliders["dynamics.1"].value = 8
    assert view.preset == "all 8" == view.presets.value and view.now.errors == before.errors  # By hand to the same bits is that preset
    view.presets.value = "int4"
    assert {l: s.value for l, s in view.sliders.items()} == preset_bits("int4", view.bench.layers)
    view.budget_slider.value = 1_300
    assert view.preset == "mixed" and view.now.nbytes <= 1_300_000 and {l: s.value for l, s in view.sliders.items()} == view.bits
    smaller = view.now.nbytes
    view.budget = 900
    assert view.now.nbytes < smaller
    view.budget = 10
    assert view.message.startswith("budget:") and "too few" in view.message


def test_looks(view):
    view.presets.value = "int8"
    view.layer_menu.value = "pi_head.0"
    assert view.plots["histogram"].widget.layout.title.text.startswith("pi_head.0: 8 bits")
    view.units_menu.value = "scale 1.0"
    assert "every scale 1.0" in view.plots["histogram"].widget.layout.title.text
    view.log_box.value = False
    assert view.plots["histogram"].widget.layout.yaxis.type in (None, "linear", "-")
    view.log_box.value, view.units_menu.value = True, "weights"
    view.say()
    for e in view.error_menu.options:
        view.error_menu.value = e
        assert view.message == "" and view.plots["plane"].widget.layout.yaxis.title.text == ERRORS[e][1]
        assert all(y is not None for y in view.plots["plane"].widget.data[0].y)
    was = view.plots["layers"].widget.data[0].marker.color
    view.theme.dark = True
    assert view.plots["layers"].widget.data[0].marker.color != was and view.plots["plane"].widget.layout.font.color == "#e5e7eb"
    view.theme.dark = False


def test_a_click_chooses_the_layer(view):
    view._clicked(dict(new=dict(event_type="plotly_click", points=dict(ys=["encoder.1"]))))
    assert view.layer == view.layer_menu.value == "encoder.1" and any("<b>encoder.1</b>" == t for t in view.plots["ranking"].widget.layout.yaxis.ticktext)
    view._clicked(dict(new=dict(event_type="plotly_hover", points=dict(ys=["encoder.0"]))))
    view._clicked(dict(new=dict(event_type="plotly_click", points=dict(ys=["no layer"]))))
    view._clicked(dict(new=None))
    assert view.layer == "encoder.1"


def test_group_of_four_bits(view):
    view.presets.value = "all 4"
    before = view.now
    view.group_slider.value = 16
    view.job.wait()
    assert view.now.group == 16 and view.now.nbytes > before.nbytes and view.now.damage < before.damage
    assert view.compared[0]["all 4"].nbytes == view.now.nbytes
    view.group = 17
    assert view.message.startswith("group: 17") and view.group == 16 == view.group_slider.value
    view.group = 96
    view.job.wait()
    assert view.now.nbytes == before.nbytes


@pytest.mark.parametrize("trait, value, says", [("agent", "student int8", "quantized already"), ("agent", "studnet", "There is no agent"), ("layer", "dynamics.7", "layer: there is no"), ("units", "miles", "units: there is no"),
    ("error", "pain", "error: there is no"), ("preset", "int5", "preset: there is no"), ("bits", {"dynamics.7": 4}, "bits: 'dynamics.7'"), ("bits", {"dynamics.1": 5}, "bits: 'dynamics.1'")])
def test_wrong_choices_are_one_line(view, trait, value, says):
    before = getattr(view, trait)
    view.say()
    setattr(view, trait, value)
    assert says in view.message and "Traceback" not in view.message and "\n" not in view.message
    assert getattr(view, trait) == before  # And nothing is left of them


def test_returns_are_paired_and_kept(view):
    view.presets.value = "fp16"
    view.tasks_menu.value, view.episodes_slider.value = ("cup-catch",), 2
    n = len(view.played)
    view.play(wait=True)
    view.presets.value = "all 4"
    view.play(wait=True)
    assert len(view.played) == n + 2 and view.played[-1].a.bits == view.bits and view.recall.layout.display == ""
    assert view.played[-1].equality.returns[1] == view.played[-2].equality.returns[1]  # float32 was played once, from the same starts
    assert "all 4" in view.table.value and "1 task x 2, 12 decisions" in view.table.value and in_words(view.bits) in view.table.value and len(view.plots["returns"].widget.data[0].x) == len(view.played)
    view.recall.value = n + 1
    assert view.preset == "fp16" == view.presets.value
    view.mode_menu.value = "planner"
    view.play(wait=True)
    assert view.played[-1].mode == "planner" and view.played[-1].equality.difference.low is not None, view.message
    view.mode_menu.value, view.tasks_menu.value = "policy", ()
    view.play()
    assert view.message.startswith("tasks: choose at least one")


def test_stop(view):
    view.tasks_menu.value, view.episodes, n, was = ("cup-catch",), 20, len(view.played), view.max_steps
    view.max_steps = 400
    view.play()
    view.save_button  # The page stays alive
    view.job.stop()
    view.job.wait()
    view.max_steps, view.episodes = was, 2
    assert view.message == "Stopped." and len(view.played) == n


def test_planned_action_on_demand(view, monkeypatch):
    monkeypatch.setenv("TDMPC_PRESET", "tiny")  # Its planner
    view.presets.value = "all 4"
    assert "planned action" not in view.head.value
    view.plan_action(wait=True)
    assert "planned action" in view.head.value, view.message
    rough = view.planned[view._key()]
    view.presets.value = "fp16"
    assert "planned action" not in view.head.value
    view.plan_action(wait=True)
    assert view.planned[view._key()] < rough / 5


def test_saved_file_is_the_model(view, tmp_path, monkeypatch):
    monkeypatch.setattr("tdmpc_opt_kit.quant_view.repo_root", lambda: tmp_path)
    view.presets.value = "int4"
    view.save()
    assert str(view.saved) in view.message and view.saved.parent.parent == tmp_path/"runs"
    m, small = load_world_model(view.saved), load_world_model(view.saved.with_name(f"{view.saved.stem}_policy.safetensors"))
    said = outputs(m, view.bench.batch)
    assert output_errors(said, view.bench.meant) == view.now.errors and torch.equal(outputs(small, view.bench.batch)["action"], said["action"])
    assert view.now.nbytes < view.saved.stat().st_size < view.now.nbytes + 20_000


def test_specialists_and_files(tmp_path):
    view = QuantView("teachers", wait=True, **SHORT)
    assert view.which in view.which_menu.options and len(view.which_menu.options) == 14 and view.which_menu.layout.display == "", view.message
    s = view.budget_slider
    assert s.min % s.step == s.value % s.step == s.max % s.step == 0 and view.preset == "int8"  # Or the page would move the slider
    nbytes, was = view.now.numbers, view.which
    view.which = "walker-walk"
    view.job.wait()
    assert view.now.numbers != nbytes and view.tasks_menu.options == ("walker-walk",), view.message
    file = save_world_model(policy_only(make("cup-catch,walker-walk")), tmp_path/"p.safetensors", origin="a test")
    view.box.add(str(file))
    view.agent_menu.value = str(file)
    view.job.wait()
    assert set(view.sliders) == {"task_emb", "encoder.0", "encoder.1", "pi_head.0", "pi_head.1", "pi_head.2"} and "Measured" in view.message, view.message
    view.plan_action()
    assert "policy alone" in view.message
    view.mode = "planner"
    view.play()
    assert view.message.startswith("acts by:")
    assert agent_path("teachers") is None and agent_path("student") == data_dir()/"students"/"student.safetensors" and agent_path(str(file)) == file


def test_a_choice_that_is_refused_changes_no_name(tmp_path, monkeypatch):
    "While the worker rounds a model, another choice and a wish to save come: the view's name, file names and model stay of one agent."
    files = [str(save_world_model(make("cup-catch,walker-walk", seed=i), tmp_path/f"{n}.safetensors", origin="a test", metrics=dict(trained_tasks=["walker-walk"]))) for i, n in enumerate(("one", "two", "three"))]
    monkeypatch.setattr("tdmpc_opt_kit.quant_view.repo_root", lambda: tmp_path)
    inside, go, at = threading.Event(), threading.Event(), Workbench.at
    def slow(self, *args):
        if threading.current_thread().name.startswith("tdmpc-view"):
            inside.set()
            go.wait(30)
        return at(self, *args)
    monkeypatch.setattr(Workbench, "at", slow)
    def check(view, name):
        go.set()
        view.job.wait()
        model = agent_models(name).models[0]
        assert view.agent == view.agent_menu.value == name and view.loaded == (name, "") and view.bench.model is model and view.benches[id(model), name] is view.bench
        assert set(view.tasks_menu.options) == {"cup-catch", "walker-walk"} and view.tasks_menu.value == ("walker-walk",)  # Of all the ones that it was trained on
        inside.clear(), go.clear()
    view = QuantView(files[0], **SHORT)
    try:
        for f in files[1:]: view.box.add(f)
        assert inside.wait(30)
        view.agent_menu.value = files[1]  # Before anything is there
        assert "something is being computed" in view.message
        check(view, files[0])
        view.agent_menu.value = files[1]
        assert inside.wait(30)
        view.save()
        assert view.saved.name.startswith("one"), view.message
        view.agent = files[2]
        assert "something is being computed" in view.message and view.agent == files[0]
        check(view, files[1])
    finally:
        go.set()
        view.job.wait()
    view.save()
    assert view.saved.name.startswith("two")


def test_a_file_comes_into_the_menu_and_is_not_chosen(view, tmp_path):
    file, heard = str(save_world_model(make("cup-catch"), tmp_path/"quiet.safetensors", origin="a test")), []
    view.observe(heard.append, "agent")
    view.box.add(file)
    view.unobserve(heard.append, "agent")
    assert file in view.agent_menu.options and view.agent_menu.value == view.agent == "student" and not heard and not view.job.running


def test_a_slider_moved_while_the_worker_holds_is_not_lost(view):
    view.presets.value = "all 8"
    inside = threading.Event()
    def worker():
        with view.held():
            inside.set()
            threading.Event().wait(0.3)
    t = threading.Thread(target=worker)
    t.start()
    inside.wait()
    view.sliders["dynamics.1"].value = 4
    t.join()
    assert view.bits["dynamics.1"] == 4 == view.now.bits["dynamics.1"]
    with view.held(): view.sliders["dynamics.1"].value = 16
    assert view.bits["dynamics.1"] == 4  # One's own changes are not answered
    view._sync()


def test_drawing_while_layers_are_measured(view, monkeypatch):
    class Measured(tuple):
        "A key whose look finds another layer measured meanwhile."
        def __getitem__(self, i):
            view.bench.table["more", len(view.bench.table), 0] = 0.
            return super().__getitem__(i)
    monkeypatch.setattr(view.bench, "table", {Measured(k): v for k, v in view.bench.table.items()})
    view.draw("ranking")
    assert any(k[0] == "more" for k in list(view.bench.table))


def test_group_stays_while_something_is_computed(view, monkeypatch):
    view.presets.value, view.tasks_menu.value, view.episodes, view.mode = "all 4", ("cup-catch",), 2, "policy"
    view.play(wait=True)
    row = len(view.played)
    view.group = 16
    view.job.wait()
    with monkeypatch.context() as m:
        m.setattr(view.job, "running", True)
        view.recall.value = row
        assert view.group == 16 == view.group_slider.value and view.recall.value == 0 and view.message.startswith("bits of row:")
    view.recall.value = row  # And again, when it is done
    view.job.wait()
    assert view.group == 96 == view.now.group
    seen = []
    def rank(group, tell):
        seen.append(group)
        with view.held(): view.group = 16
    with monkeypatch.context() as m:
        m.setattr(view.bench, "rank", rank)
        m.setattr(view.bench, "compare", lambda group, tell: seen.append(group), raising=False)
        view._points(None)
    with view.held(): view.group = 96
    assert seen == [96, 96]


def test_a_file_chosen_from_code_comes_into_the_menu(view, tmp_path):
    file = str(save_world_model(make("cup-catch"), tmp_path/"code.safetensors", origin="a test"))
    view.agent = file
    view.job.wait()
    assert view.agent == view.agent_menu.value == file and file in view.agent_menu.options and "Error" not in view.message, view.message
    view.agent = "nothing.pt"
    assert view.agent == view.agent_menu.value == file and "There is no agent 'nothing.pt'" in view.message
    view.agent = "student"
    view.job.wait()
    assert view.loaded[0] == view.agent_menu.value == "student"
