"""An online run that is stopped on the way."""
import os
import signal
from dataclasses import replace

import pytest
import torch

from tdmpc_opt_kit import online
from tdmpc_opt_kit.checkpoint import RunFolder, load_world_model, save_world_model
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.online import ONLINE_PRESETS, OnlineConfig, train_teacher
from tdmpc_opt_kit.world_model import WorldModel, model_size, policy_only


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


def test_a_related_task_is_begun_from_its_weights(cfg, tmp_path, monkeypatch):
    first = train_teacher(cfg, tmp_path/"spin", progress=False)
    assert first["updates"]
    acted, act = [], online.Explorer.act
    monkeypatch.setattr(online.Explorer, "act", lambda self, *a: acted.append(a[-1]) or act(self, *a))
    init = str(tmp_path/"spin"/"teacher.safetensors")
    t = online.Teaching(replace(cfg, tasks="pendulum-swingup", init=init))
    for (k, a), b in zip(t.model.named_parameters(), load_world_model(init).parameters()): torch.testing.assert_close(a, b, rtol=0, atol=0, msg=k)
    t.open()
    try: t.turn()
    finally: t.env.close()
    assert acted == [0]  # Not a random action

    report = train_teacher(replace(cfg, tasks="pendulum-swingup", init=init), tmp_path/"swingup", progress=False)
    assert report["tasks"] == ["pendulum-swingup"] and report["updates"]
    with pytest.raises(ConfigError, match="another init"): train_teacher(replace(cfg, tasks="pendulum-swingup"), tmp_path/"swingup", resume=True, progress=False)


@pytest.mark.parametrize("change, says", [(dict(tasks="cup-catch"), "obs_dim 3 instead of 8"), (dict(size="0.2M"), "has size tiny instead of 0.2M"), (dict(init="{}/none.safetensors"), "there is no such file")])
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(cfg, tmp_path, change, says):
    save_world_model(WorldModel(model_size("tiny", obs_dim=3, action_dim=1, task_dim=0), "pendulum-spin"), tmp_path/"spin.safetensors")
    change = {k: v.format(tmp_path) for k, v in (dict(init="{}/spin.safetensors") | change).items()}
    with pytest.raises(ConfigError, match=says): train_teacher(replace(cfg, **change), tmp_path/"out", progress=False)
    assert not (tmp_path/"out").exists()


def test_a_policy_alone_is_no_beginning(cfg, tmp_path):
    save_world_model(policy_only(WorldModel(model_size("tiny", obs_dim=3, action_dim=1, task_dim=0), "pendulum-spin")), tmp_path/"policy.safetensors")
    with pytest.raises(ConfigError, match="a policy alone; init needs a whole world model"): online.Teaching(replace(cfg, init=str(tmp_path/"policy.safetensors")))
