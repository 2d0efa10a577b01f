"""Checkpoints: round trips, every file that must be refused, and run folders that survive being killed."""
import io, json, os, pickle, random, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tdmpc_opt_kit.checkpoint import LAYOUTS, RunFolder, kit_name, load_world_model, read_card, save_upstream, save_world_model, to_upstream, write_safetensors
from tdmpc_opt_kit.config import ConfigError
from tdmpc_opt_kit.tasks import MT30
from tdmpc_opt_kit.world_model import SIZES, ModelConfig, WorldModel, model_size


def make(cfg="tiny", tasks="mt30", seed=0):
    "A model with random weights everywhere."
    torch.manual_seed(seed)
    model = WorldModel(model_size(cfg), tasks).eval()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.1)
    return model


def same(a, b):
    sa, sb = a.state_dict(), b.state_dict()
    return list(sa) == list(sb) and all(torch.equal(sa[k], sb[k]) and sa[k].dtype == sb[k].dtype for k in sa)


def refused(path, *contains, **kw):
    "Refused at once, with the file's name and the words given; returns the message."
    start = time.monotonic()
    with pytest.raises(ConfigError) as e: load_world_model(path, **kw)
    message = str(e.value)
    assert time.monotonic() - start < 5 and str(path) in message and "\n" not in message, message
    for words in contains: assert words in message, message
    return message


# ---- The kit's own format ----------------------------------------------------------------------

@pytest.mark.parametrize("size", ["tiny", "0.2M", "1M"])
@pytest.mark.parametrize("tasks", ["mt30", "walker-walk", "cup-catch,walker-run", None])
def test_own_format_round_trip(tmp_path, size, tasks):
    model = make(size, tasks)
    path = save_world_model(model, tmp_path / "m.safetensors", origin="a test", metrics={"score": 1.5})
    back = load_world_model(path)
    assert same(back, model) and back.cfg == model.cfg and back.tasks == model.tasks and not back.training
    assert torch.equal(back.action_mask, model.action_mask)
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
    card = read_card(path)
    assert (card["model"]["size"], card["tasks"], card["dtype"], card["num_params"], card["origin"], card["metrics"]) == (
        size, model.tasks and list(model.tasks), "float32", model.num_params, "a test", {"score": 1.5})


def test_single_task_without_embedding(tmp_path):
    model = make(model_size("tiny", task_dim=0, obs_dim=3, action_dim=1), "pendulum-swingup")
    back = load_world_model(save_world_model(model, tmp_path / "m.safetensors"))
    assert same(back, model) and back.tasks == ("pendulum-swingup",) and back.cfg.obs_dim == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "float16"])
def test_stored_dtypes(tmp_path, dtype):
    model, path = make(), tmp_path / "m.safetensors"
    save_world_model(model, path, dtype)
    d = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    back, own = load_world_model(path), load_world_model(path, dtype=d)
    for (k, v), w, o in zip(back.state_dict().items(), own.state_dict().values(), model.state_dict().values()):
        assert v.dtype == torch.float32 and torch.equal(v, o.to(d).float()), k
        assert w.dtype == d and torch.equal(w, o.to(d)), k
    assert own.action_mask.dtype == d and read_card(path)["dtype"] == str(d)[6:]


def test_a_half_precision_model_acts(tmp_path):
    model = load_world_model(save_world_model(make(), tmp_path / "m.safetensors"), dtype=torch.bfloat16)
    task = torch.arange(30)
    assert model.pi(model.encode(torch.zeros(30, 24, dtype=torch.bfloat16), task), task).action.isfinite().all()


def test_bytes_are_a_function_of_the_arguments(tmp_path):
    a, b = (save_world_model(make(), tmp_path / n, torch.float16, metrics={"b": 1, "a": 2}) for n in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_without_target_heads(tmp_path):
    model = make()
    whole, small = save_world_model(model, tmp_path / "a.safetensors"), save_world_model(model, tmp_path / "b.safetensors", include_target=False)
    back = load_world_model(small)
    assert small.stat().st_size < whole.stat().st_size
    for p, q in zip(back.target_q_heads.parameters(), back.q_heads.parameters()):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr() and not p.requires_grad and q.requires_grad
    assert torch.equal(back.q_heads[0].weight, model.q_heads[0].weight)


def test_a_loaded_model_trains(tmp_path):
    "Parameters own their memory: training does not touch the file, and the file may go."
    path = save_world_model(make(), tmp_path / "m.safetensors")
    before, model = path.read_bytes(), load_world_model(path)
    opt, task = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), torch.arange(30)
    for _ in range(2):
        z = model.encode(torch.randn(30, 24), task)
        loss = model.Q(z, torch.rand(30, 6), task).square().mean() + model.pi_params(z, task)[0].square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert path.read_bytes() == before
    path.unlink()
    assert all(p.isfinite().all() for p in model.parameters())
    model.train().update_target()


