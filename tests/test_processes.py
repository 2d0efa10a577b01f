"""The helper that the other tests start programs with: limits, leftovers, interruption."""
import sys, time
from processes import run

def test_result(): 
    r = run(["bash", "-c", "echo out; echo err >&2; exit 3"])
    assert (r.code, r.left) == (3, []) and set(r.output.split()) == {"out", "err"}

def test_time_limit_ends_the_family():
    start = time.monotonic()
    r = run(["bash", "-c", "setsid sleep 300 & echo begun; sleep 300"], timeout=1)
    assert r.code == 124 and "begun" in r.output and time.monotonic() - start < 20

def test_leftovers_are_told_and_ended():
    r = run(["bash", "-c", "setsid sleep 301 & exit 0"], grace=0.5)
    assert r.code == 0
    if sys.platform == "linux": assert r.left == ["sleep 301"]

def test_interrupt():
    r = run([sys.executable, "-c", "import time\ntry:\n print('ready', flush=True); time.sleep(300)\nexcept KeyboardInterrupt: print('interrupted')"],
            until=lambda text: "ready" in text, timeout=60)
    assert "interrupted" in r.output and r.code == 0
