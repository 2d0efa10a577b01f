"""The base of all views in a real browser: a slider redraws, messages appear, the theme arrives."""
import pytest
from lab import lab

@pytest.mark.parametrize("dark", [False, True])
def test_slider_and_theme(lab, dark):
    with lab.open("52_widgets", 1000, dark=dark) as page:
        view = page.show()
        figure = view.locator(".js-plotly-plot").first
        page.changes(figure, lambda: page.nudge(view, "value"))
        colour = figure.locator(".xtitle").first.evaluate("e => getComputedStyle(e).fill")
        assert colour == ("rgb(229, 231, 235)" if dark else "rgb(31, 41, 55)")
        page.nudge(view, "value")
        view.locator("text=five is too much").wait_for(timeout=10_000)
        page.shot()
        page.no_errors()
        page.fits()