def test_folders(tmp_path):
    model = make()
    save_world_model(model, tmp_path / "model.safetensors")
    assert same(load_world_model(tmp_path), model)
    (tmp_path / "sub").mkdir()
    assert save_world_model(model, tmp_path / "sub") == tmp_path / "sub" / "model.safetensors"
    refused(tmp_path / "..", "a folder without model.safetensors")


def test_any_suffix(tmp_path):
    "The content decides."
    model = make()
    save_world_model(model, tmp_path / "own.pt")
    save_upstream(model, tmp_path / "upstream.safetensors")
    assert same(load_world_model(tmp_path / "own.pt"), model) and same(load_world_model(str(tmp_path / "upstream.safetensors")), model)


@pytest.mark.parametrize("low", [0x80, 0x50])
def test_a_header_length_that_looks_like_a_pickle(tmp_path, low):
    "The first byte of a safetensors file is that of its header's length, and 0x80 begins every pickle."
    model = make()
    for n in range(0, 300, 8):
        path = save_world_model(model, tmp_path / "m", origin="x" * n)
        if path.read_bytes()[0] == low: break
    assert path.read_bytes()[0] == low and same(load_world_model(path), model)


def test_safetensors_reads_what_we_write(tmp_path):
    model = make()
    with safe_open(save_world_model(model, tmp_path / "m"), "pt") as f:
        assert sorted(f.keys()) == sorted(model.state_dict())
        assert all(torch.equal(f.get_tensor(k), v) for k, v in model.state_dict().items())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = save_world_model(make(), tmp_path / "m.safetensors")
    before, bad = path.read_bytes(), make()
    with torch.no_grad(): bad.reward_head[0].weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match="cannot store .*'reward_head.0.weight' holds NaN or infinite"): save_world_model(bad, path)
    with torch.no_grad(): bad.reward_head[0].weight[0, 0] = 1e6
    with pytest.raises(ConfigError, match="beyond the range of float16"): save_world_model(bad, path, torch.float16)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.safetensors"]


def test_weights_beyond_the_asked_range(tmp_path):
    model = make()
    with torch.no_grad(): model.pi_head[2].bias[0] = 1e6
    refused(save_world_model(model, tmp_path / "m"), "'pi_head.2.bias' has weights beyond the range of float16; use float32", dtype=torch.float16)


# ---- Upstream's layouts ------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_upstream_round_trip(tmp_path, layout, zipped):
    model, path = make(), tmp_path / "m.pt"
    torch.save({"model": to_upstream(model, layout)}, path, _use_new_zipfile_serialization=zipped)
    back = load_world_model(path)
    assert same(back, model) and back.cfg == model.cfg and back.tasks == tuple(t.name for t in MT30)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_single_task(tmp_path, layout):
    model = make(model_size("tiny", task_dim=0, obs_dim=3, action_dim=1), None)
    path = save_upstream(model, tmp_path / "m.pt", layout)
    nameless, named = load_world_model(path), load_world_model(path, tasks="pendulum-swingup")
    assert nameless.tasks is None and named.tasks == ("pendulum-swingup",) and same(nameless, model) and same(named, model)
    assert read_card(path)["tasks"] is None and "_action_masks" not in to_upstream(model, layout)
    refused(path, "it takes 3 observations and 1 actions; walker-walk has 24 and 6", tasks="walker-walk")
    refused(path, "a model of 1 task, and tasks names 30", tasks="mt30")


def test_newer_tensordict(tmp_path):
    "No entries of the container, and left-overs without data."
    model = make()
    state = {k: v for k, v in to_upstream(model, "2025").items() if "__" not in k}
    for stem in ("_Qs", "_detach_Qs", "_target_Qs"):
        state[f"{stem}.module.0.weight"] = torch.empty(3, 3, device="meta")
        state[f"{stem}.module.0.ln.bias"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "m.pt")
    assert same(load_world_model(tmp_path / "m.pt"), model)


def test_without_duplicates_and_constants(tmp_path):
    model = make()
    state = {k: v for k, v in to_upstream(model, "2025").items() if kit_name(k) is not None}
    torch.save(state, tmp_path / "bare.pt")  # and without {"model": ...}
    assert same(load_world_model(tmp_path / "bare.pt"), model)


def test_other_entries_beside_the_model(tmp_path):
    model = make()
    torch.save({"model": to_upstream(model), "optim": {"state": {0: torch.ones(3)}}, "step": 10}, tmp_path / "m.pt")
    assert same(load_world_model(tmp_path / "m.pt"), model)


def test_our_own_state_dict(tmp_path):
    model = make()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert same(load_world_model(tmp_path / "m.pt"), model)


