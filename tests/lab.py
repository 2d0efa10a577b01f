"""A real JupyterLab and a real headless Chromium, for the tests of notebooks that people play with.

One server and one browser a test module (`lab`), a page at a time with its width and theme (`lab.open`). A notebook is copied into the
server's folder first, so nothing in nbs/ changes. Screenshots go to the folder named by TDMPC_SHOTS (default runs/screenshots).
"""
import json, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import ROOT

SHOTS = Path(os.environ.get("TDMPC_SHOTS", ROOT/"runs"/"screenshots"))
SLOW = float(os.environ.get("TDMPC_BROWSER_TIMEOUT", 240))  # Seconds that a notebook may take to run in the page
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# What JupyterLab and Chromium say of themselves, whatever is on the page
HARMLESS = re.compile(r"favicon|GPU stall|WebGL|GroupMarkerNotSet|Permissions policy|preload|Autofocus|ResizeObserver loop|/api/contents/.*checkpoints|lsp|status of 404.*(settings|workspaces|translations|checkpoints)|jupyterlab_server|Canvas2D", re.I)

def chromium() -> str:
    for name in (os.environ.get("BROWSER_PATH"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if name and (path := shutil.which(name)): return path
    pytest.fail("no Chromium or Chrome: install the Debian package chromium")

class Lab:
    "A JupyterLab on a folder of its own, and a browser."
    def __init__(self, folder:Path):
        from playwright.sync_api import sync_playwright
        self.folder, self.token = folder, secrets.token_hex(16)
        self.work = folder/"work"
        self.work.mkdir(parents=True)
        (folder/"config"/"labconfig").mkdir(parents=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        settings = folder/"settings"
        settings.mkdir()
        (settings/"overrides.json").write_text(json.dumps({"@jupyterlab/apputils-extension:notification": dict(fetchNews="false", checkForUpdates=False),
            "@jupyterlab/notebook-extension:tracker": dict(windowingMode="none")}))  # Every output is on the page, in sight or not
        env = os.environ | dict(TDMPC_PRESET=os.environ.get("TDMPC_LAB_PRESET", "tiny"), PYTHONPATH=str(ROOT), JUPYTER_CONFIG_DIR=str(folder/"config"), JUPYTER_DATA_DIR=str(folder/"data"), JUPYTER_RUNTIME_DIR=str(folder/"runtime"),
            JUPYTER_PREFER_ENV_PATH="1", OMP_NUM_THREADS="1", TDMPC_CACHE=str(folder/"cache"))
        self.log = (folder/"jupyter.log").open("w")
        self.server = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}", f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={self.work}", f"--LabApp.app_settings_dir={settings}", "--allow-root", "--ServerApp.port_retries=0"], env=env, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        end = time.monotonic() + 90
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=5); break
            except OSError:
                if self.server.poll() is not None or time.monotonic() > end: pytest.fail(f"JupyterLab did not start:\n{(folder/'jupyter.log').read_text()[-3000:]}")
                time.sleep(0.3)
        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=chromium(), args=FLAGS)

    def close(self):
        self.browser.close()
        self.playwright.stop()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/shutdown?token={self.token}", method="POST")
        try: urllib.request.urlopen(request, timeout=10)
        except OSError: pass
        try: self.server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(self.server.pid, 9)
        self.log.close()

    @contextmanager
    def open(self,
        name,          # Of a notebook in nbs/, without suffix
        width=1900,    # Of the window, pixels
        height=1200,
        dark=False,    # JupyterLab's dark theme?
        change=None,   # Called with the notebook as a dict before it is opened, changes it
        run=True,      # From top to bottom?
        timeout=None,  # Seconds for that
    ):                 # A `Page`
        "A notebook in a new page."
        nb = json.loads((ROOT/f"nbs/{name}.ipynb").read_text(encoding="utf-8"))
        for c in nb["cells"]:
            if c["cell_type"] == "code": c |= dict(outputs=[], execution_count=None)
        nb["metadata"]["kernelspec"] = dict(name="python3", display_name="Python 3 (ipykernel)", language="python")
        if change: change(nb)
        shutil.rmtree(self.folder/"cache", ignore_errors=True)  # A map from the page before would come at once
        file = f"{name}-{width}{'-dark' if dark else ''}.ipynb"
        (self.work/file).write_text(json.dumps(nb), encoding="utf-8")
        theme = self.folder/"config"/"lab"/"user-settings"/"@jupyterlab"/"apputils-extension"
        theme.mkdir(parents=True, exist_ok=True)
        (theme/"themes.jupyterlab-settings").write_text(json.dumps(dict(theme="JupyterLab Dark" if dark else "JupyterLab Light")))
        context = self.browser.new_context(viewport=dict(width=width, height=height))
        page = Page(context.new_page(), f"{name}-{width}{'-dark' if dark else ''}")
        try:
            page.page.goto(f"http://127.0.0.1:{self.port}/lab/tree/{file}?token={self.token}&reset", timeout=90_000)
            page.page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)
            page.wait_for_kernel(90)
            page.fold_sidebar()
            if run: page.run_all(timeout or SLOW)
            yield page
        finally:
            try: page.shot("last")
            except Exception: pass
            context.close()
            self.end_kernels()

    def end_kernels(self):
        "No kernel outlives its page."
        base = f"http://127.0.0.1:{self.port}/api/sessions"
        for s in json.loads(urllib.request.urlopen(f"{base}?token={self.token}", timeout=10).read()):
            urllib.request.urlopen(urllib.request.Request(f"{base}/{s['id']}?token={self.token}", method="DELETE"), timeout=20)

