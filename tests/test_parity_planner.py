"""The planner against TD-MPC2's plans of the published 1M student, task by task and all at once."""
import copy

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.checkpoint import load_world_model
from tdmpc_opt_kit.planner import PlanConfig, PlanNoise, PlanState, plan
from tdmpc_opt_kit.tasks import MT30

FIRST, CLOSE, ENOUGH, FAR = 1e-4, 1e-3, 20, 0.2  # what spec/td_mpc2.md asks for


@pytest.fixture(scope="module")
def model(reference):
    path, = (reference / "checkpoints").glob("*fp16.pt")
    return load_world_model(path).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden(reference):
    with np.load(reference / "golden" / "planner.npz") as file: arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    out = {}
    for k, v in arrays.items(): out.setdefault(k.split("/")[0], {})[k.split("/")[1]] = v
    assert set(out) == {t.name for t in MT30}
    return [out[t.name] for t in MT30]


def generator(g):
    "A generator in the state in which the reference plan drew its noise."
    gen = torch.Generator().manual_seed(int(g["noise_seed"]))
    torch.rand(g["prev_mean"].shape, generator=gen)
    return gen


@pytest.fixture(scope="module")
def noise(golden):
    "Noise of all thirty plans: drawn as spec/file_formats.md says, or as given."
    out = []
    for g in golden:
        gen, cfg = generator(g), PlanConfig()
        H, N, P, I, A = cfg.horizon, cfg.num_samples, cfg.num_pi_trajs, cfg.iterations, g["prev_mean"].shape[-1]
        drawn = [torch.randn(*s, generator=gen) for s in ((H, P, A), (I, H, N - P, A), (I, N, A))]
        given = [g.get(f"noise_{k}") for k in ("pi", "samples", "value")]
        for d, x in zip(drawn, given):
            if x is not None: torch.testing.assert_close(d, x)
        out.append([d if x is None else x for d, x in zip(drawn, given)])
    return PlanNoise(*(torch.stack(n) for n in zip(*out)))


def check(golden, state, info):
    far = []
    for g, values, mean in zip(golden, info.values[:, 0], state.mean):
        assert (values - g["values_first"].flatten()).abs().max() <= FIRST * g["values_first"].abs().max()
        far.append(float((mean - g["mean"]).abs().max()))
    assert sum(f <= CLOSE for f in far) >= ENOUGH and max(far) <= FAR, f"largest difference of the new mean by task: {far}"


def inputs(golden):
    "Observations, tasks and warm starts of all thirty plans."
    return torch.stack([g["obs"].flatten() for g in golden]), torch.arange(len(golden)), PlanState(torch.stack([g["prev_mean"] for g in golden]))


def test_one_by_one(model, golden):
    "Each task alone, with noise drawn by the planner itself."
    obs, task, state = inputs(golden)
    plans = [plan(model, obs[i:i + 1], task[i:i + 1], PlanState(state.mean[i:i + 1]), generator=generator(g)) for i, g in enumerate(golden)]
    means, info = torch.cat([s.mean for _, s, _ in plans]), [i for _, _, i in plans]
    values, best, weights = (torch.cat([getattr(i, k) for i in info]) for k in ("values", "best_action", "elite_weights"))
    check(golden, PlanState(means), info[0]._replace(values=values))
    close = [(m - g["mean"]).abs().max() <= CLOSE for m, g in zip(means, golden)]
    for ok, b, w, g in zip(close, best, weights, golden):
        if ok: torch.testing.assert_close(w, g["elite_p"].flatten(), rtol=0, atol=1e-3)
    same = [(b - g["action"].flatten()).abs().max() <= CLOSE for b, g in zip(best, golden)]
    assert sum(same) >= ENOUGH


def test_all_at_once(model, golden, noise):
    "A batch of different tasks in any order, each with its own warm start, equals the single plans."
    obs, task, state = inputs(golden)
    p = torch.randperm(len(golden), generator=torch.Generator().manual_seed(0))
    shuffled = PlanNoise(*(t[p] for t in noise[:3]))
    action, new, info = plan(model, obs[p], task[p], PlanState(state.mean[p]), noise=shuffled)
    check([golden[i] for i in p], new, info)
    mask = model.mask(task[p])
    assert (action[mask == 0] == 0).all() and (action.abs() <= 1).all()


def test_float64(model, golden, noise):
    "In float64 the planner takes other code paths; the values are the same."
    rows = torch.tensor([0, 7, 12, 29])
    obs, task, state = inputs(golden)
    _, _, info = plan(copy.deepcopy(model).double(), obs[rows], task[rows], PlanState(state.mean[rows].double()), PlanConfig(iterations=1),
                      noise=PlanNoise(*(t[rows] for t in noise[:3])))
    for i, values in zip(rows, info.values[:, 0]):
        ref = golden[i]["values_first"].flatten()
        assert (values - ref).abs().max() <= FIRST * ref.abs().max()


@pytest.mark.cuda
def test_cuda(model, golden, noise):
    obs, task, state = inputs(golden)
    on_gpu = copy.deepcopy(model).cuda()
    action, new, info = plan(on_gpu, obs.cuda(), task.cuda(), PlanState(state.mean.cuda()), noise=noise)
    check(golden, PlanState(new.mean.cpu()), info._replace(values=info.values.cpu()))
    a, *_ = plan(on_gpu, obs.cuda(), task.cuda(), None, generator=torch.Generator().manual_seed(0))  # a CPU generator serves a GPU
    b, *_ = plan(model, obs, task, None, generator=torch.Generator().manual_seed(0))
    assert ((a.cpu() - b).abs().amax(1) < 1e-2).sum() >= ENOUGH
