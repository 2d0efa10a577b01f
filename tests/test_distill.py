"""Distillation: a resumed run equals an uninterrupted one, and bad input is refused with one clear error before any long work."""
import json
import signal

import pytest
import torch

from tdmpc_opt_kit.checkpoint import RunFolder, save_world_model
from tdmpc_opt_kit.config import ConfigError, from_preset
from tdmpc_opt_kit.data import Sampler, Store
from tdmpc_opt_kit.distill import DISTILL_PRESETS, RECIPES, Distill, DistillConfig, Pair, check_data, load_teachers, prepare_store
from tdmpc_opt_kit.online import ONLINE_PRESETS, OnlineConfig, train_teacher
from tdmpc_opt_kit.tasks import task_set
from tdmpc_opt_kit.train import begin_run, train
from tdmpc_opt_kit.world_model import SIZES, WorldModel, model_size

TASKS = "cup-catch,pendulum-spin"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Two tiny specialists and a small store that they collected."
    path = tmp_path_factory.mktemp("distill")
    (path / "teachers").mkdir()
    torch.manual_seed(0)
    for s in task_set(TASKS):
        save_world_model(WorldModel(model_size("tiny", task_dim=0, obs_dim=s.obs_dim, action_dim=s.action_dim), s.name), path / "teachers" / f"{s.name}.safetensors")
    prepare_store(config(), load_teachers(path / "teachers"), task_set(TASKS), path, progress=False)
    return path


def config(**kw): return from_preset(DistillConfig, DISTILL_PRESETS, "tiny", **kw)


def training(home, out, cfg, resume=False, stop_at=None):
    "The training part of run_distill, as the notebook does it; `stop_at` interrupts as Ctrl-C would, between the student's update and the baseline's."
    run = RunFolder(out)
    state = begin_run(run, cfg, resume)
    teachers = load_teachers(home / "teachers")
    pair, sampler = Pair(cfg, teachers, teachers=teachers, store=Store(home / "store")), Sampler(home / "store", TASKS, cfg.batch_size, cfg.horizon, cfg.balance, cfg.seed)
    run.truncate_metrics(0 if state is None else state["step"])
    if state is not None:
        pair.load_state_dict(state["pair"])
        sampler.load_state_dict(state["sampler"])

    baseline = pair.learners["scratch"].update
    def update(*args):
        if pair.step == stop_at: signal.raise_signal(signal.SIGINT)
        return baseline(*args)
    pair.learners["scratch"].update = update
    imitate = pair.terms.imitate
    def first(*args):
        if pair.step + 1 == stop_at: signal.raise_signal(signal.SIGINT)
        return imitate(*args)
    pair.terms.imitate = first

    def log(line):
        for row in pair.lines(line): run.log(row)

    save = lambda step: run.save(step, dict(pair=pair.state_dict(), sampler=sampler.state_dict()), pair.models["student"])
    train(pair, sampler.sample, cfg.updates, log_every=2, on_log=log, save_every=4, on_save=save, progress=False)
    return pair, run


def weights(pair): return [p for m in pair.models.values() for p in m.state_dict().values()]


@pytest.mark.parametrize("stop_at", [4, 7])
def test_resumed_equals_uninterrupted(home, tmp_path, stop_at):
    cfg = config(steps=12)
    whole, run_whole = training(home, tmp_path / "whole", cfg)
    with pytest.raises(KeyboardInterrupt): training(home, tmp_path / "parts", cfg, stop_at=stop_at)
    assert RunFolder(tmp_path / "parts").last()["step"] == stop_at  # the interrupt was saved
    parts, run_parts = training(home, tmp_path / "parts", cfg, resume=True)
    assert parts.step == 12
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts)))
    numbers = lambda run: [{k: v for k, v in r.items() if k != "updates_per_second"} for r in run.metrics()]
    assert numbers(run_whole) == numbers(run_parts)


@pytest.mark.parametrize("stop_at, more", [(3, {}), (5, {}), (6, {}), (9, {}), (3, dict(latent_coef=1., relation_coef=1., other_coef=0.3)), (5, dict(latent_coef=1.)), (3, dict(task_scale=True, value_scale=True)), (4, dict(precision="bfloat16"))])
def test_resumed_equals_uninterrupted_where_the_policy_comes_first(home, tmp_path, stop_at, more):
    "Stopped among the updates of the policy alone, at their last one, and behind them."
    cfg = config(steps=6, policy_steps=5, lr_final=0.1, **more)
    whole, run_whole = training(home, tmp_path / "whole", cfg)
    with pytest.raises(KeyboardInterrupt): training(home, tmp_path / "parts", cfg, stop_at=stop_at)
    assert RunFolder(tmp_path / "parts").last()["step"] == stop_at
    parts, run_parts = training(home, tmp_path / "parts", cfg, resume=True)
    assert [l.step for l in parts.learners.values()] == [11, 6]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts)))
    numbers = lambda run: [{k: v for k, v in r.items() if k != "updates_per_second"} for r in run.metrics()]
    assert numbers(run_whole) == numbers(run_parts)
    assert [(r["step"], r["agent"]) for r in numbers(run_whole)] == [(2, "student"), (4, "student"), *((k, a) for k in (6, 8, 10, 11) for a in ("student", "scratch"))]