class Page:
    "A notebook in the browser, and what its console says."
    def __init__(self, page, name):
        self.page, self.name, self.errors = page, name, []
        page.on("console", lambda m: self.errors.append(f"{m.text} ({m.location.get('url', '')})") if m.type == "error" else None)
        page.on("pageerror", lambda e: self.errors.append(f"{e}"))

    def wait_for_kernel(self, timeout):
        "Until the kernel has started; JupyterLab may ask which one."
        end = time.monotonic() + timeout
        while not self.page.locator(".jp-StatusBar-Widget :text-matches('\\\\| Idle')").count():
            if self.page.locator(".jp-Dialog button:has-text('Select')").count(): self.page.click(".jp-Dialog button:has-text('Select'):not(:has-text('No'))")
            if time.monotonic() > end: pytest.fail(f"{self.name}: no kernel after {timeout} s; see {self.shot('no-kernel')}")
            time.sleep(0.25)

    def fold_sidebar(self):
        "The file browser takes a quarter of a narrow window."
        if self.page.locator("#jp-left-stack:visible").count(): self.page.keyboard.press("Control+b")

    def start_all(self):
        "Begin to run every cell."
        p = self.page
        p.locator(".jp-Cell").first.click()
        p.keyboard.press("Escape")
        p.click("li.lm-MenuBar-item:has-text('Run')")
        p.click("li[data-command='runmenu:run-all']")

    def busy(self) -> bool:
        "Is a cell running or waiting? Fails with the traceback of a cell that failed."
        p = self.page
        if said := p.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").all_text_contents():
            if any("Traceback" in s for s in said): pytest.fail(f"{self.name}: a cell failed:\n{''.join(said)[-3000:]}")
        return bool(p.locator(".jp-Notebook-ExecutionIndicator[data-status=busy]").count() or p.locator(".jp-InputPrompt:has-text('[*]')").count())

    def wait_idle(self, timeout=SLOW):
        "Until every cell has run."
        end, quiet = time.monotonic() + timeout, 0
        while quiet < 4:  # Idle between two cells is not the end
            time.sleep(0.25)
            quiet = 0 if self.busy() else quiet + 1
            if time.monotonic() > end: pytest.fail(f"{self.name}: still running after {timeout:.0f} s; see {self.shot('timeout')}")

    def run_all(self, timeout):
        "Run every cell, and wait until the kernel is idle."
        self.start_all()
        self.wait_idle(timeout)

    def shot(self, what="") -> Path:
        "A screenshot of the window, kept."
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS/f"{self.name}{'-' + what if what else ''}.png"
        self.page.screenshot(path=path)
        return path

    def show(self, selector=".tdmpc-view", nth=0):
        "Scroll to a widget, and give it."
        w = self.page.locator(selector).nth(nth)
        w.wait_for(state="attached", timeout=30_000)
        w.scroll_into_view_if_needed()
        return w

    def picture(self, locator) -> bytes:
        "What an element looks like now, as PNG."
        return locator.screenshot()

    def changes(self, locator, act, timeout=20., settle=0.4):
        "Do something, and wait until an element looks different; fails if it never does."
        before, end = self.picture(locator), time.monotonic() + timeout
        act()
        while time.monotonic() < end:
            time.sleep(settle)
            if (now := self.picture(locator)) != before: return now
        pytest.fail(f"{self.name}: nothing changed in {timeout:.0f} s; see {self.shot('unchanged')}")

    def slider(self, view, label):
        "The handle of an ipywidgets slider by its description; move it with `press('ArrowRight')`."
        row = view.locator(f".widget-hslider:has(.widget-label:text-is('{label}')), .widget-hslider:has(.widget-label-basic:text-is('{label}'))").first
        return row.locator(".noUi-handle").first

    def nudge(self, view, label, key="ArrowRight", times=1):
        "Move a slider by the keyboard."
        h = self.slider(view, label)
        h.focus()
        for _ in range(times): h.press(key)

    def choose(self, view, label, value):
        "Choose from a menu by its description."
        view.locator(f".widget-dropdown:has(.widget-label:text-is('{label}')) select").first.select_option(value)

    def press(self, view, text):
        "Press a button by what it says."
        view.locator(f"button:has-text('{text}')").first.click()

    def no_errors(self):
        "The browser's console holds no error."
        bad = [e for e in self.errors if not HARMLESS.search(e)]
        assert not bad, f"{self.name}: the console says {bad[:5]}"

    def too_wide(self) -> list:
        "Views that are wider than their cell's output: (scrollWidth, clientWidth) of that."
        return self.page.evaluate("""() => [...document.querySelectorAll('.tdmpc-view')].map(v => {
            const a = v.closest('.jp-OutputArea-output'); return [a.scrollWidth, a.clientWidth]; }).filter(([s, c]) => s > c + 2)""")

    def fits(self, timeout=5):
        "No view is wider than its cell's output, as soon as the page has come to rest."
        end = time.monotonic() + timeout
        while wide := self.too_wide():
            assert time.monotonic() < end, f"{self.name}: views wider than their output (scrollWidth, clientWidth): {wide}"
            time.sleep(0.2)

    def other_width(self, nth=0, timeout=30):
        "The window becomes 1,900 pixels wide, or 1,000 where it was that: figures follow, nothing sticks out."
        view, width, end, good = self.show(nth=nth), 1900 if self.page.viewport_size["width"] < 1500 else 1000, time.monotonic() + timeout, 0
        was = view.evaluate("v => v.clientWidth")
        self.page.set_viewport_size(dict(width=width, height=self.page.viewport_size["height"]))
        while good < 5:  # The page moves in several steps, and is right between two of them by chance
            shown = view.evaluate("""v => [...v.querySelectorAll('.js-plotly-plot')].filter(g => g.clientWidth && g._fullLayout).map(g => [g._fullLayout.width, g.clientWidth])""")
            said = dict(was=was, now=view.evaluate("v => v.clientWidth"), figures=shown, too_wide=self.too_wide())
            good = good + 1 if said["now"] != was and shown and all(abs(a - b) <= 1 for a, b in shown) and not said["too_wide"] else 0
            if time.monotonic() > end: pytest.fail(f"{self.name} at {width}: {said}; see {self.shot('misfit')}")
            time.sleep(0.2)
        view.evaluate("v => v.scrollIntoView()")
        return self.shot(f"at-{width}")

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()
