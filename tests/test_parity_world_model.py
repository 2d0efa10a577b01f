"""The world model against TD-MPC2's own outputs: a published student in both layouts, and every size with weights filled by a rule."""
import json, warnings

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.checkpoint import LAYOUTS, load_world_model, save_upstream
from tdmpc_opt_kit.tasks import OBS_DIMS, action_mask
from tdmpc_opt_kit.twohot import from_two_hot

TOLERANCE = 1e-4  # Of each array's largest absolute value
STUDENTS = ("mt30_1M_steps_045dist_fp16.pt", "mt30_1M_steps_045dist_fp16_2025layout.pt")
SIZES = ("1M", "5M", "19M", "48M", pytest.param("317M", marks=pytest.mark.slow))


def arrays(path):
    with np.load(path) as f: return {k: torch.from_numpy(f[k]) for k in f.files}


def differences(ours, theirs):
    "Name -> largest difference relative to the reference's largest value; shapes must agree."
    assert {k: v.shape for k, v in ours.items()} == {k: theirs[k].shape for k in ours}
    return {k: float((v - theirs[k]).abs().max() / theirs[k].abs().max()) for k, v in ours.items()}


def agree(ours, theirs, record_property):
    diff = differences(ours, theirs)
    record_property("largest relative difference", max(diff.values()))
    print({k: f"{v:.1e}" for k, v in diff.items()})
    assert max(diff.values()) < TOLERANCE, {k: v for k, v in diff.items() if v >= TOLERANCE}


# ---- The published student ---------------------------------------------------------------------

@torch.no_grad()
def outputs(model, g):
    "Everything that world_model_outputs.npz holds."
    obs, action, task = g["obs"][0], g["action"], g["task"]
    z = [model.encode(obs, task)]
    for a in action: z.append(model.next(z[-1], a, task))
    reward, q, target = model.reward(z[0], action[0], task), model.Q(z[0], action[0], task), model.Q(z[0], action[0], task, target=True)
    pi = model.pi(z[0], task, noise=g["pi_noise"])
    return dict(z0=z[0], z_rollout=torch.stack(z), reward_logits=reward, reward_pred=from_two_hot(reward), q_logits=q, q_values=from_two_hot(q),
                target_q_values=from_two_hot(target), pi_mean=pi.mean, pi_log_std=pi.log_std, pi_sample=pi.action, pi_log_prob=pi.log_prob)


@pytest.fixture(scope="module")
def golden(reference): return arrays(reference / "golden" / "world_model_outputs.npz")


@pytest.mark.parametrize("name", STUDENTS)
def test_published_student(reference, golden, name, record_property):
    ours = outputs(load_world_model(reference / "checkpoints" / name), golden)
    assert set(ours) == set(golden) - {"obs", "action", "reward", "task", "pi_noise"}
    agree(ours, golden, record_property)


def test_both_layouts_hold_the_same_weights(reference):
    a, b = (load_world_model(reference / "checkpoints" / name).state_dict() for name in STUDENTS)
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_upstream_files_are_theirs(reference, tmp_path, layout):
    "What we write in a layout has the entries, types and values of the reference's file in it."
    path = reference / "checkpoints" / STUDENTS[LAYOUTS.index(layout)]
    save_upstream(load_world_model(path), tmp_path / "ours.pt", layout, torch.float16)
    ours, theirs = (torch.load(p, map_location="cpu", weights_only=True)["model"] for p in (tmp_path / "ours.pt", path))
    assert set(ours) == set(theirs)
    for k, v in theirs.items():
        if isinstance(v, torch.Tensor): assert v.dtype == ours[k].dtype and torch.equal(v, ours[k]), k
        else: assert v == ours[k], k


@pytest.mark.parametrize("name", ["mt30_1M_steps_045dist_int8.pt", "mt30_1M_steps_045dist_mixed.pt"])
def test_published_quantized_files_are_zero_and_say_so(reference, name):
    path = reference / "checkpoints" / name
    with pytest.warns(UserWarning, match="int8 weights are zero, because it was quantized with one scale of 1.0 for every tensor") as caught: model = load_world_model(path)
    assert len(caught) == 1 and str(path) in str(caught[0].message) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        assert torch.equal(model.q_heads[1].weight, state["_Qs.params.4"].dequantize())
    assert model.num_params == 1_426_427 and all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", STUDENTS)
