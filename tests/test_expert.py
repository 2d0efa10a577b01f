"""Experts: exact resume, files, and the agent in the real environments."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.evaluate import evaluate
from tdmpc_opt_kit.expert import (Expert, ExpertAgent, ExpertConfig, Trial, Trials, load_expert, save_expert,
                                  train_expert)
from tdmpc_opt_kit.tasks import EPISODE_LENGTH

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(num_envs=8, unroll=5, epochs=1, minibatches=2, starts=3, save_every=2, log_every=1)


def test_stopped_and_resumed_is_the_same(tmp_path, monkeypatch):
    "A run that dies after two rounds goes on to the same weights as one that was left alone."
    cfg = ExpertConfig("finger-turn-hard", decisions=160, hint=0.5, **SMALL)
    train_expert(cfg, tmp_path / "whole", progress=False)
    learn = Trial.learn

    def dies(self, g):
        if self.round == 3: raise KeyboardInterrupt
        return learn(self, g)
    monkeypatch.setattr(Trial, "learn", dies)
    with pytest.raises(KeyboardInterrupt): train_expert(cfg, tmp_path / "parts", progress=False)
    monkeypatch.undo()
    train_expert(cfg, tmp_path / "parts", resume=True, progress=False)
    a, b = (load_expert(tmp_path / k / "expert.safetensors").state_dict() for k in ("whole", "parts"))
    for k in a: assert torch.equal(a[k], b[k]), k
    with pytest.raises(ConfigError, match="hint"):
        other = ExpertConfig("finger-turn-hard", decisions=160, **SMALL)
        train_expert(other, tmp_path / "parts", resume=True, progress=False)


def test_an_expert_acts_in_the_environment(tmp_path):
    "What was stored and loaded plays as it did in training: the same returns from Trials and from evaluate."
    torch.manual_seed(0)
    expert = Expert("cup-spin")
    with torch.no_grad(): expert.policy[-1].weight.mul_(30)
    loaded = load_expert(save_expert(expert, tmp_path / "cup.safetensors"))
    trials = Trials("cup-spin", 16, starts=16)
    for _ in range(2 * EPISODE_LENGTH): trials.step(expert.act(trials.obs).numpy())
    returns = evaluate(ExpertAgent(loaded), "cup-spin", episodes=16, progress=False).returns["cup-spin"]
    assert len(trials.finished) >= 16
    assert abs(np.mean(trials.finished) - returns.mean()) < 3 * (np.std(trials.finished) + returns.std()) / 4 + 5


def test_files_that_do_not_fit(tmp_path):
    path = save_expert(Expert("cup-catch"), tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:200])
    for name, text in (("cut", "damaged"), ("none", "no such file")):
        with pytest.raises(ConfigError, match=text): load_expert(tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match="not an expert"): load_expert(ROOT / "data/teachers/cup-catch.safetensors")
    broken = Expert("cup-catch")
    with torch.no_grad(): broken.log_std[0] = float("nan")
    with pytest.raises(ConfigError, match="log_std"): save_expert(broken, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_lost_environments_begin_anew():
    "An environment whose state is no number any more is reset, and its episode counts for nothing."
    trials = Trials("cheetah-run", 4, starts=2)
    trials.total[:] = 0.
    trials.at[1, 3] = np.nan
    reward, done, after = trials.step(np.zeros((4, 6)))
    assert done[1] and not trials.finished
    for x in (trials.obs, reward, after): assert np.isfinite(x).all()


def test_shipped_experts_play():
    "Every expert that ships earns in a fresh episode what its table says, by and large."
    rows = json.loads((ROOT / "data" / "measured" / "experts.json").read_text())["experts"]
    assert {r["task"] for r in rows} == {p.stem for p in (ROOT / "data" / "experts").glob("*.safetensors")}
    agent = ExpertAgent([ROOT / "data" / "experts" / f"{r['task']}.safetensors" for r in rows])
    returns = evaluate(agent, [r["task"] for r in rows], episodes=2, seed=2, progress=False).returns
    for r in rows: assert abs(np.mean(returns[r["task"]]) - r["mean"]) < 5 * r["std"] + 10, r["task"]
