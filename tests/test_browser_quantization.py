"""explore_quantization in a real JupyterLab: every control moves something, quickly, in both themes and widths."""
import re
import shutil
from pathlib import Path

import pytest
from lab import lab
from processes import ROOT

QUICK = """async ([figure, key]) => {
  // From a key on the focused slider to the last change of a figure, in milliseconds; the first painted frame after it counts
  const el = document.querySelectorAll('.tdmpc-view .js-plotly-plot')[figure], times = [];
  const watch = new MutationObserver(() => times.push(performance.now()));
  watch.observe(el, { subtree: true, childList: true, attributes: true, characterData: true });
  window.__watch = { times, watch };
}"""


def latency(page, view, figure, handle, key, settle=1.5):
    "Milliseconds from a key to the first and the last change of a figure."
    handle.focus()
    page.page.wait_for_timeout(200)
    page.page.evaluate(QUICK, [figure, key])
    page.page.evaluate("() => document.addEventListener('keydown', () => { window.__key = performance.now(); }, { capture: true, once: true })")
    handle.press(key)
    page.page.wait_for_timeout(settle * 1000)
    return page.page.evaluate("() => { window.__watch.watch.disconnect(); const t = window.__watch.times.filter(x => x > window.__key).map(x => x - window.__key); return [Math.min(...t), Math.max(...t)]; }")


@pytest.mark.parametrize("width, dark", [(1000, False), (1900, True)])
def test_quantization(lab, width, dark):
    with lab.open("explore_quantization", width, dark=dark) as page:
        view = page.show()
        plots = view.locator(".js-plotly-plot")
        layers, errors, ranking, histogram, plane, sizes, returns = (plots.nth(i) for i in range(7))
        page.shot("first")
        view.locator("button:text-is('int8')").click()
        # Sliders: one for each layer
        page.changes(layers, lambda: page.nudge(view, "dynamics.1", "ArrowLeft"))
        for figure, label in ((errors, "pi_head.0"), (plane, "encoder.1"), (sizes, "q_heads.1")): page.changes(figure, lambda: page.nudge(view, label, "ArrowLeft"))
        if not dark:
            handle = page.slider(view, "reward_head.1")
            waited = []
            for i in range(3):
                first, last = latency(page, view, 0, handle, "ArrowLeft" if i % 2 == 0 else "ArrowRight")
                print(f"slider to picture: first change {first:.0f} ms, last {last:.0f} ms")
                waited.append(first)
            assert sorted(waited)[1] < 900  # The median; 200 on a machine that does nothing else; a figure made anew for each move takes a second
        # Presets, budget, group
        for name in ("all 4", "fp16", "mixed"): page.changes(sizes, lambda: view.locator(f"button:text-is('{name}')").click())
        page.changes(layers, lambda: page.nudge(view, "budget, kB", "PageUp", 2))
        view.locator("button:text-is('all 4')").click()
        page.changes(sizes, lambda: page.nudge(view, "group, 4 bits", "ArrowLeft", 2))
        view.locator("text=Measured on").first.wait_for(timeout=30_000)
        # Figures' own controls, and a click on the ranking
        view.locator("button:text-is('int4')").click()
        page.changes(histogram, lambda: page.choose(view, "layer", "dynamics.0"))
        for units in ("own steps", "weights"): page.changes(histogram, lambda: view.locator(f"button:text-is('{units}')").click())
        page.shot("figures")
        page.changes(histogram, lambda: view.locator("button:text-is('scale 1.0')").click())
        page.changes(histogram, lambda: view.locator("label:has-text('log counts') input, .widget-checkbox input").first.click())
        page.changes(plane, lambda: page.choose(view, "error", "damage"))
        page.changes(histogram, lambda: ranking.locator(".scatterlayer .trace .points path").first.click(force=True))
        assert view.locator(".widget-dropdown:has(.widget-label:text-is('layer')) select").input_value() == "encoder.0"  # The worst one is on top
        # Planned action, return, save
        if not dark:
            page.press(view, "Planned action")
            view.locator("text=Planned action: RMS error").first.wait_for(timeout=60_000)
            page.choose(view, "acts by", "planner")
            page.choose(view, "acts by", "policy")
        page.nudge(view, "episodes", "ArrowRight")
        page.changes(returns, lambda: page.press(view, "Return"), timeout=90)
        view.locator("td:has-text('student int4')").first.wait_for(timeout=90_000)  # The figure may move before: while something is played, no row of another group is taken
        page.show(".tdmpc-view .js-plotly-plot", 6)
        page.shot("returns")
        if dark:
            page.fits()
            page.other_width()
            page.no_errors()
            return
        page.choose(view, "bits of row", "1 student mixed")
        page.press(view, "Save")
        view.locator("text=Saved").first.wait_for(timeout=20_000)
        folder = Path(re.search(r"Saved (\S+) ", view.locator("text=Saved").first.text_content())[1]).parent
        assert folder.parent == ROOT/"runs" and {p.name for p in folder.iterdir()} == {"student-by-hand.safetensors", "student-by-hand_policy.safetensors"}
        shutil.rmtree(folder)
        # Agents: another one, a quantized one, one that is not there
        page.choose(view, "agent", "student int4")
        view.locator("text=quantized already").first.wait_for(timeout=20_000)
        view.locator("input[placeholder*='checkpoint']").fill("nothing.pt")
        page.press(view, "Add")
        view.locator("text=There is no agent 'nothing.pt'").first.wait_for(timeout=10_000)
        page.choose(view, "agent", "teachers")
        view.locator("text=Measured on").first.wait_for(timeout=60_000)
        page.changes(layers, lambda: page.choose(view, "model of", "walker-walk"))
        view.locator("text=Measured on").first.wait_for(timeout=60_000)
        page.press(view, "Measure anew")
        view.locator("text=Measured on").first.wait_for(timeout=60_000)
        page.shot(); page.fits()
        page.other_width()
        page.no_errors()
