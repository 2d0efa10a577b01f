"""explore_planner in a real browser: every control is moved, and the picture follows."""
import re, time

import pytest
from lab import lab

LABELS = {"iterations": "ArrowRight", "num_samples": "ArrowLeft", "num_elites": "ArrowLeft", "horizon": "ArrowRight", "temperature": "ArrowRight", "num_pi_trajs": "ArrowLeft", "anchor": "ArrowRight", "min_std": "ArrowRight", "max_std": "ArrowLeft"}

def figure(view, n): return view.locator(".js-plotly-plot").nth(n)  # Samples, moves, returns, horizon

def replans(page, view, act, timeout=40):
    "Do something, and wait for the plan that follows."
    note = view.locator(".widget-html").last
    before, end = note.text_content(), time.monotonic() + timeout
    act()
    while (said := note.text_content()) == before or "Replanned in" not in said:
        if time.monotonic() > end: pytest.fail(f"no new plan; see {page.shot('no-plan')}")
        time.sleep(0.1)
    return note.text_content()

def redraw_ms(page, view, label, key):
    "Milliseconds from a key press on a slider to other points on the page."
    handle = page.slider(view, label)
    handle.focus()
    read = "() => [...document.querySelectorAll('.tdmpc-view')][0].querySelector('.js-plotly-plot').querySelectorAll('.points path')[3].getAttribute('transform')"
    page.page.evaluate("""read => { read = eval('(' + read + ')'); const was = read(); window.__took = null;
        document.addEventListener('keydown', () => {
            const t0 = performance.now();
            const look = () => { if (read() !== was) window.__took = performance.now() - t0; else if (performance.now() - t0 < 8000) requestAnimationFrame(look); };
            look();
        }, { once: true, capture: true }); }""", read)
    handle.press(key)
    page.page.wait_for_function("() => window.__took !== null", timeout=8000)
    return page.page.evaluate("() => window.__took")

@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1900, True)])
def test_every_control(lab, width, dark):
    with lab.open("explore_planner", width, dark=dark) as page:
        view = page.show()
        page.fits()
        view.scroll_into_view_if_needed()
        page.shot("top")
        samples = figure(view, 0)
        page.changes(samples, lambda: page.nudge(view, "round", "ArrowLeft"))
        page.changes(samples, lambda: page.nudge(view, "imagined decision"))
        kinds = {l: [redraw_ms(page, view, l, k) for k in keys] for l, keys in (("round", ("ArrowRight", "ArrowLeft", "ArrowRight")), ("imagined decision", ("ArrowLeft", "ArrowRight", "ArrowLeft")))}
        print(f"\nredraw in the browser at {width} px: {'; '.join(f'{l} ' + ', '.join(f'{t:.0f}' for t in ts) for l, ts in kinds.items())} ms")
        assert all(sorted(t)[len(t) // 2] < 900 for t in kinds.values()), kinds
        for label, key in LABELS.items():
            said = replans(page, view, lambda: page.nudge(view, label, key))
            assert re.search(rf"\({label} ", said), said
        for n in ("light", "anchored", "published", "reduced"): replans(page, view, lambda: page.press(view, n))
        page.changes(figure(view, 1), lambda: page.press(view, "Pin this plan"))
        replans(page, view, lambda: page.nudge(view, "temperature", times=2))
        page.shot("pinned")
        page.changes(figure(view, 1), lambda: page.press(view, "Unpin"))
        replans(page, view, lambda: view.locator(".widget-checkbox input").first.click())
        replans(page, view, lambda: page.nudge(view, "moment", times=3))
        replans(page, view, lambda: page.nudge(view, "seed"))
        page.changes(samples, lambda: view.locator(".jupyter-widgets.widget-play button").first.click())
        # What does not go together is a line
        page.nudge(view, "num_elites", times=8)
        view.locator("text=num_elites must be at most").first.wait_for(timeout=10_000)
        page.shot("refused")
        replans(page, view, lambda: page.press(view, "light"))
        replans(page, view, lambda: page.choose(view, "task", "cup-catch"))
        page.shot("cup-catch")
        replans(page, view, lambda: page.choose(view, "agent", "teachers"))
        view.locator("input[placeholder*=checkpoint]").first.fill("nothing.pt")
        page.press(view, "Add")
        view.locator("text=There is no agent 'nothing.pt'").first.wait_for(timeout=10_000)
        page.fits(); page.other_width()
        page.no_errors()
