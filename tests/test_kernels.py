"""The compiled kernels: the same results with PyTorch's threads, with their own, and without kernels at all."""
import ctypes
import os
import sys

import pytest
import torch

from processes import ROOT, run
from tdmpc_opt_kit.kernels import I8, _openmp, kernels
from tdmpc_opt_kit.planner import PlanConfig, draw_noise, packed, plan
from tdmpc_opt_kit.train import Learner, TrainConfig
from tdmpc_opt_kit.data import Batch
from tdmpc_opt_kit.world_model import WorldModel, model_size

needs_kernels = pytest.mark.skipif(kernels() is None and os.environ.get("CI") != "true", reason="there is no C++ compiler")


def model(size="tiny", tasks="mt30", **kw):
    torch.manual_seed(0)
    m = WorldModel(model_size(size, **kw), tasks).eval()
    for head in (m.reward_head[-1], m.q_heads[-1]): torch.nn.init.normal_(head.weight, std=0.1)
    return m


def planned(m, threads, n=5):
    cfg, before = PlanConfig(num_samples=70, num_elites=8, num_pi_trajs=9, iterations=3), torch.get_num_threads()
    torch.set_num_threads(threads)
    try: return plan(m, torch.randn(n, m.cfg.obs_dim, generator=torch.Generator().manual_seed(0)), torch.arange(n) % len(m.action_mask), None, cfg, torch.Generator().manual_seed(0))[2].values
    finally: torch.set_num_threads(before)


def updated(threads, precision):
    m, before = model(), torch.get_num_threads()
    m.requires_grad_(True), m.target_q_heads.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(4, 33, 24, generator=g), torch.rand(3, 33, 6, generator=g), torch.rand(3, 33, 1, generator=g), torch.randint(30, (33,), generator=g), None)
    torch.set_num_threads(threads)
    try:
        learner = Learner(m, TrainConfig(precision=precision, dropout=0.2))
        for _ in range(3): learner.update(batch)
    finally: torch.set_num_threads(before)
    return m.state_dict()


@needs_kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_threads_change_nothing(precision):
    "One thread, PyTorch's threads, and the kernels' own pool: the same plans and updates, bit by bit."
    lib, openmp = kernels().lib, _openmp()
    ways = [(1, True), (2, True), (3, True), (2, False), (3, False)]
    plans, updates = [], []
    try:
        for threads, shared in ways:
            lib.use_openmp(ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p) if shared and openmp else None)
            plans.append(planned(model(), threads)); updates.append(updated(threads, precision))
    finally: lib.use_openmp(ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p) if openmp else None)
    for p in plans[1:]: assert torch.equal(p, plans[0])
    for a, b in ((1, 3), (2, 4)):  # PyTorch's own sums, of losses, do depend on the number of threads
        for k, v in updates[a].items(): assert torch.equal(v, updates[b][k]), k


@needs_kernels
@pytest.mark.parametrize("widths", [dict(obs_dim=5, action_dim=1, task_dim=0), dict(obs_dim=17, action_dim=6, task_dim=0, mlp_dim=48, enc_dim=80, latent_dim=16, num_q=5)])
def test_odd_widths(widths):
    "A plan of a single-task model by the kernels and by PyTorch."
    m = model(tasks=None, **widths)
    from tdmpc_opt_kit.benchmark import PlainModel
    cfg, obs, zero = PlanConfig(num_samples=40, num_elites=8, num_pi_trajs=0, iterations=2), torch.randn(3, m.cfg.obs_dim), torch.zeros(3, dtype=torch.int64)
    noise = draw_noise(cfg, 3, m.cfg.action_dim, torch.Generator().manual_seed(0))._replace(heads=[[0, 1], [1, 0]])
    a, b = (plan(x, obs, zero, None, cfg, torch.Generator().manual_seed(1), noise=noise)[2].values for x in (m, PlainModel(m)))
    torch.testing.assert_close(a[:, 0], b[:, 0], rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("K", [7, 33, 134])
def test_eight_bit_products_are_exact(K):
    "Rounded as described and then multiplied in float64: what integers give, to the last bits of a float32."
    g, N, rows = torch.Generator().manual_seed(K), 50, 9
    x, w, least = torch.rand(rows, K, generator=g) * 3 - 0.3, torch.randn(N, K, generator=g), -0.3088426
    y, b = torch.zeros(rows, -(-N // (2 * kernels().lanes)) * 2 * kernels().lanes), torch.randn(N, generator=g)
    kernels().lib.linear(I8, 1, 0, rows, K, N, x.data_ptr(), w.data_ptr(), b.data_ptr(), y.data_ptr(), 1)  # Inputs behind a Mish
    scale, ws = (x.amax(1, keepdim=True) - least) / 255, w.abs().amax(1, keepdim=True) / 127
    seen, weight = ((x - least) / scale).round() * scale + least, (w / ws).round() * ws
    torch.testing.assert_close(y[:, :N], (seen.double() @ weight.double().T + b).float(), rtol=1e-4, atol=2e-2 * float(scale.max()))


@needs_kernels
@pytest.mark.parametrize("without", ["-mno-avx512vnni", "-mno-avx512f"])
def test_eight_bits_without_instructions_for_them(without, tmp_path):
    "The same as an older processor gets it."
    code = "import pytest, sys; sys.exit(pytest.main(['-q', '-k', 'eight_bit_products', 'tests/test_kernels.py']))"
    out = run([sys.executable, "-c", code], CXX=f"g++ {without}", XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=str(ROOT)).check()
    assert "3 passed" in out


@needs_kernels
def test_nan_is_not_hidden_by_integers():
    m = model()
    with torch.no_grad(): m.dynamics[1].weight[3, 4] = float("nan")
    obs, task = torch.randn(2, 24), torch.tensor([1, 2])
    for precision in ("float32", "bfloat16", "mixed", "int8"):
        values = plan(m, obs, task, None, PlanConfig(num_samples=40, num_elites=8, num_pi_trajs=4, iterations=1, precision=precision), torch.Generator().manual_seed(0))[2].values
        assert (values == 0).all(), precision  # as the planner treats NaN


@needs_kernels
def test_many_tasks_are_checked():
    m = model()
    for bad in (30, -1, 10**8):
        with pytest.raises(IndexError): m.encode(torch.randn(1, 24), torch.tensor([bad]))
        with pytest.raises(IndexError): packed(m).ask(torch.randn(1, 24), torch.tensor([bad]))


def test_without_kernels():
    "Parity with the reference, and notebooks' examples of agents, where nothing is compiled."
    tests = [ROOT/"tests"/f"test_{n}.py" for n in ("parity_planner", "parity_update", "agent")]
    out = run([sys.executable, "-m", "pytest", "-q", *tests], TDMPC_KERNELS="off").check()
    assert " passed" in out and "failed" not in out


def test_without_a_compiler(tmp_path):
    code = "import warnings; warnings.simplefilter('error', UserWarning)\nfrom tdmpc_opt_kit.kernels import kernels\ntry: kernels()\nexcept UserWarning as e: print(e)"
    out = run([sys.executable, "-c", code], CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path)).check()
    assert "install g++" in out and "PyTorch alone" in out
