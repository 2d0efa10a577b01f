"""An online run that is stopped on the way."""
import os
import signal

import pytest
import torch

from tdmpc_opt_kit import online
from tdmpc_opt_kit.checkpoint import RunFolder
from tdmpc_opt_kit.online import ONLINE_PRESETS, OnlineConfig, train_teacher


@pytest.fixture
def cfg():
    return OnlineConfig(**ONLINE_PRESETS["tiny"] | dict(threads=torch.get_num_threads()))


def test_an_interrupt_keeps_what_was_learned(cfg, tmp_path, monkeypatch):
    turn, learned = online.Teaching.turn, []

    def stopped_in_the_middle(self):
        stats = turn(self)
        if self.learner.step: learned.append(self.learner)
        if len(learned) == 3: os.kill(os.getpid(), signal.SIGINT)
        return stats

    monkeypatch.setattr(online.Teaching, "turn", stopped_in_the_middle)
    with pytest.raises(KeyboardInterrupt): train_teacher(cfg, tmp_path, progress=False)
    kept, ours = RunFolder(tmp_path).last()["learner"], learned[-1].state_dict()
    assert kept["step"] == ours["step"] > 0
    for k, v in ours["model"].items(): torch.testing.assert_close(kept["model"][k], v, rtol=0, atol=0)

    monkeypatch.setattr(online.Teaching, "turn", turn)
    report = train_teacher(cfg, tmp_path, resume=True, progress=False)
    assert report["decisions"] >= cfg.decisions and report["updates"] > kept["step"]