def test_baseline_and_student_share_their_rates(home):
    "In each update of the whole model, wherever the policy's own updates end."
    for kw in (dict(steps=8, policy_steps=3), dict(steps=4, policy_steps=9), dict(steps=7)):
        pair, rates = Pair(config(lr=1e-3, lr_final=0.1, **kw), load_teachers(home / "teachers")), {}
        for name, l in pair.learners.items():
            rates[name] = []
            for k in range(kw["steps"]):
                l.step = k + (kw.get("policy_steps", 0) if name == "student" else 0)
                l.set_rates()
                rates[name].append(l.opt.param_groups[1]["lr"])
        assert rates["student"] == pytest.approx(rates["scratch"], rel=1e-9) and rates["student"][-1] < rates["student"][0]


def test_a_policy_alone_and_what_it_cannot_have():
    cfg = config(steps=0, policy_steps=5, scratch=False, eval_planning="none")
    assert cfg.updates == 5
    for kw, word in ((dict(policy_steps=0), "leaves nothing to train"), (dict(recipe="paper"), "leaves nothing to train"), (dict(scratch=True), "scratch=False"), (dict(eval_planning="all"), "eval_planning=none")):
        with pytest.raises(ConfigError, match=word): config(**(dict(steps=0, policy_steps=5, scratch=False, eval_planning="none") | kw))
    with pytest.raises(ConfigError, match="policy_steps"): config(recipe="paper", policy_steps=-5)


def test_batches_without_a_teacher_leave_the_policy_alone(home):
    "Nothing moves where nobody teaches."
    teachers, b = load_teachers(home / "teachers"), Sampler(home / "store", TASKS, 16).sample()
    pair = Pair(config(steps=5, policy_steps=5, scratch=False), teachers)
    before = [p.clone() for p in pair.models["student"].parameters()]
    pair.update(b._replace(task=torch.zeros_like(b.task)))  # walker-stand has no teacher
    assert all(torch.equal(p, q) for p, q in zip(pair.models["student"].parameters(), before))