def test_tasks_of_another_number(tmp_path):
    names = ["walker-walk", "cup-catch", "hopper-hop"]
    model = make("tiny", names)
    path = save_upstream(model, tmp_path / "m.pt", "2025")
    refused(path, "its task embedding has 3 rows; 30 would be MT30", "tasks=[...]")
    back = load_world_model(path, tasks=names)
    assert same(back, model) and back.tasks == tuple(names) and torch.equal(back.action_mask, model.action_mask)
    refused(path, "a model of 3 tasks, and tasks names 2", tasks=names[:2])
    refused(path, "_action_masks is not what this model uses", "another order", tasks=names[::-1])
    with pytest.raises(ConfigError, match="Did you mean 'walker-walk'"): load_world_model(path, tasks=["walker-wlak", *names[1:]])


@pytest.mark.parametrize("n", [1, 80])
def test_rows_that_are_not_mt30(tmp_path, n):
    state = to_upstream(make())
    state["_task_emb.weight"] = torch.zeros(n, 8)
    torch.save({"model": state}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", f"its task embedding has {n} row{'s' * (n > 1)}; 30 would be MT30")


def test_wider_observations(tmp_path):
    "Widths follow the file, for example those of TD-MPC2's 80 tasks."
    model = make(model_size("tiny", obs_dim=39))
    back = load_world_model(save_upstream(model, tmp_path / "m.pt"))
    assert back.cfg.obs_dim == 39 and back.cfg.size == "tiny" and same(back, model)


def test_custom_sizes(tmp_path):
    for cfg in (ModelConfig("custom", 48, 40, 24, 4, 3, 8), ModelConfig("custom", 24, 24, 24, 2, 1, 24), ModelConfig("custom", 8, 16, 8, 3, 7, 1)):
        model = make(cfg)
        back = load_world_model(save_upstream(model, tmp_path / "m.pt"))
        assert same(back, model) and back.cfg == cfg
    one = make(ModelConfig("custom", 24, 24, 24, 1, 1, 8))  # one encoder layer has the tensors of two
    assert same(load_world_model(save_upstream(one, tmp_path / "m.pt")), one)


def quantized(state, scale, **other):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {k: torch.quantize_per_tensor(v, other.get(k, scale), 0, torch.qint8) for k, v in state.items()}


def test_int8(tmp_path):
    model, path = make(), tmp_path / "m.pt"
    torch.save({"model": quantized(to_upstream(model), 0.004)}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = load_world_model(path)
    for (k, v), w in zip(back.state_dict().items(), model.state_dict().values()): assert (v - w.clamp(-0.512, 0.508)).abs().max() <= 0.0021, k
    torch.save({"model": quantized(to_upstream(model), 1.0)}, path)
    with pytest.warns(UserWarning, match="100% of its int8 weights are zero.*one scale of 1.0 for every tensor"): load_world_model(path)
    torch.save({"model": quantized(to_upstream(model), 1.0, **{"_pi.0.weight": 2.0})}, path)
    with pytest.warns(UserWarning, match="scales of 1 to 2 "): load_world_model(path)
    assert read_card(path)["dtype"] == "qint8"


def test_int8_by_channel(tmp_path):
    model, state = make(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {k: torch.quantize_per_channel(v, torch.full((len(v),), 0.004), torch.zeros(len(v)), 0, torch.qint8) for k, v in to_upstream(model).items()}
    torch.save({"model": state}, tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(load_world_model(tmp_path / "m.pt").q_heads[1].weight, model.q_heads[1].weight, atol=0.0021)


def test_tensors_of_another_device(tmp_path):
    "Three of the published files hold CUDA tensors; a machine without a GPU reads them."
    path, model = tmp_path / "m.pt", make()
    save_upstream(model, path)
    import zipfile
    with zipfile.ZipFile(path) as z: parts = {i.filename: z.read(i) for i in z.infolist()}
    pkl = next(n for n in parts if n.endswith("data.pkl"))
    assert b"X\x03\x00\x00\x00cpu" in parts[pkl]
    parts[pkl] = parts[pkl].replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    with zipfile.ZipFile(path, "w") as z:
        for name, data in parts.items(): z.writestr(name, data)
    back = load_world_model(path)
    assert same(back, model) and all(p.device.type == "cpu" for p in back.parameters())


@pytest.mark.cuda
def test_onto_the_gpu(tmp_path):
    model = make()
    for path in (save_world_model(model, tmp_path / "m.safetensors"), save_upstream(model, tmp_path / "m.pt")):
        back = load_world_model(path, device="auto")
        assert all(t.device.type == "cuda" for t in [*back.parameters(), *back.buffers()]) and same(back.cpu(), model)
    assert same(load_world_model(save_world_model(model.cuda(), tmp_path / "g.safetensors")), model.cpu())


# ---- What is refused ---------------------------------------------------------------------------

def test_absent_empty_folder(tmp_path):
    refused(tmp_path / "no.pt", "there is no such file")
    (tmp_path / "empty.pt").touch()
    refused(tmp_path / "empty.pt", "the file is empty")
    refused(tmp_path, "a folder without model.safetensors")
    (tmp_path / "model.safetensors").symlink_to("gone")
    refused(tmp_path, "a folder without model.safetensors")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")


@pytest.mark.parametrize("content", [b"{\"model\": {}}\n", b"hello world, these are my weights\n" * 100, b"<!DOCTYPE html><html></html>", b"\x00" * 5000, b"\xff" * 20, b"{", b"\n",
    b"cos\nsystem\n(S'touch owned'\ntR.", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", random.Random(0).randbytes(4096)])
def test_other_files(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt", "not a checkpoint")
    assert os.listdir(tmp_path) == ["m.pt"]


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(tmp_path / "m.safetensors", "git lfs pull")


def test_archives_that_are_not_checkpoints(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    refused(tmp_path / "a.npz", "a.npz: ")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "script.pt: ")


@pytest.mark.parametrize("kind", ["own", "zip", "legacy"])
def test_truncated(tmp_path, kind):
    model, path = make(), tmp_path / "m"
    if kind == "own": save_world_model(model, path)
    else: torch.save({"model": to_upstream(model)}, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    for n in [1, 2, 7, 8, 9, 12, 100, 1000, len(data) // 3, len(data) // 2, len(data) - 1000, len(data) - 9, len(data) - 1]:
        path.write_bytes(data[:n])
        assert "truncated or damaged" in refused(path) or n < 12, n


@pytest.mark.parametrize("kind", ["own", "zip", "legacy"])
def test_damaged(tmp_path, kind):
    "Bytes overwritten anywhere: loaded or refused, never another exception, never a crash."
    model, path, rng = make(), tmp_path / "m", random.Random(1)
    if kind == "own": save_world_model(model, path)
    else: torch.save({"model": to_upstream(model)}, path, _use_new_zipfile_serialization=kind == "zip")
    data, outcomes = path.read_bytes(), {"loaded": 0, "refused": 0}
    for i in range(60):
        at, n = rng.randrange(0, len(data) if i % 3 else 4000), rng.choice([1, 4, 64])
        path.write_bytes(data[:at] + rng.randbytes(n) + data[at + n:])
        try: load_world_model(path); outcomes["loaded"] += 1
        except ConfigError as e: assert str(path) in str(e); outcomes["refused"] += 1
    assert outcomes["refused"] > 5, outcomes


class Evil:
    "Unpickling it creates a file."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["bare", "value", "key", "beside", "legacy", "raw"])
def test_code_is_never_run(tmp_path, where, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, evil, state = tmp_path / "m.pt", Evil(tmp_path / "owned"), to_upstream(make())
    if where == "bare": torch.save(evil, path)
    elif where == "value": torch.save({"model": state | {"_pi.0.bias": evil}}, path)
    elif where == "key": torch.save({"model": state | {evil: 1}}, path)
    elif where == "beside": torch.save({"model": state, "cfg": evil}, path)
    elif where == "legacy": torch.save({"model": state, "cfg": evil}, path, _use_new_zipfile_serialization=False)
    else: path.write_bytes(pickle.dumps({"model": evil}, protocol=2))
    message = refused(path)
    assert not (tmp_path / "owned").exists()
    if where not in ("raw",): assert "would run code that it names (posix.system)" in message


def test_objects_of_other_libraries(tmp_path):
    torch.save({"model": to_upstream(make()), "scores": np.ones(3)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "refused", "numpy")


def drop(*names): return lambda s: {k: v for k, v in s.items() if k not in names}

BAD_STATES = {
    "missing": (drop("_reward.1.weight"), "missing: _reward.1.weight"),
    "missing head": (drop("_Qs.params.6"), "missing: _Qs.params.6"),
    "missing encoder": (lambda s: {k: v for k, v in s.items() if not k.startswith("_encoder")}, "has no '_encoder.state.0.weight'"),
    "missing encoder layer": (lambda s: {k: v for k, v in s.items() if not k.startswith("_encoder.state.0")}, "has no '_encoder.state.0.weight'"),
    "missing Q heads": (lambda s: {k: v for k, v in s.items() if "Qs" not in k}, "has no '_Qs.params.0'"),
    "missing target heads' layer": (drop(*(f"_target_Qs.params.{i}" for i in range(8, 10))), "missing: _target_Qs.params.8, _target_Qs.params.9"),
    "extra": (lambda s: s | {"_decoder.0.weight": torch.ones(3)}, "unexpected: _decoder.0.weight"),
    "many extra": (lambda s: s | {f"_decoder.{i}.weight": torch.ones(3) for i in range(9)}, "and 5 more"),
    "wrong shape": (lambda s: s | {"_dynamics.1.bias": torch.ones(7)}, "wrong shapes: _dynamics.1.bias is [7], not [32]"),
    "wrong first layer": (lambda s: s | {"_dynamics.0.weight": torch.ones(40, 30)}, "wrong shapes: _dynamics.0.weight is [40, 30], not [32, 30]"),
    "wrong latent": (lambda s: s | {"_encoder.state.1.weight": torch.ones(24, 32)}, "_encoder.state.1.weight is [24, 32], not [16, 32]"),
    "another number of bins": (lambda s: s | {"_reward.2.weight": torch.ones(51, 32), "_reward.2.bias": torch.ones(51)}, "_reward.2.weight is [51, 32], not [101, 32]"),
    "scalar": (lambda s: s | {"_encoder.state.0.weight": torch.tensor(1.)}, "_encoder.state.0.weight"),
    "one head too many": (lambda s: s | {"_Qs.params.1": torch.ones(3, 32)}, "_Qs.params.1 is [3, 32], not [2, 32]"),
    "latent not in groups": (lambda s: {k: v[:12] if k.startswith("_encoder.state.1") or k.startswith("_dynamics.2") else v for k, v in s.items()}, "latent_dim must be divisible by 8"),
    "NaN": (lambda s: s | {"_pi.2.bias": s["_pi.2.bias"] * float("nan")}, "'_pi.2.bias' holds NaN or infinite weights"),
    "one inf": (lambda s: s | {"_target_Qs.params.4": s["_target_Qs.params.4"].index_fill(2, torch.tensor([3]), float("-inf"))}, "'_target_Qs.params.4' holds NaN or infinite"),
    "NaN in half": (lambda s: s | {"_pi.2.bias": s["_pi.2.bias"].half() * float("nan")}, "'_pi.2.bias' holds NaN"),
    "integers": (lambda s: s | {"_pi.2.bias": torch.ones(12, dtype=torch.int64)}, "'_pi.2.bias' holds int64"),
    "complex": (lambda s: s | {"_pi.2.bias": torch.ones(12, dtype=torch.complex64)}, "'_pi.2.bias' holds complex64"),
    "text": (lambda s: s | {"_pi.2.bias": "weights"}, "'_pi.2.bias' should be a tensor and is str"),
    "sparse": (lambda s: s | {"_pi.2.weight": s["_pi.2.weight"].to_sparse()}, "'_pi.2.weight' is not a plain tensor"),
    "no data": (lambda s: s | {"_pi.2.weight": s["_pi.2.weight"].to("meta")}, "'_pi.2.weight' is not a plain tensor with data"),
    "both layouts": (lambda s: s | {"_Qs.params.0.weight": s["_Qs.params.0"]}, "'_Qs.params.0' and '_Qs.params.0.weight' are the same tensor"),
    "other policy range": (lambda s: s | {"log_std_min": torch.tensor(-5)}, "log_std_min is not what this model uses", ),
    "other masks": (lambda s: s | {"_action_masks": torch.ones(30, 6)}, "_action_masks is not what this model uses"),
    "a layer index beyond reason": (lambda s: s | {"_encoder.state.99999999999.weight": torch.ones(2)}, "unexpected: _encoder.state.99999999999.weight"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states(tmp_path, case):
    change, words = BAD_STATES[case]
    torch.save({"model": change(to_upstream(make()))}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", words)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_use_the_file_s_names(tmp_path, layout):
    state = to_upstream(make(), layout)
    gone = {"2023": "_target_Qs.params.5", "2025": "_target_Qs_params.1.bias"}[layout]
    del state[gone]
    torch.save({"model": state}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", f"missing: {gone})")


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": []}, [1, 2], 3, "text", torch.ones(3), {"model": torch.ones(3)}, {"model": {1: torch.ones(2)}},
    {"model": {"a.weight": torch.ones(3)}}, {"model": {"model": {"_pi.0.bias": torch.ones(3)}}}, None])
def test_torch_files_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    refused(tmp_path / "m.pt")


def own_file(path, card=None, drop=(), **meta):
    "A tiny own-format file with some of its header replaced."
    model = make("tiny", "walker-walk,cup-catch")
    save_world_model(model, path)
    with safe_open(path, "pt") as f: old = f.metadata()
    good = json.loads(old["config"])
    if card is not None: old["config"] = json.dumps(card(good))
    new = {k: v for k, v in (old | meta).items() if k not in drop}
    write_safetensors(model.state_dict(), path, new)
    return path


BAD_HEADERS = {
    "no config": (dict(drop=("config",)), "its header is broken"),
    "no format": (dict(drop=("format",)), "without the header of tdmpc_opt_kit"),
    "other format": (dict(format="pt"), "without the header of tdmpc_opt_kit"),
    "no version": (dict(drop=("version",)), "format version None"),
    "newer version": (dict(version="3"), "format version '3', and this version of tdmpc_opt_kit reads '1' and '2'. Update"),
    "not JSON": (dict(config="{"), "its header is broken"),
    "a list": (dict(config="[]"), "its header is broken"),
    "no model": (dict(card=lambda c: {"tasks": c["tasks"]}), "its header is broken (KeyError: 'model')"),
    "no tasks": (dict(card=lambda c: {"model": c["model"]}), "its header is broken (KeyError: 'tasks')"),
    "model is text": (dict(card=lambda c: c | {"model": "1M"}), "its header is broken"),
    "a field less": (dict(card=lambda c: c | {"model": {k: v for k, v in c["model"].items() if k != "num_q"}}), "no num_q"),
    "unknown field": (dict(card=lambda c: c | {"model": c["model"] | {"num_qs": 3}}), "a model field 'num_qs' that this version of tdmpc_opt_kit does not know. Did you mean 'num_q'?"),
    "text for a number": (dict(card=lambda c: c | {"model": c["model"] | {"mlp_dim": "32"}}), "mlp_dim is '32', not a whole number"),
    "negative": (dict(card=lambda c: c | {"model": c["model"] | {"mlp_dim": -32}}), "mlp_dim must be at least 1"),
    "other width": (dict(card=lambda c: c | {"model": c["model"] | {"mlp_dim": 64}}), "wrong shapes: dynamics.0.weight is [32, 30], not [64, 30]"),
    "huge width": (dict(card=lambda c: c | {"model": c["model"] | {"mlp_dim": 10**10}}), "m.safetensors"),
    "absurd width": (dict(card=lambda c: c | {"model": c["model"] | {"enc_dim": 10**30}}), "m.safetensors"),
    "absurd depth": (dict(card=lambda c: c | {"model": c["model"] | {"num_enc_layers": 10**9}}), "encoder layers"),
    "unknown task": (dict(card=lambda c: c | {"tasks": ["walker-walk", "cup-cach"]}), "Did you mean 'cup-catch'?"),
    "a task too many": (dict(card=lambda c: c | {"tasks": ["walker-walk", "cup-catch", "fish-swim"]}), "task_emb.weight is [2, 8], not [3, 8]"),
    "tasks is text": (dict(card=lambda c: c | {"tasks": "mt30"}), "tasks is not a list of names"),
    "empty tasks": (dict(card=lambda c: c | {"tasks": []}), "No task was named"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path, case):
    kw, words = BAD_HEADERS[case]
    refused(own_file(tmp_path / "m.safetensors", **kw), words)


def test_garbage_for_a_header(tmp_path):
    path = own_file(tmp_path / "m.safetensors")
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    for new in (data[:9] + b"\xff" * (n - 1) + data[8 + n:], (10**15).to_bytes(8, "little") + data[8:], (n - 8).to_bytes(8, "little") + data[8:],
                data[:8] + data[8:].replace(b'"F32"', b'"F99"'), data[:8] + data[8:].replace(b"[32]", b"[31]"), data + b"more"):
        path.write_bytes(new)
        refused(path)
    for data in (b"\x10" + b"\0" * 7 + b'{"a": [1, 2, 3]}', b"\x02" + b"\0" * 7 + b"{}"):
        path.write_bytes(data)
        refused(path)


def test_nan_in_the_own_format(tmp_path):
    state = make("tiny", "walker-walk,cup-catch").state_dict()
    path = own_file(tmp_path / "m.safetensors")
    with safe_open(path, "pt") as f: meta = f.metadata()
    write_safetensors(state | {"encoder.1.ln.bias": torch.full((16,), float("nan"))}, path, meta)
    refused(path, "'encoder.1.ln.bias' holds NaN or infinite weights")
    write_safetensors({k: v for k, v in state.items() if not k.startswith("target_q_heads.2")}, path, meta)
    refused(path, "missing: target_q_heads.2.weight, target_q_heads.2.bias")


def test_bad_arguments(tmp_path):
    path = save_world_model(make(), tmp_path / "m.safetensors")
    for kw, words in ((dict(device="gpu0"), "gpu0"), (dict(dtype=torch.int8), "dtype"), (dict(dtype="half precision"), "dtype")):
        with pytest.raises(ConfigError, match=words): load_world_model(path, **kw)
    with pytest.raises(ConfigError, match="There is no layout '2024'"): to_upstream(make(), "2024")
    refused(path, "its tasks are walker-stand", tasks="walker-walk")
    assert load_world_model(path, tasks="mt30").tasks == tuple(t.name for t in MT30)


def test_errors_do_not_read_the_weights(tmp_path):
    "A file of 4 GB (sparse: it takes no disk) with one name missing is refused with little memory."
    big = {"_encoder.state.0.weight": torch.ones(1)}
    code = f"""
import resource, sys, time
from tdmpc_opt_kit.checkpoint import load_world_model, read_card
load_world_model({str(save_upstream(make(), tmp_path / 'ok.pt'))!r})
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
for read in (load_world_model, read_card):
    try: read(sys.argv[1])
    except ValueError as e: print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MB", time.monotonic() - start, "s")
"""
    header, at = {"__metadata__": dict(format="tdmpc_opt_kit", version="1", config=json.dumps(dict(model=SIZES["317M"].__dict__, tasks=[t.name for t in MT30])))}, 0
    with torch.device("meta"): shapes = {k: tuple(v.shape) for k, v in WorldModel(SIZES["317M"]).state_dict().items() if k != "pi_head.1.bias"}
    for k, s in shapes.items():
        n = 4 * int(np.prod(s))
        header[k], at = dict(dtype="F32", shape=s, data_offsets=[at, at + n]), at + n
    text, path = json.dumps(header).encode(), tmp_path / "big.safetensors"
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout.strip().splitlines()
    path.unlink()
    assert "missing: pi_head.1.bias" in out[0]
    mb, _, seconds, _ = out[-1].split()
    assert int(mb) < 300 and float(seconds) < 20, out


# ---- Run folders -------------------------------------------------------------------------------

def test_states_of_random_generators_and_optimizers(tmp_path):
    run, rng = RunFolder(tmp_path / "run"), np.random.default_rng(3)
    p = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.Adam([p])
    p.sum().backward(); opt.step()
    state = dict(numpy=rng.bit_generator.state, torch=torch.get_rng_state(), python=random.Random(1).getstate(), opt=opt.state_dict(), scale=np.float64(1.5), seen={"cup-catch": 3, 7: None},
        raw=b"x", pair=(1, 2))
    run.save(5, state)
    back = RunFolder(tmp_path / "run").last()
    assert back["step"] == 5 and back["scale"] == 1.5 and type(back["scale"]) is float and back["seen"] == {"cup-catch": 3, 7: None} and back["pair"] == (1, 2)
    again = np.random.default_rng()
    again.bit_generator.state = back["numpy"]
    assert again.random() == rng.random()
    r = random.Random(); r.setstate(back["python"])
    assert r.random() == random.Random(1).random()
    new = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))]); new.load_state_dict(back["opt"])
    assert torch.equal(new.state_dict()["state"][0]["exp_avg"], opt.state_dict()["state"][0]["exp_avg"])


def test_what_cannot_come_back_is_not_saved(tmp_path):
    run = RunFolder(tmp_path / "run")
    for state, words in ((dict(a=dict(b=[1, np.ones(2)])), r"state\['a'\]\['b'\]\[1\] is ndarray"), (dict(f=print), "is builtin_function"), (dict(p=Path("x")), "Path"), ({None: 1}, "key of type NoneType")):
        with pytest.raises(TypeError, match=words): run.save(1, state)
    assert run.last() is None and list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_views_store_only_themselves(tmp_path):
    run = RunFolder(tmp_path / "run")
    path = run.save(1, dict(part=torch.zeros(1_000_000)[:3]))
    assert (path / "state.pt").stat().st_size < 10_000 and run.last()["part"].shape == (3,)


def test_keeping_and_links(tmp_path):
    run, model = RunFolder(tmp_path / "run", keep=2), make()
    for step in range(10, 60, 10): run.save(step, dict(x=step), model=model if step > 30 else None, keep=step == 20)
    assert run.steps() == [20, 40, 50] and os.readlink(run / "checkpoints" / "last") == "50"
    assert same(load_world_model(run / "checkpoints" / "last"), model)
    refused(run.checkpoint_dir(20), "a folder without model.safetensors")
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)  # The link is relative
    assert RunFolder(moved).last() == {"x": 50, "step": 50} and same(load_world_model(moved / "checkpoints" / "last"), model)
    assert sorted(p.name for p in (moved / "checkpoints").iterdir()) == ["20", "40", "50", "last"]


def test_the_card_of_a_checkpoint_s_model(tmp_path):
    run = RunFolder(tmp_path / "run")
    path = run.save(3, {}, model=make(), origin="run_distill", metrics={"loss": 0.1}, dtype=torch.float16)
    card = read_card(path)
    assert (card["origin"], card["metrics"], card["dtype"]) == ("run_distill", {"loss": 0.1}, "float16")


def test_saving_the_same_step_again(tmp_path):
    run = RunFolder(tmp_path / "run")
    for x in (1, 2): run.save(7, dict(x=x))
    assert run.last() == {"x": 2, "step": 7} and sorted(os.listdir(run / "checkpoints")) == ["7", "last"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense", None])
def test_a_damaged_checkpoint_is_skipped(tmp_path, content):
    run = RunFolder(tmp_path / "run")
    for step in (1, 2): run.save(step, dict(x=step))
    state = run.checkpoint_dir(2) / "state.pt"
    state.unlink() if content is None else state.write_bytes(content)
    with pytest.warns(UserWarning, match="skipped"): assert run.last()["x"] == 1
    run.save(2, dict(x=2))
    assert run.last()["x"] == 2
    for step in (1, 2): (run.checkpoint_dir(step) / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="none of its 2 checkpoints can be read"): run.last()


def test_a_state_with_code_is_not_run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.save(1, dict(x=1))
    torch.save(dict(x=Evil(tmp_path / "owned"), step=2), run.checkpoint_dir(1) / "state.pt")
    with pytest.warns(UserWarning, match="posix.system"), pytest.raises(ConfigError): run.last()
    assert not (tmp_path / "owned").exists()


def test_a_run_set_back_drops_what_came_later(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step in (10, 20): run.save(step, dict(x=step))
    (run.checkpoint_dir(20) / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning): assert run.last()["step"] == 10
    run.save(15, dict(x=15))
    assert run.steps() == [10, 15] and run.last()["step"] == 15


def test_killed_while_saving(tmp_path):
    "SIGKILL at many moments of a run that saves all the time: there is always a checkpoint that loads, and nothing half-written is taken for one."
    code = """
import sys, torch
from tdmpc_opt_kit.checkpoint import RunFolder
from tdmpc_opt_kit.world_model import SIZES, WorldModel
run, model = RunFolder(sys.argv[1]), WorldModel(SIZES["tiny"])
start = (run.last() or dict(step=0))["step"]
run.truncate_metrics(start)
for step in range(start + 1, 10**9):
    run.log(dict(step=step))
    run.save(step, dict(x=torch.full((50_000,), float(step))), model=model)
    if step == start + 1: print("saved", flush=True)
"""
    rng, reached = random.Random(0), 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert child.stdout.readline() == "saved\n"
        time.sleep(rng.uniform(0.05, 0.4))
        child.kill(); child.wait()
        run = RunFolder(tmp_path / "run")
        state = run.last()
        assert state["step"] > reached and (state["x"] == state["step"]).all()
        load_world_model(run / "checkpoints" / "last")
        reached = state["step"]
        assert [r["step"] for r in run.metrics()][:reached] == list(range(1, reached + 1))


def test_metrics(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.metrics() == []
    run.truncate_metrics(5)
    run.log(dict(step=np.int64(1), loss=torch.tensor(0.25), grad=float("inf"), by_task={"cup-catch": np.float32(2)}, name="ü"))
    assert run.metrics() == [dict(step=1, loss=0.25, grad=None, by_task={"cup-catch": 2.0}, name="ü")]
    for torn in (b'{"step": 2', b'{"step": 2, "n": "\xc3', b"{"):
        with open(run / "metrics.jsonl", "ab") as f: f.write(torn)
        again = RunFolder(run.path)
        assert len(again.metrics()) == 1
        again.log(dict(step=3))
        assert [r["step"] for r in again.metrics()] == [1, 3]
        again.truncate_metrics(2)
        assert [r["step"] for r in again.metrics()] == [1]
    with open(run / "metrics.jsonl", "a") as f: f.write("nonsense\n{}\n")
    with pytest.raises(ConfigError, match="metrics.jsonl: line 2 is not JSON"): run.metrics()


def test_config_and_report(tmp_path):
    run = RunFolder(tmp_path / "a" / "b")
    run.write_config(SIZES["1M"])
    run.check_config(SIZES["1M"]); run.check_config(json.dumps(SIZES["1M"].__dict__)); run.check_config(SIZES["1M"].__dict__)
    with pytest.raises(ConfigError, match="another size: it ran with \"1M\", not \"5M\""): run.check_config(SIZES["5M"])
    run.check_config(SIZES["1M"], ignore=("size",))
    (run / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not valid JSON"): run.check_config({})
    versions = json.loads((run / "versions.json").read_text())
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0] and versions["machine"]["cores"] >= 1
    run.report(dict(scores=dict(student=dict(policy=dict(mean=np.float32(28.5), low=float("nan"), n=np.int64(3))))))
    assert json.loads((run / "report.json").read_text())["scores"]["student"]["policy"] == dict(mean=28.5, low=None, n=3)
    run.save(1, {}); run.clear()
    assert list(run.path.iterdir()) == []


def test_bad_run_folders(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(ConfigError, match="choose another out_dir"): RunFolder(path)
    with pytest.raises(ConfigError, match="keep must be at least 1"): RunFolder(tmp_path / "x", keep=0)
