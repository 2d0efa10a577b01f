"""Rollouts in a real JupyterLab: every control is moved, and the page is seen to change."""
import re, time

import pytest
from lab import lab
from tdmpc_opt_kit.envs import render_backend
from tdmpc_opt_kit.evaluate import data_dir

WATCH = """(root) => {
    const said = window.__said = {};
    document.addEventListener('keydown', () => { said.begin = performance.now(); said.image = said.cursor = null; }, true);
    const img = root.querySelector('img.widget-image, .widget-image'), shapes = root.querySelector('.js-plotly-plot');
    new MutationObserver(() => { if (said.begin && said.image === null) said.image = performance.now() - said.begin; }).observe(img, { attributes: true, attributeFilter: ['src'] });
    new MutationObserver(ms => { if (said.begin && said.cursor === null && ms.some(m => m.target.closest && m.target.closest('.shapelayer'))) said.cursor = performance.now() - said.begin; })
        .observe(root, { subtree: true, childList: true, attributes: true, attributeFilter: ['d'] });
}"""

def clock(view): return int(re.search(r"decision (\d+) of", view.inner_text())[1])

def until(what, seconds=30.):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)

def fitting(view):
    "No figure is wider than what holds it."
    return view.evaluate("v => [...v.querySelectorAll('.js-plotly-plot')].every(p => p.querySelector('.main-svg').getBoundingClientRect().width <= p.parentElement.clientWidth + 2)")

def drawn(view):
    "Every figure has curves; one that has none was lost on the way to the page."
    return view.evaluate("v => [...v.querySelectorAll('.js-plotly-plot')].every(p => p.data && p.data.length)")

def idle(view): until(lambda: view.locator("button:has-text('Run'):not([disabled])").count() == 1)

@pytest.mark.parametrize("width, dark", [(1000, False), (1900, True)])
def test_every_control(lab, width, dark):
    with lab.open("explore_rollouts", width, dark=dark) as page:
        view = page.show()
        films, draws = view.locator(".widget-image"), render_backend() is not None
        look = lambda: films.first if draws else view.locator(".js-plotly-plot").first
        time.sleep(1)
        page.shot("first"); page.fits()
        assert drawn(view), (page.errors, view.evaluate("v => [...v.querySelectorAll('.js-plotly-plot')].map(p => [p.data && p.data.length, p.layout && Object.keys(p.layout)])"))
        until(lambda: fitting(view))

        # Time: by key, by Play, by a click into a curve and into the path
        page.changes(look(), lambda: page.nudge(view, "time"))
        view.evaluate(WATCH)
        waits = []
        for _ in range(6):
            page.nudge(view, "time"); until(lambda: page.page.evaluate("window.__said.cursor") is not None); time.sleep(0.3)
            said = page.page.evaluate("window.__said")
            waits.append((said.get("image"), said["cursor"]))
        for what, took in zip(("frame", "cursor"), zip(*waits)):
            if None not in took: print(f"{width} {what}: {sorted(took)[len(took) // 2]:.0f} ms from the key to the page, at most {max(took):.0f}")
        assert sorted(w[1] for w in waits)[3] < 400, waits
        was = clock(view)
        view.locator(".jupyter-widget-play button, .widget-play button").first.click(); until(lambda: clock(view) != was)
        view.locator(".jupyter-widget-play button, .widget-play button").first.click()
        plots = view.locator(".js-plotly-plot")
        for plot, where in ((plots.nth(1), 0.2), (plots.nth(1), 0.7)):
            box, was = plot.locator(".nsewdrag").first.bounding_box(), clock(view)
            page.page.mouse.move(box["x"] + where * box["width"], box["y"] + 0.4 * box["height"]); time.sleep(0.4)
            page.page.mouse.click(box["x"] + where * box["width"], box["y"] + 0.4 * box["height"])
            until(lambda: clock(view) != was)

        # Imagination and its ghost
        page.nudge(view, "steps ahead", times=3)
        page.changes(view.locator(".js-plotly-plot").last, lambda: page.press(view, "Imagine")); idle(view)
        page.changes(look(), lambda: page.nudge(view, "ghost", "ArrowLeft", 3))
        page.shot("imagined")

        # Who plays what, and how
        for label, value in (("agent 3", "student int4"), ("task", "cartpole-swingup"), ("acts by", "policy"), ("acts by", "planning"), ("planner", "reduced")):
            page.choose(view, label, value); time.sleep(0.3)
        page.nudge(view, "decisions", "ArrowLeft", 2); time.sleep(0.5)
        seed = view.locator(".widget-text:has(.widget-label:text-is('seed')) input").first
        seed.fill("7"); seed.press("Enter")
        page.changes(look(), lambda: page.press(view, "Run"))
        idle(view)
        view.locator("text=of cartpole-swingup, seed 7").wait_for(timeout=10_000)
        assert view.locator("text=student int4").count() >= 1
        until(lambda: fitting(view)); page.fits(); page.shot("three")

        # Stop
        page.nudge(view, "decisions", "PageUp", 5); page.press(view, "Run")
        view.locator("text=/decision \\d+ of .* left/").first.wait_for(timeout=20_000)
        page.press(view, "Stop")
        view.locator("text=/Stopped after \\d+ decisions/").wait_for(timeout=20_000)

        # Wrong choices are one line
        page.choose(view, "agent 2", "none"); page.choose(view, "agent 3", "none"); page.choose(view, "agent 1", "none"); page.press(view, "Run")
        view.locator("text=choose at least one").wait_for(timeout=10_000)
        path = view.locator("input[placeholder*=checkpoint]").first
        path.fill("nothing.pt"); page.press(view, "Add")
        view.locator("text=There is no agent 'nothing.pt'").wait_for(timeout=10_000)
        path.fill(str(data_dir()/"teachers"/"walker-walk.safetensors")); page.press(view, "Add")
        view.locator("text=it knows 1 task").wait_for(timeout=10_000)
        page.fits(); page.other_width()
        page.no_errors()