def test_an_update_of_the_policy_is_plain_imitation(home):
    "Encoder and policy move as PyTorch's own Adam would move them by the clipped gradient of the weighed loss; nothing else moves."
    teachers, b = load_teachers(home / "teachers"), Sampler(home / "store", TASKS, 64).sample()
    pair = Pair(config(steps=5, policy_steps=5, lr=1e-2, enc_lr_scale=0.5, scratch=False), teachers)
    m = pair.models["student"]
    import copy
    own = copy.deepcopy(m)
    z = own.encode(b.obs, b.task)
    action, theirs, mask = own.pi_params(z, b.task)[0].tanh(), teachers.policy(b.obs, b.task)[2], own.mask(b.task)
    loss = 30 * ((action - theirs).square() * mask).sum(-1).div(mask.sum(-1)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(own.parameters(), 20.)
    parts = [(list(own.encoder.parameters()), 5e-3), (list(own.task_emb.parameters()), 1e-2)]
    torch.optim.Adam([dict(params=p, lr=lr) for p, lr in parts]).step()
    torch.optim.Adam(own.pi_head.parameters(), lr=1e-2, eps=1e-5).step()
    stats = pair.update(b)
    assert float(stats["student/policy_distill_loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (n, p), q in zip(m.named_parameters(), own.parameters()): assert torch.allclose(p, q, atol=2e-4), n


def test_killed_without_notice_goes_on_from_the_last_checkpoint(home, tmp_path):
    cfg = config(steps=12)
    whole, _ = training(home, tmp_path / "whole", cfg)

    class Killed(BaseException): pass
    real, count = Pair.update, []
    def dies(self, *args, **kw):
        count.append(0)
        if len(count) > 10: raise Killed
        return real(self, *args, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Pair, "update", dies)
        with pytest.raises(Killed): training(home, tmp_path / "parts", cfg)
    assert RunFolder(tmp_path / "parts").last()["step"] == 8
    parts, _ = training(home, tmp_path / "parts", cfg, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts)))


def test_scratch_is_what_it_would_be_alone(home, tmp_path):
    "The baseline beside a student is exactly the same network trained without any teacher on the same slices."
    from tdmpc_opt_kit.train import Learner, TrainConfig
    cfg = config(steps=5)
    pair, _ = training(home, tmp_path / "pair", cfg)
    torch.manual_seed(cfg.seed)
    alone = Learner(WorldModel(model_size(cfg.student_size)).eval(), TrainConfig(lr=cfg.lr), cfg.seed)
    train(alone, Sampler(home / "store", TASKS, cfg.batch_size, cfg.horizon, cfg.balance, cfg.seed).sample, cfg.steps, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(pair.models["scratch"].state_dict().values(), alone.model.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(pair.models["student"].state_dict().values(), alone.model.state_dict().values()))


def test_weight_of_zero_asks_nobody(home):
    class Nobody:
        def __getattr__(self, name): raise AssertionError(f"{name} was asked")
    pair = Pair(config(reward_coef=0., policy_coef=0., value_distill_coef=0.), Nobody())
    pair.update(Sampler(home / "store", TASKS, 8).sample())


def test_reward_term_moves_the_student_toward_the_teacher(home):
    teachers, sampler = load_teachers(home / "teachers"), Sampler(home / "store", TASKS, 64)
    from tdmpc_opt_kit.train import Learner, TrainConfig
    def error(d, steps=60):
        torch.manual_seed(0)
        learner, s = Learner(WorldModel(SIZES["tiny"]), TrainConfig(lr=1e-3, reward_pred_coef=0.)), Sampler(home / "store", TASKS, 64)
        terms = Distill(teachers, d, 0.)
        for _ in range(steps): learner.update(s.sample(), terms if d else None)
        b = sampler.sample()
        from tdmpc_opt_kit.twohot import from_two_hot
        with torch.no_grad(): ours = from_two_hot(learner.model.reward(learner.model.encode(b.obs[0], b.task), b.action[0], b.task))
        return float((ours - teachers.reward(b.obs[0], b.action[0], b.task)).square().mean())
    for m in teachers.models:  # an untrained teacher expects no reward; this one expects about 1
        with torch.no_grad(): m.reward_head[-1].bias.copy_(-(torch.linspace(-10, 10, 101) - 0.69).square() * 20)
    assert error(10.) < 0.5 * error(0.)


@pytest.mark.parametrize(("kw", "word"), [
    (dict(recipe="papr"), "Did you mean 'paper'"), (dict(steps=-1), "steps"), (dict(batch_size=0), "batch_size"), (dict(lr=-1.), "lr"),
    (dict(tasks="cup-cach"), "Did you mean 'cup-catch'"), (dict(student_size="1m"), "1M"), (dict(eval_planning="5"), "5 tasks"), (dict(noise_stds="-1"), "noise_stds"),
    (dict(balance="task"), "balance"), (dict(eval_episodes=0), "eval_episodes"), (dict(plan="anchord"), "plan: .*Did you mean 'anchored'"), (dict(horizon=0), "horizon")])
def test_impossible_values(kw, word):
    with pytest.raises(ConfigError, match=word.replace("(", r"\(")): config(**kw)


@pytest.mark.parametrize(("preset", "kw", "weights"), [
    ("quick", dict(), tuple(RECIPES["best"][k] for k in ("reward_coef", "policy_coef", "pi_coef"))), ("quick", dict(recipe="paper"), (0.45, 0., 1.)), ("mt30", dict(), (0.45, 0., 1.)), ("quick", dict(recipe="paper", policy_coef=2.), (0.45, 2., 1.))])
def test_a_recipe_decides_what_nobody_gave(preset, kw, weights):
    c = from_preset(DistillConfig, DISTILL_PRESETS, preset, **kw)
    assert (c.reward_coef, c.policy_coef, c.pi_coef) == weights
    assert c.value_distill_coef == RECIPES[c.recipe].get("value_distill_coef", 0.) and c.other_coef == 0


def test_a_run_older_than_a_field_had_what_was_done_then(tmp_path):
    "Neither the values that recipe best distils now nor the planner held to the policy are taken for what an old run did."
    run = RunFolder(tmp_path / "run")
    run.write_config({k: v for k, v in vars(config(steps=8)).items() if k not in ("value_distill_coef", "plan", "other_coef")})
    run.check_config(config(steps=8, value_distill_coef=0., plan="published"))
    with pytest.raises(ConfigError, match="value_distill_coef"): run.check_config(config(steps=8, plan="published"))
    with pytest.raises(ConfigError, match="another plan"): run.check_config(config(steps=8, value_distill_coef=0., plan="light"))


def test_unknown_preset():
    with pytest.raises(ConfigError, match="Did you mean 'quick'"): from_preset(DistillConfig, DISTILL_PRESETS, "quik")


def test_teachers_that_lack_a_task(home):
    with pytest.raises(ConfigError, match="No teacher for walker-walk"): load_teachers(home / "teachers").require("walker-walk,cup-catch", "teacher")


def test_absent_and_broken_teachers(home, tmp_path):
    with pytest.raises(ConfigError, match="nothing.pt"): load_teachers(tmp_path / "nothing.pt")
    with pytest.raises(ConfigError, match="no teacher there"): load_teachers(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="bad.json: not valid JSON"): load_teachers(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="a mapping from task names"): load_teachers(tmp_path / "list.json")
    (tmp_path / "map.json").write_text(json.dumps({"cup-catch": "gone.safetensors"}))
    with pytest.raises(ConfigError, match="gone.safetensors"): load_teachers(tmp_path / "map.json")
    (tmp_path / "cut.safetensors").write_bytes((home / "teachers" / "cup-catch.safetensors").read_bytes()[:2000])
    with pytest.raises(ConfigError, match="cut.safetensors"): load_teachers({"cup-catch": tmp_path / "cut.safetensors"})


def test_stores_that_will_not_do(home, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"): check_data(config(data_dir=str(tmp_path / "gone")), task_set(TASKS))
    Store.create(tmp_path / "empty")
    with pytest.raises(ConfigError, match="empty store"): check_data(config(data_dir=str(tmp_path / "empty")), task_set(TASKS))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError): check_data(config(data_dir=str(tmp_path / "folder")), task_set(TASKS))
    with pytest.raises(ConfigError, match="no episodes of walker-walk"): check_data(config(data_dir=str(home / "store")), task_set("walker-walk"))


def test_a_run_folder_is_not_overwritten(home, tmp_path):
    cfg = config(steps=2)
    training(home, tmp_path / "run", cfg)
    with pytest.raises(ConfigError, match="holds a run already"): training(home, tmp_path / "run", cfg)
    with pytest.raises(ConfigError, match="another batch_size"): training(home, tmp_path / "run", config(steps=2, batch_size=8), resume=True)


def test_upstream_chunks_become_a_store(reference, tmp_path):
    chunk = sorted((reference / "chunks").glob("*.pt"))[0]
    (tmp_path / "mt30").mkdir()
    (tmp_path / "mt30" / "chunk_0.pt").symlink_to(chunk)
    cfg = config(data_dir=str(tmp_path / "mt30"))
    store = prepare_store(cfg, None, task_set("walker-stand"), tmp_path / "out", progress=False)
    assert store.num_episodes() == 6 and (tmp_path / "mt30" / "store").is_dir()


def test_teacher_run_goes_on(tmp_path):
    cfg = OnlineConfig(**ONLINE_PRESETS["tiny"])
    first = train_teacher(cfg, tmp_path / "t", progress=False)
    with pytest.raises(ConfigError, match="holds a run already"): train_teacher(cfg, tmp_path / "t", progress=False)
    again = train_teacher(cfg, tmp_path / "t", resume=True, progress=False)  # nothing is left to do
    assert again["updates"] == first["updates"] and again["curve"] == first["curve"]
    assert (tmp_path / "t" / "teacher.safetensors").exists()


def papermill(out, **parameters):
    "run_distill at tiny, by itself."
    from processes import ROOT, run
    import sys
    args = [a for k, v in dict(out_dir=out/"run", **parameters).items() for a in ("-p", k, str(v))]
    run([sys.executable, "-m", "papermill", ROOT/"nbs"/"run_distill.ipynb", out/"out.ipynb", "--cwd", ROOT, "--no-progress-bar", *args], TDMPC_PRESET="tiny").check()
    return json.loads((out/"run"/"report.json").read_text())


def test_plans_are_those_that_were_asked_for(home, tmp_path):
    "Whatever other runs wrote down beside the store, and wherever writing stopped."
    import shutil
    from tdmpc_opt_kit.distill import Supply
    from tdmpc_opt_kit.teachers import annotate
    shutil.copytree(home / "store", tmp_path / "store")
    teachers, specs = load_teachers(home / "teachers"), task_set(TASKS)
    supply = lambda n: Supply(config(plan_coef=1., plan_rows=n, batch_size=4), Store(tmp_path / "store"), teachers, specs, tmp_path, progress=False)
    count = lambda s: len(s.labels.ids)
    annotate(tmp_path / "store", teachers, "plan", "cup-catch", plan_rows=7, progress=False)  # Somebody stopped before the second task
    assert [count(supply(n)) for n in (3, 9, 5)] == [6, 18, 10]


def test_the_published_way(reference, tmp_path):
    "One multi-task teacher from upstream's file, upstream's chunks, no planning at the end."
    import shutil
    (tmp_path/"chunks").mkdir()
    for f in sorted((reference/"chunks").glob("*.pt"))[:1]: shutil.copy(f, tmp_path/"chunks"/f.name)
    from tdmpc_opt_kit.data import convert_chunks
    tasks = ",".join(convert_chunks(tmp_path/"chunks", tmp_path/"looked-at", progress=False).tasks)
    teacher, = (reference/"checkpoints").glob("*fp16.pt")
    report = papermill(tmp_path, teacher=teacher, data_dir=tmp_path/"chunks", tasks=tasks, recipe="paper", eval_planning="none")
    assert report["tasks"] == tasks.split(",") and report["scores"]["student"]["plan"] is None and report["scores"]["student"]["policy"]["mean"] >= 0


def test_all_thirty_tasks_without_planning(reference, tmp_path):
    "The tables beside the published scores, where nobody planned."
    teacher, = (reference/"checkpoints").glob("*fp16.pt")
    report = papermill(tmp_path, teacher=teacher, tasks="mt30", eval_planning="none", eval_every=0, random_episodes=0)
    assert len(report["tasks"]) == 30 and report["scores"]["teacher"]["policy"]["mean"] >= 0


def test_a_notebook_that_goes_on(home, tmp_path):
    "Stopped after four updates and resumed, the notebook logs what it logs in one go."
    lines = {}
    for name, runs in (("whole", [dict(steps=6)]), ("parts", [dict(steps=4), dict(steps=6, resume=True)])):
        (tmp_path/name).mkdir()
        for kw in runs: report = papermill(tmp_path/name, teacher=home/"teachers", data_dir=home/"store", tasks=TASKS, eval_planning="none", **kw)
        rows = [json.loads(l) for l in (tmp_path/name/"run"/"metrics.jsonl").read_text().splitlines()]
        lines[name] = {(r["step"], r["agent"]): r["total_loss"] for r in rows if "total_loss" in r}, report["scores"]["student"]["policy"]["mean"]
    assert lines["whole"] == lines["parts"]


def test_rounds_of_its_own_and_a_task_without_a_teacher(home, tmp_path):
    "The student's own episodes join the data halfway, and a run that crashed behind them goes on as if it had not."
    import shutil
    kw = dict(teacher=home/"teachers", tasks=f"{TASKS},cup-spin", random_episodes=1, dagger_rounds=1, dagger_episodes=1, policy_steps=2, steps=4, eval_planning="none", lr_final=0.5, save_every=100)
    (whole := tmp_path/"whole").mkdir()
    report = papermill(whole, **kw)
    assert report["tasks_without_teacher"] == ["cup-spin"] and report["dagger"] == dict(rounds=1, episodes=1, share=0.5)
    assert set(report["scores"]["teacher"]["policy"]["returns"]) == set(TASKS.split(",")) and len(report["scores"]["student"]["policy"]["returns"]) == 3
    assert (report["train"]["steps"], report["train"]["policy_steps"]) == (4, 2) and "2 updates of encoder and policy alone, then 4 updates" in (whole/"run"/"student.md").read_text()
    scored = [(r["step"], r["agent"]) for l in (whole/"run"/"metrics.jsonl").read_text().splitlines() if "score" in (r := json.loads(l))]
    assert scored == [(k, a) for k in (0, 3, 6) for a in ("student", "scratch")]  # At 3 both have learned
    own = Store(whole/"run"/"rounds"/"1")
    assert [o["name"] for o in own.origins] == ["student, round 1"] and set(own.tasks) == {s.name for s in task_set(kw["tasks"])}
    shutil.copytree(whole/"run", (crashed := tmp_path/"crashed")/"run", symlinks=True)
    shutil.rmtree(crashed/"run"/"checkpoints"/"6")  # The one left is of the update at which the round was played, and from before it
    (crashed/"run"/"report.json").unlink()
    again = papermill(crashed, resume=True, **kw)
    lines = [[{k: v for k, v in json.loads(l).items() if k != "updates_per_second"} for l in (p/"run"/"metrics.jsonl").read_text().splitlines()] for p in (whole, crashed)]
    assert lines[0] == lines[1] and again["scores"]["student"] | dict(policy=0) == report["scores"]["student"] | dict(policy=0)
