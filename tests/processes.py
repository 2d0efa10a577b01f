"""Run a command with a time limit and see to it that nothing which it started stays behind."""
import os, signal, subprocess, tempfile, threading, time, uuid
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = float(os.environ.get("TDMPC_TEST_TIMEOUT", 900))  # Seconds for one command
STOP = threading.Event() # Set to end every command that runs now

class Result(NamedTuple):
    code:int       # Exit status
    output:str     # stdout and stderr together
    seconds:float  # How long it ran
    left:list      # Command lines of processes that outlived it, each ended since

    def check(self):
        "The output of a command that succeeded and left nothing behind; fails the test with the end of its output otherwise."
        assert self.code == 0, f"exit status {self.code} after {self.seconds:.0f} s:\n{self.output[-8000:]}"
        assert not self.left, f"processes stayed behind: {self.left}"
        return self.output

def marked(mark) -> dict:
    "pid -> command line of the processes whose environment holds `mark` (Linux; nothing elsewhere)."
    found = {}
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (p/"environ").read_bytes() and (p/"stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found[int(p.name)] = (p/"cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError: pass  # ended in the meantime, or somebody else's
    return found

def run(
    cmd,          # Program and arguments
    cwd=ROOT,     # Where to run it
    timeout=LIMIT, # Seconds; afterwards it is killed and its code is 124
    grace=10,     # Seconds that its own children may take to end after it
    until=None,   # Called with the output so far once in a while; when it is true, the command gets a signal
    sig=signal.SIGINT, # That signal; this one is Ctrl-C
    **env,        # Environment variables to change; None removes one
) -> Result:
    "Run `cmd` in a session of its own without input. A kernel starts sessions of its own, so a variable marks the whole family."
    mark = f"TDMPC_TEST_FAMILY={uuid.uuid4().hex}"
    e = {k: v for k, v in (os.environ | env).items() if v is not None} | dict([mark.split("=")])
    with tempfile.TemporaryFile() as out:
        def text():
            out.seek(0)
            return out.read().decode(errors="replace")
        start = time.monotonic()
        p = subprocess.Popen([str(c) for c in cmd], cwd=cwd, env=e, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while time.monotonic() - start < timeout and not STOP.is_set():
                try: p.wait(0.5)
                except subprocess.TimeoutExpired: pass
                if p.poll() is not None: break
                if until and until(text()):
                    until = None
                    os.killpg(p.pid, sig)
            late, seconds = p.poll() is None, time.monotonic() - start
            if not late:
                end = time.monotonic() + grace
                while marked(mark) and time.monotonic() < end: time.sleep(0.1)
            left = [] if late else list(marked(mark).values())
        finally:  # also when the test itself is interrupted
            for last in (signal.SIGTERM, signal.SIGKILL):
                family = marked(mark)
                if p.poll() is None:
                    try: os.killpg(p.pid, last)
                    except ProcessLookupError: pass
                for pid in family:
                    try: os.kill(pid, last)
                    except ProcessLookupError: pass
                end = time.monotonic() + 5
                while (p.poll() is None or marked(mark)) and time.monotonic() < end: time.sleep(0.05)
        said = text()
    return Result(124, said + f"\nkilled after {seconds:.0f} s", seconds, left) if late else Result(p.returncode, said, seconds, left)
