#!/usr/bin/env bash
# Builds a small bundle with which `python -m tdmpc_opt_kit.gpu_jobs` and MT30's physics run on a machine that has Python 3.12 (x86-64), numpy, scipy, absl-py
# and lxml but no network: mujoco and dm_control without what the ten planar domains and headless stepping do not need, gymnasium, fastcore.
#   gpu_bundle.sh OUT.tar.xz     then there: tar xJf OUT.tar.xz -C DIR; PYTHONPATH=DIR MUJOCO_GL=disable python3 ...
# The whole wheels are 83 MB; the bundle is about 11 MB (35 MB unpacked). No rendering.
set -euo pipefail
out=$(realpath -m "${1:?usage: gpu_bundle.sh OUT.tar.xz}")
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  -d "$tmp/whl" mujoco==3.17.0 dm_control==1.0.50 dm-env dm-tree glfw labmaze 'gymnasium>=1.2,<2' cloudpickle farama-notifications 'fastcore>=1.14,<2'
mkdir "$tmp/site"
for w in "$tmp"/whl/*.whl; do python3 -m zipfile -e "$w" "$tmp/site"; done
cd "$tmp/site"
rm -rf dm_control/locomotion dm_control/blender dm_control/suite/dog_assets mujoco/experimental mujoco/include mujoco/sysid \
  mujoco/introspect mujoco/_render_filament* labmaze/assets
find . -depth \( -name tests -o -name testdata \) -type d -exec rm -rf {} +
find . \( -name '*_test.py' -o -name '*.pyi' \) -delete
find . -path '*assets*' -name '*.png' -size +100k -delete
tar cJf "$out" .
ls -la "$out"
