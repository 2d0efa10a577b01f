"""The sample chunks of the reference folder: one content, whatever version of tensordict wrote it."""
import pickle
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from tdmpc_opt_kit.data import Sampler, Store, convert_chunks, iter_chunk, open_chunk, read_chunk
from tdmpc_opt_kit.tasks import ACTION_DIMS, EPISODE_LENGTH, MAX_ACTION, MAX_OBS, MT30, OBS_DIMS

FIELDS = ("obs", "action", "reward", "task")


@pytest.fixture(scope="module")
def files(reference):
    out = sorted((reference / "chunks").glob("*.pt"))
    assert out, f"{reference / 'chunks'} has no *.pt"
    return out


def raw(path):
    "The arrays of a chunk by their place in the zip file, with no unpickling at all: storages 0 to 3 in the order of the spec."
    episodes, rows, out = open_chunk(path).episodes, EPISODE_LENGTH + 1, {}
    with zipfile.ZipFile(path) as z:
        name = {n.rsplit("/data/", 1)[1]: n for n in z.namelist() if "/data/" in n}
        for i, (k, shape) in enumerate(dict(obs=(rows, MAX_OBS), action=(rows, MAX_ACTION), reward=(rows,), task=(rows,)).items()):
            data = z.read(name[str(i)])
            out[k] = np.frombuffer(data, f"{'i' if k == 'task' else 'f'}{len(data) // (episodes * int(np.prod(shape)))}").reshape(episodes, *shape)
    return out


def test_all_versions_hold_the_same(files):
    first = read_chunk(files[0])
    assert len(files) >= 2
    for f in files[1:]:
        for k, x in read_chunk(f).items(): np.testing.assert_array_equal(x, first[k], err_msg=f"{f.name} {k}")


def test_bytes_of_the_file(files):
    for f in files:
        got = read_chunk(f)
        assert tuple(got) == FIELDS
        for k, want in raw(f).items():
            np.testing.assert_array_equal(got[k], want, err_msg=f"{f.name} {k}")
            assert got[k].dtype == want.dtype


def test_without_tensordict(files):
    "The reader must not depend on a library that is not installed; torch itself refuses these files for that reason."
    with pytest.raises((pickle.UnpicklingError, ModuleNotFoundError)): torch.load(files[0], weights_only=True)
    assert open_chunk(files[0]).episodes == len(read_chunk(files[0])["task"])


def test_rows_follow_the_convention(files):
    for f in files:
        x = read_chunk(f)
        assert np.isnan(x["action"][:, 0]).all() and np.isnan(x["reward"][:, 0]).all()
        assert all(np.isfinite(x[k][:, 1:]).all() for k in ("action", "reward")) and np.isfinite(x["obs"]).all()


def test_in_parts(files):
    for f in files:
        whole, parts = read_chunk(f), list(iter_chunk(f, episodes=4))
        assert [i for i, _ in parts] == list(range(0, len(whole["obs"]), 4))
        for k in FIELDS[:3]: np.testing.assert_array_equal(np.concatenate([p[k] for _, p in parts]), whole[k])
        np.testing.assert_array_equal(np.concatenate([p["task"] for _, p in parts]), whole["task"][:, 0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convert(files, tmp_path, dtype):
    for n, f in enumerate(files):
        x = read_chunk(f)
        store = convert_chunks(f, tmp_path / str(n), dtype=dtype, progress=False)
        task = x["task"][:, 0]
        assert {t: store.num_episodes(t) for t in store.tasks} == Counter(MT30[t].name for t in task)
        assert store.num_rows() == x["task"].size and store.verify() == []
        seen = Counter()
        for e, t in enumerate(task.tolist()):
            got = store.episode(MT30[t].name, seen[t])
            np.testing.assert_array_equal(got.obs, x["obs"][e, :, :OBS_DIMS[t]].astype(dtype))
            np.testing.assert_array_equal(got.action, x["action"][e, :, :ACTION_DIMS[t]].astype(dtype))
            np.testing.assert_array_equal(got.reward, x["reward"][e].astype(dtype))
            entry = store.episodes(MT30[t].name)[seen[t]]
            np.testing.assert_allclose(entry["return"], x["reward"][e, 1:].astype(np.float64).sum(), rtol=1e-12)
            assert entry["number"] == e
            seen[t] += 1


def test_sampled_slices_are_in_the_chunk(files, tmp_path):
    x = read_chunk(files[0])
    store = convert_chunks(files[0], tmp_path / "store", dtype="float32", progress=False)
    for preload in (False, True):
        b = Sampler(store, batch_size=100, horizon=5, preload=preload).sample()
        for i in range(100):
            t = int(b.task[i])
            table = store.episodes(MT30[t])
            at = int(np.searchsorted(table["start"], int(b.index[i]), "right")) - 1
            e, r = int(table["number"][at]), int(b.index[i]) - int(table["start"][at])
            np.testing.assert_array_equal(b.obs[:, i], x["obs"][e, r:r + 6])
            np.testing.assert_array_equal(b.action[:, i], x["action"][e, r + 1:r + 6])
            np.testing.assert_array_equal(b.reward[:, i, 0], x["reward"][e, r + 1:r + 6])


def test_all_samples_into_one_store(files, tmp_path):
    "As upstream's four chunks come: several files, one store, stopped in between."
    convert_chunks(files[:1], tmp_path / "store", progress=False)
    store = convert_chunks(files, tmp_path / "store", progress=False)
    assert store.num_episodes() == sum(open_chunk(f).episodes for f in files)
    assert [o["name"] for o in store.origins] == [f.name for f in files]
    assert Store(tmp_path / "store").verify() == []
