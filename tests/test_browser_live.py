"""Training in a real JupyterLab: the curves grow while it runs, in the page's colours; and the front door opens."""
import json
import pytest
from lab import lab

def parameters(**given):
    "A change to a notebook: other values in the cell of its parameters."
    def change(nb):
        cell = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
        cell["source"] = "".join(cell["source"]) + "".join(f"\n{k} = {v!r}" for k, v in given.items())
    return change

def tell_apart(page, figure, times, seconds=240):
    "See a figure change some times while the kernel is busy; how often it did."
    import time
    seen, end = [], time.monotonic() + seconds
    while len(seen) <= times and time.monotonic() < end and page.busy():
        now = figure.locator(".scatterlayer").first.inner_html() if figure.locator(".scatterlayer").count() else ""
        if now and (not seen or now != seen[-1]): seen.append(now)
        time.sleep(0.3)
    return len(seen) - 1

@pytest.mark.parametrize(("name", "given", "which"), [
    ("run_distill", dict(steps=800, log_every=10, eval_every=400), 0),
    ("run_teacher", dict(decisions=3000, eval_every=500, enough=2000.), 1)])
def test_curves_grow_while_it_trains(lab, tmp_path, name, given, which):
    with lab.open(name, 1900, dark=True, run=False, change=parameters(out_dir=str(tmp_path/"run"), **given)) as page:
        page.start_all()
        view = page.page.locator(".tdmpc-view").first
        view.wait_for(state="attached", timeout=240_000)
        figure = view.locator(".js-plotly-plot").nth(which)
        assert tell_apart(page, figure, 2) >= 2, f"the curves did not grow: {page.shot('stuck')}"
        view.scroll_into_view_if_needed()
        page.shot("training")
        page.wait_idle()
        colour = figure.locator(".gtitle").first.evaluate("e => getComputedStyle(e).fill")
        assert colour == "rgb(229, 231, 235)", colour  # The theme's message came through
        assert page.page.locator(".jp-OutputArea-output img").count(), "no static figure"
        view.scroll_into_view_if_needed()
        page.shot()
        page.no_errors()
        page.fits()

@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1900, True)])
def test_front_door(lab, width, dark):
    with lab.open("00_start_here", width, dark=dark) as page:
        video = page.page.locator("video").first
        video.wait_for(state="attached", timeout=30_000)
        assert video.evaluate("v => v.readyState >= 1 || v.src.length > 1000")
        page.show().scroll_into_view_if_needed()
        page.shot()
        page.no_errors()
        page.fits()