def test_no_warnings_from_sound_files(reference, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_world_model(reference / "checkpoints" / name)


def test_loading_leaves_the_random_state_alone(reference):
    before = torch.get_rng_state()
    load_world_model(reference / "checkpoints" / STUDENTS[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.cuda
@pytest.mark.parametrize("name", STUDENTS)
def test_published_student_on_gpu(reference, golden, name, record_property):
    model = load_world_model(reference / "checkpoints" / name, device="cuda")
    assert all(t.device.type == "cuda" for t in [*model.parameters(), *model.buffers()])
    ours = outputs(model, {k: v.cuda() for k, v in golden.items()})
    agree({k: v.cpu() for k, v in ours.items()}, golden, record_property)


# ---- Every size, with weights filled by a rule -------------------------------------------------

def filled(keys):
    "State dict of a layout: tensor i is 0.05 sin(0.7 j + 0.1 i), plus 1 for LayerNorm weights."
    state = {}
    for i, (name, shape, dtype) in enumerate(keys):
        n = int(np.prod(shape))
        out = torch.empty(n, dtype=torch.float32)
        for a in range(0, n, 1 << 22):  # In float64, a piece at a time: the largest tensor has 134 million entries
            j = torch.arange(a, min(n, a + (1 << 22)), dtype=torch.float64)
            out[a:a + len(j)] = j.mul_(0.7).add_(0.1 * i).sin_().mul_(0.05)
        stacked = name.rsplit(".", 1)[-1].isdigit() and len(shape) == 2 and int(name.rsplit(".", 1)[-1]) % 4 == 2
        if name.endswith("ln.weight") or stacked: out += 1
        state[name] = out.reshape(shape).to(getattr(torch, dtype.removeprefix("torch.")))
    return state


def model_of(layout, path, tasks=None):
    "Written as an upstream file and read like one; the file is removed."
    torch.save({"model": filled(layout["keys"])}, path)
    try: model = load_world_model(path, tasks=tasks)
    finally: path.unlink()
    assert model.num_params == layout["learnable_params"]
    assert sum(v.numel() for v in model.state_dict().values()) == sum(int(np.prod(s)) for _, s, _ in layout["keys"])
    return model


@torch.no_grad()
def layout_outputs(model, obs, action, task):
    z = model.encode(obs, task)
    return dict(z=z, z_next=model.next(z, action, task), reward=from_two_hot(model.reward(z, action, task)), q=from_two_hot(model.Q(z, action, task)),
                pi_mean=model.pi(z, task).mean)


@pytest.fixture(scope="module")
def layouts(reference): return json.loads((reference / "golden" / "checkpoint_layouts.json").read_text())


@pytest.mark.parametrize("size", SIZES)
def test_size(reference, layouts, size, tmp_path, record_property):
    theirs = arrays(reference / "golden" / f"layout_outputs_{size}.npz")
    model = model_of(layouts[size], tmp_path / f"{size}.pt")
    assert model.cfg.size == size and len(model.tasks) == 30
    task = torch.arange(30)
    obs = torch.from_numpy((0.5 * np.sin(0.31 * np.arange(30 * 24))).reshape(30, 24) * (np.arange(24) < OBS_DIMS[:, None])).float()
    action = torch.from_numpy(np.cos(0.17 * np.arange(30 * 6)).reshape(30, 6) * action_mask(task.numpy())).float()
    agree(layout_outputs(model, obs, action, task), theirs, record_property)


def test_single_tasks(reference, layouts, tmp_path, record_property):
    "Models of one task at its own widths, nameless and named."
    files = sorted((reference / "golden").glob("layout_outputs_5M_single_*.npz"))
    assert {f.stem.removeprefix("layout_outputs_5M_single_") for f in files} == set(layouts["5M_single_task"])
    worst = {}
    for file in files:
        name, theirs = file.stem.removeprefix("layout_outputs_5M_single_"), arrays(file)
        for tasks in (None, name):
            model = model_of(layouts["5M_single_task"][name], tmp_path / f"{name}.pt", tasks)
            assert model.tasks == (None if tasks is None else (name,)) and model.cfg.size == "5M" and model.task_emb is None
            assert (model.cfg.obs_dim, model.cfg.action_dim) == (theirs["obs"].shape[-1], theirs["action"].shape[-1])
            ours = layout_outputs(model, theirs["obs"], theirs["action"], torch.zeros(len(theirs["obs"]), dtype=torch.long))
            worst[name] = max(differences(ours, theirs).values())
    record_property("largest relative difference", worst)
    print(worst)
    assert max(worst.values()) < TOLERANCE
