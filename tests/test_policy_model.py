"""The policy alone: stored, loaded, evaluated like the whole model's, and refused where a model has to imagine."""
import pytest
import torch

from tdmpc_opt_kit.agent import PolicyAgent, TaskModels, make_agent
from tdmpc_opt_kit.checkpoint import load_world_model, read_card, save_upstream, save_world_model
from tdmpc_opt_kit.config import ConfigError, from_preset
from tdmpc_opt_kit.distill import DISTILL_PRESETS, DistillConfig, run_tasks
from tdmpc_opt_kit.evaluate import evaluate
from tdmpc_opt_kit.planner import PlanConfig, plan
from tdmpc_opt_kit.tasks import MT30
from tdmpc_opt_kit.teachers import load_teachers
from tdmpc_opt_kit.train import Learner
from tdmpc_opt_kit.world_model import PolicyModel, WorldModel, model_size, policy_only


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    m = WorldModel(model_size("1M")).eval()
    with torch.no_grad():
        for p in m.pi_head.parameters(): p.add_(0.05 * torch.randn(p.shape))
    return m


def test_it_acts_as_the_whole_model_does(whole, tmp_path):
    alone = load_world_model(save_world_model(policy_only(whole), tmp_path / "policy.safetensors"))
    obs, task = torch.randn(30, 24), torch.arange(30)
    assert type(alone) is PolicyModel and alone.tasks == whole.tasks and alone.num_params == policy_only(whole).num_params < whole.num_params / 3
    for a, b in zip(alone.pi_params(alone.encode(obs, task), task), whole.pi_params(whole.encode(obs, task), task)): torch.testing.assert_close(a, b, rtol=0, atol=0)
    first = torch.ones(30, dtype=torch.bool)
    for a, b in ((PolicyAgent(alone), PolicyAgent(whole)), (PolicyAgent(alone, 0.3, torch.Generator().manual_seed(1)), PolicyAgent(whole, 0.3, torch.Generator().manual_seed(1)))):
        assert torch.equal(a.act(obs, task, first), b.act(obs, task, first))  # Through the kernels, where there are any
    with torch.no_grad(): alone.pi_head[-1].bias.add_(1.)
    assert not torch.allclose(PolicyAgent(alone).act(obs, task, first), PolicyAgent(whole).act(obs, task, first))  # The kernels' copy follows a change


def test_size_on_disk(whole, tmp_path):
    half = save_world_model(policy_only(whole), tmp_path / "policy.safetensors", torch.float16)
    assert half.stat().st_size < 0.65e6
    card = read_card(half)
    assert card["policy_only"] and card["num_params"] == policy_only(whole).num_params and "policy_only" not in read_card(save_world_model(whole, tmp_path / "whole.safetensors"))


def test_evaluation(whole, tmp_path):
    alone = save_world_model(policy_only(whole), tmp_path / "policy.safetensors")
    settings = dict(tasks="cup-catch,walker-walk", episodes=1, mode="policy", max_steps=20, progress=False)
    assert {t: r.tolist() for t, r in evaluate(alone, **settings).returns.items()} == {t: r.tolist() for t, r in evaluate(whole, **settings).returns.items()}


def test_it_does_not_plan(whole, tmp_path):
    path = save_world_model(policy_only(whole), tmp_path / "policy.safetensors")
    alone = load_world_model(path)
    for f in (lambda: evaluate(path, "cup-catch", 1, mode="plan", progress=False), lambda: make_agent(alone, "plan"), lambda: plan(alone, torch.zeros(1, 24), torch.zeros(1, dtype=torch.int64), None, PlanConfig()),
              lambda: alone.Q(torch.zeros(1, 128), torch.zeros(1, 6), torch.zeros(1, dtype=torch.int64)), lambda: alone.update_target(), lambda: save_upstream(alone, tmp_path / "policy.pt")):
        with pytest.raises(ConfigError, match="policy alone"): f()
    assert not (tmp_path / "policy.pt").exists()


def test_it_is_in_nobodys_way(whole, tmp_path):
    "A policy alone beside whole models: only what needs more of it is refused, and nothing is drawn to make one."
    before = torch.get_rng_state()
    alone = policy_only(whole)
    assert torch.equal(torch.get_rng_state(), before) and all(a.data_ptr() == b.data_ptr() for a, b in zip(alone.pi_head.parameters(), whole.pi_head.parameters()))
    mixed = {"walker-walk": whole, "cup-catch": alone}
    assert evaluate(mixed, "walker-walk", 1, mode="plan", plan_config="tiny", max_steps=2, progress=False).mode == "plan"
    with pytest.raises(ConfigError, match="cup-catch is a policy alone"): evaluate(mixed, "cup-catch,walker-walk", 1, mode="plan", progress=False)
    with pytest.raises(ConfigError, match="cannot be trained on"): Learner(alone)
    both = TaskModels(mixed)
    assert [s.name for s in run_tasks(from_preset(DistillConfig, DISTILL_PRESETS, "tiny", tasks="walker-walk"), both)] == ["walker-walk"]
    with pytest.raises(ConfigError, match="value_distill_coef"): run_tasks(from_preset(DistillConfig, DISTILL_PRESETS, "tiny", tasks="walker-walk,cup-catch"), both)


def test_as_a_teacher_it_teaches_its_policy_only(whole, tmp_path):
    teachers = load_teachers(save_world_model(policy_only(whole), tmp_path / "policy.safetensors"))
    config = lambda **kw: from_preset(DistillConfig, DISTILL_PRESETS, "tiny", **kw)
    with pytest.raises(ConfigError, match="policy alone and knows no reward"): run_tasks(config(recipe="paper"), teachers)
    assert run_tasks(config(recipe="paper", reward_coef=0., policy_coef=1., tasks="mt30"), teachers) == MT30


def test_half_a_file_is_not_taken_for_a_policy(whole, tmp_path):
    from safetensors.torch import load_file
    from tdmpc_opt_kit.checkpoint import write_safetensors
    import json
    from safetensors import safe_open
    path = save_world_model(whole, tmp_path / "whole.safetensors")
    with safe_open(path, "pt") as f: meta = f.metadata()
    state = {k: v for k, v in load_file(path).items() if k.split(".")[0] in ("task_emb", "encoder", "pi_head")}
    write_safetensors(state, tmp_path / "half.safetensors", meta)
    with pytest.raises(ConfigError, match="missing: dynamics"): load_world_model(tmp_path / "half.safetensors")
    assert "policy_only" not in json.loads(meta["config"])
