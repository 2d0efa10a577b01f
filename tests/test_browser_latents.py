"""explore_latents in a real browser: points show their frames, every control changes the picture, in both themes and widths."""
import time

import pytest
from lab import lab
from processes import ROOT

SIZES = "g => [g._fullLayout.width, g.clientWidth, g.parentElement.clientWidth, g.layout.width, g.layout.autosize]"

def idle(page, view, timeout=60):
    "Until nothing is computed; the Stop button hides then."
    end = time.monotonic() + timeout
    quiet = 0
    while quiet < 5:
        time.sleep(0.1)
        busy = view.locator("button:has-text('Stop'):visible").count() or page.page.locator(".jp-Notebook-ExecutionIndicator[data-status=busy]").count()
        quiet = 0 if busy else quiet + 1
        if time.monotonic() > end: pytest.fail(f"{page.name}: still computing after {timeout} s; see {page.shot('busy')}")

def tab(page, view, name):
    "Open a tab, and wait for its figure; it fills its box."
    view.locator(f".lm-TabBar-tab:has-text('{name}')").first.click()
    idle(page, view)
    figure(view).wait_for(timeout=20_000)
    end = time.monotonic() + 15
    while abs(figure(view).evaluate("g => g._fullLayout.width - g.clientWidth")) > 1 or figure(view).evaluate("g => g.clientWidth") < 0.5 * min(1250, view.evaluate("v => v.clientWidth")):
        assert time.monotonic() < end, f"{page.name}: the figure of {name} does not fill its box, {figure(view).evaluate(SIZES)}; see {page.shot('narrow')}"
        time.sleep(0.2)

def figure(view): return view.locator(".js-plotly-plot:visible").first
def choose(view, label, value): view.locator(f".widget-dropdown:visible:has(.widget-label:text-is('{label}')) select").first.select_option(value)

def hover(page, view):
    "Point at a state, found by plotly's own axes."
    at = figure(view).evaluate("""g => { const t = g._fullData[0], x = t.x, y = t.y, xa = g._fullLayout.xaxis, ya = g._fullLayout.yaxis, r = g.getBoundingClientRect();
        const i = Math.floor(x.length / 2); return [r.left + xa._offset + xa.l2p(x[i]), r.top + ya._offset + ya.l2p(y[i])]; }""")
    page.page.mouse.move(at[0] - 40, at[1] - 40)
    page.page.mouse.move(*at, steps=4)
    return at

