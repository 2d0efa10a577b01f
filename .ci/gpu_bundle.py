#!/usr/bin/env python3
"""Pack what `python -m tdmpc_opt_kit.gpu_jobs` needs for a machine with Python 3.12, PyTorch and NumPy but no network.

    .ci/gpu_bundle.py OUT.tar.xz      there: tar xJf OUT.tar.xz -C DIR; PYTHONPATH=DIR:. MUJOCO_GL=disable python3 -m tdmpc_opt_kit.gpu_jobs check

The simulator's wheels hold much that MT30 never touches (renderers, other embodiments, textures); this leaves it out.
"""
import io, re, subprocess, sys, tarfile, tempfile, zipfile
from pathlib import Path

WHEELS = ["mujoco==3.17.0", "dm_control==1.0.50", "dm-env", "dm-tree", "glfw", "labmaze", "gymnasium>=1.2,<2", "cloudpickle", "farama-notifications", "fastcore>=1.14,<2"]
TARGET = ["--python-version", "3.12", "--implementation", "cp", *(x for v in ("2014", "_2_17", "_2_24", "_2_27", "_2_28") for x in ("--platform", f"manylinux{v}_x86_64"))]
UNUSED = re.compile(r"^dm_control/(locomotion|blender|suite/dog_assets)/|^mujoco/(experimental|include|sysid|introspect|_render_filament)|^labmaze/assets/|/(tests|testdata)/|_test\.py$|\.pyi$")


def wanted(entry: zipfile.ZipInfo) -> bool:
    texture = "assets" in entry.filename and entry.filename.endswith(".png") and entry.file_size > 100_000
    return not (entry.is_dir() or texture or UNUSED.search(entry.filename))


def main(out: str):
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *TARGET, "-d", wheels, *WHEELS], check=True)
        with tarfile.open(out, "w:xz") as tar:
            for wheel in sorted(Path(wheels).iterdir()):
                with zipfile.ZipFile(wheel) as z:
                    for entry in filter(wanted, z.infolist()):
                        info = tarfile.TarInfo(entry.filename)
                        info.size, info.mode = entry.file_size, 0o755 if ".so" in entry.filename else 0o644
                        tar.addfile(info, io.BytesIO(z.read(entry)))
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(sys.argv[1])
