"""Fixtures and rules that all tests share."""
import os, signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def reference() -> Path:
    "The folder with reference outputs: `TDMPC_REFERENCE`, or `../shared` beside the repository."
    given, ci = os.environ.get("TDMPC_REFERENCE"), os.environ.get("CI") == "true"
    folder = Path(given) if given else ROOT.parent / "shared"
    if (folder / "golden").is_dir(): return folder
    said = f"no reference outputs: {folder / 'golden'} is not there; set TDMPC_REFERENCE to the folder that holds golden/"
    if given or (ci and folder.exists()): pytest.fail(said)
    pytest.skip(said)


def _has_gpu() -> bool:
    import torch
    return torch.cuda.is_available()


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it and hand that down, and the tests interrupt
    config.addinivalue_line("markers", "slow: takes minutes; runs with TDMPC_SLOW=1 or CI=true")
    config.addinivalue_line("markers", "cuda: needs a GPU")


def pytest_collection_modifyitems(config, items):
    "Leave out what this machine or this call is not meant to run, without counting it as skipped."
    slow = os.environ.get("TDMPC_SLOW") == "1" or os.environ.get("CI") == "true"
    out = [i for i in items if i.get_closest_marker("slow") and not slow]
    if any(i.get_closest_marker("cuda") for i in items) and not _has_gpu(): out += [i for i in items if i.get_closest_marker("cuda") and i not in out]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [i for i in items if i not in out]