@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1900, True)])
def test_explore_latents(lab, width, dark):
    with lab.open("explore_latents", width, dark=dark) as page:
        view = page.show()
        idle(page, view)
        figure(view).wait_for(timeout=20_000)
        page.shot("map")
        page.fits()
        at = hover(page, view)
        view.locator("img:visible").first.wait_for(timeout=20_000)
        assert view.locator("td:has-text('decision')").count()
        frame = view.locator("img").first
        before = frame.get_attribute("src")
        choose(view, "picture on", "click")
        page.page.mouse.move(at[0] + 60, at[1])
        other = figure(view).evaluate("""g => { const k = 1, t = g._fullData[k], xa = g._fullLayout.xaxis, ya = g._fullLayout.yaxis, r = g.getBoundingClientRect(), i = 3;
            return [r.left + xa._offset + xa.l2p(t.x[i]), r.top + ya._offset + ya.l2p(t.y[i])]; }""")
        end = time.monotonic() + 20
        while frame.get_attribute("src") == before:  # Plotly takes a click for the point that it has noticed the mouse on, which a busy machine does late
            assert time.monotonic() < end, f"no other frame; see {page.shot('no-frame')}"
            page.page.mouse.move(other[0] - 6, other[1] - 6)
            page.page.mouse.move(*other, steps=3)
            time.sleep(0.5)
            page.page.mouse.click(*other)
            time.sleep(0.5)
        page.shot("frame")
        page.page.mouse.move(20, 20)  # What the mouse shows is no change
        time.sleep(0.5)
        for c in ("reward", "value", "time", "agent"): page.changes(figure(view), lambda: choose(view, "colour", c))
        page.shot("coloured")
        page.changes(figure(view), lambda: choose(view, "agent 2", "student int4"))
        idle(page, view)
        page.changes(figure(view), lambda: view.locator("label:has-text('one map for all') input, .widget-checkbox input").first.click())
        idle(page, view)
        page.shot("together")
        page.changes(figure(view), lambda: choose(view, "method", "t-SNE"), timeout=60)
        idle(page, view)
        page.changes(figure(view), lambda: page.nudge(view, "neighbours"), timeout=60)
        idle(page, view)
        choose(view, "method", "PCA")
        idle(page, view)
        page.changes(figure(view), lambda: choose(view, "agent 3", "student fp16"), timeout=60)
        idle(page, view)
        view.locator("button:text-is('cup-catch')").first.click()  # a task less
        idle(page, view)
        assert not figure(view).locator("text=cup-catch").count()
        view.locator("button:text-is('none')").first.click()
        view.locator("text=tasks: none is chosen").wait_for(timeout=40_000)
        view.locator("button:text-is('cup-catch')").first.click()
        view.locator("button:text-is('pendulum-spin')").first.click()
        idle(page, view)
        choose(view, "agent 1", "teachers")
        view.locator("text=latents are of different widths").wait_for(timeout=40_000)
        choose(view, "agent 1", "student")
        idle(page, view)
        page.changes(figure(view), lambda: choose(view, "played by", "teachers"))
        idle(page, view)
        page.changes(figure(view), lambda: page.nudge(view, "episodes a task"))
        idle(page, view)
        choose(view, "method", "UMAP")  # Long enough to be ended
        stop, end = view.locator("button:has-text('Stop')"), time.monotonic() + 60
        stop.wait_for(state="visible", timeout=20_000)
        while not view.locator("text=Stopped.").count():
            assert time.monotonic() < end, f"nothing was stopped; see {page.shot('not-stopped')}"
            if stop.is_visible(): stop.evaluate("b => b.click()")  # The row moves while it comes in, and a mouse waits for it to rest
            time.sleep(0.2)
        page.changes(figure(view), lambda: page.press(view, "Compute"), timeout=90)  # What was stopped, to its end
        idle(page, view)
        view.locator("text=UMAP of").first.wait_for(timeout=20_000)
        choose(view, "method", "PCA")
        idle(page, view)
        view.locator("input[placeholder*='path']").fill("nobody.safetensors")
        page.press(view, "Add")
        view.locator("text=There is no agent").wait_for(timeout=40_000)
        view.locator("input[placeholder*='path']").fill(str(ROOT/"data"/"teachers"/"cup-catch.safetensors"))
        page.press(view, "Add")
        view.locator("text=is in the menus now").wait_for(timeout=40_000)
        choose(view, "agent 3", str(ROOT/"data"/"teachers"/"cup-catch.safetensors"))
        view.locator("text=does not know pendulum-spin").wait_for(timeout=40_000)
        choose(view, "agent 3", "none")

        tab(page, view, "Tasks")
        page.changes(figure(view), lambda: choose(view, "linkage", "single"))
        page.shot("tasks"); page.fits()
        page.changes(figure(view), lambda: choose(view, "agent", "student int4"))
        choose(view, "agent", "teachers")
        view.locator("text=without task embeddings").wait_for(timeout=40_000)

        tab(page, view, "CKA")
        page.shot("cka"); page.fits()
        page.changes(figure(view), lambda: choose(view, "agent 1", "student int4"))
        idle(page, view)
        page.changes(figure(view), lambda: choose(view, "agent 2", "student fp16"))
        idle(page, view)
        choose(view, "order by", "task")

        tab(page, view, "Probes")
        figure(view).wait_for(timeout=20_000)
        page.shot("probes"); page.fits()
        page.changes(figure(view), lambda: choose(view, "task", "cup-catch"))
        idle(page, view)
        page.changes(figure(view), lambda: choose(view, "agent 3", "none"))
        idle(page, view)

        tab(page, view, "Model error")
        page.shot("error"); page.fits()
        page.changes(figure(view), lambda: page.nudge(view, "step"))
        page.changes(figure(view), lambda: choose(view, "agent 2", "student int4"))
        idle(page, view)
        page.fits()
        page.other_width()
        for name in ("Map", "Tasks", "CKA", "Probes"):
            tab(page, view, name)
            page.fits(); page.shot(f"other-width-{name.lower()}")
        page.no_errors()

def test_redraws_are_quick(lab):
    "From the choice to the changed picture."
    with lab.open("explore_latents", 1900) as page:
        view = page.show()
        idle(page, view)
        page.page.evaluate("""() => { window.redrawn = []; const g = [...document.querySelectorAll('.tdmpc-view .js-plotly-plot')].find(e => e.offsetParent); g.on('plotly_afterplot', () => window.redrawn.push(performance.now())); window.fig = g; }""")
        took = []
        for c in ("reward", "value", "time", "task"):
            page.page.evaluate("() => { window.redrawn = []; }")
            t0 = page.page.evaluate("() => performance.now()")
            choose(view, "colour", c)
            page.page.wait_for_function("() => window.redrawn.length", timeout=40_000)
            time.sleep(0.3)
            took.append(page.page.evaluate("() => window.redrawn[window.redrawn.length - 1]") - t0)
        print("choice to picture, ms:", [round(t) for t in took])
        assert sorted(took)[len(took) // 2] < 1500, took
