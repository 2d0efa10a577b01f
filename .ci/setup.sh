#!/usr/bin/env bash
# Makes .venv and the system packages ready; every make target calls it. Done once: later calls return at once, until settings.ini,
# setup.py or this file change. A set-up that was interrupted is begun anew by the next call.
#   PYTHON=/path/to/python3.12  which Python to build .venv with
#   TDMPC_VENV=/path            an environment of your own, used as it is
#   TDMPC_SETUP_STRICT=1        a missing system package is an error (CI)
set -u
CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
stamp=.venv/.setup-done unfinished=.venv/.setup-unfinished
clock=

say()  { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die()  { warn "set-up: $1"; shift; for line in "$@"; do warn "        $line"; done; exit 1; }
stop_clock() { if [ -n "$clock" ]; then kill "$clock" 2>/dev/null; wait "$clock" 2>/dev/null; clock=; fi; }
trap stop_clock EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -n "${TDMPC_VENV:-}" ]; then
    [ -x "$TDMPC_VENV/bin/python" ] || die "TDMPC_VENV is $TDMPC_VENV, but there is no $TDMPC_VENV/bin/python."
    exit 0
fi

# ---------------------------------------------------------------- already done?
fingerprint() { { cat settings.ini setup.py .ci/setup.sh; printf '%s\n' "$root"; } | cksum; }
ready() { [ -e "$stamp" ] && [ ! -e "$unfinished" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && .venv/bin/python -c '' 2>/dev/null; }
ready && exit 0

exec 9<settings.ini
if command -v flock >/dev/null && ! flock -n 9; then
    say "Another set-up is at work here; waiting for it."
    flock 9
    ready && exit 0
fi
started=$SECONDS

# ---------------------------------------------------------------- Debian packages
# apt_install PACKAGE...: 0 when they are installed afterwards. Needs apt-get, and root or sudo without a password.
apt_log=${TMPDIR:-/tmp}/tdmpc-apt-$$.log apt_updated= apt_failed=
can_install() { command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" </dev/null >>"$apt_log" 2>&1 9<&-; }
apt_install() {
    can_install || return 1
    say "Installing system packages: $*"
    if [ -z "$apt_updated" ]; then apt_get update || warn "  (apt-get update failed; trying all the same)"; apt_updated=1; fi
    apt_get install --no-install-recommends "$@" && return 0
    warn "  apt-get could not install them (all that it said: $apt_log):"
    grep -E '^E:' "$apt_log" | tail -n 3 | sed 's/^/    /' >&2
    apt_failed=1
    return 1
}

# ---------------------------------------------------------------- Python 3.11 or 3.12 that can make a virtual environment
# Each candidate is run, because a name on PATH may be a shim that only says that its version is not installed.
python= python_version= tried= without_venv=
find_python() {
    local name version
    python= tried= without_venv=
    for name in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python; do
        if ! command -v "$name" >/dev/null; then tried="$tried, $name is not there"; continue; fi
        if ! version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then tried="$tried, $name does not run"; continue; fi
        case $version in 3.11|3.12) ;; *) tried="$tried, $name is Python $version"; continue ;; esac
        if "$name" -c 'import venv, ensurepip; ensurepip.version()' 2>/dev/null; then python=$name python_version=$version; return 0; fi
        tried="$tried, $name is Python $version without venv"
        [ -n "$without_venv" ] || without_venv=$version
    done
    return 1
}
need_python() {
    local version
    find_python && return 0
    if [ -n "$without_venv" ]; then
        say "Python $without_venv is here, but it cannot make virtual environments: the Debian package python3-venv (python$without_venv-venv) is missing."
        { apt_install "python$without_venv-venv" || apt_install python3-venv; } && find_python && return 0
        die "Python $without_venv cannot make virtual environments." \
            "Install the package: sudo apt-get install python$without_venv-venv (or python3-venv), then try again."
    fi
    if command -v apt-cache >/dev/null && can_install; then
        for version in 3.12 3.11; do
            [ -n "$(apt-cache show "python$version-venv" 2>/dev/null)" ] && apt_install "python$version" "python$version-venv" && find_python && return 0
        done
    fi
    die "Python 3.11 or 3.12 is needed, and none was found (${tried#, })." \
        "Debian 12 and Ubuntu 24.04: sudo apt-get install python3 python3-venv. Elsewhere install one of the two," \
        "and if it is not on PATH, name it: make PYTHON=/path/to/python3.12 ..."
}

# ---------------------------------------------------------------- .venv
# A folder that was moved or copied holds commands that start the Python of the old place.
belongs_here() {
    local from
    from=$(sed -n -e '1{/^#!\/bin\/sh/!s/^#! *//p;}' -e "2s/^'''exec' \"\{0,1\}\([^\"]*\)\"\{0,1\} .*/\1/p" .venv/bin/pip 2>/dev/null | head -n 1)
    [ -n "$from" ] && [ "$(dirname -- "$from")" -ef .venv/bin ]
}
usable() {
    .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null &&
    .venv/bin/python -m pip --version >/dev/null 2>&1 && belongs_here
}
fresh=
if [ -e .venv ] || [ -L .venv ]; then
    if [ -e "$unfinished" ]; then say "The last set-up did not finish; starting .venv anew."; fresh=1
    elif ! usable; then say ".venv does not work (moved, or made by another Python); starting it anew."; fresh=1; fi
else fresh=1; fi
if [ -n "$fresh" ]; then
    need_python
    if [ -n "${PYTHON:-}" ] && [ "$python" != "$PYTHON" ]; then say "PYTHON=$PYTHON does not serve (${tried#, }); taking $python."; fi
    say "Setting up .venv with Python $python_version ($(command -v "$python")). This happens once."
    rm -rf .venv && mkdir .venv && : >"$unfinished" || die "cannot write to $root/.venv."
    "$python" -m venv .venv || die "$python -m venv .venv failed; see above."
else
    say "settings.ini or the set-up changed: bringing .venv up to date."
    rm -f "$stamp"; : >"$unfinished"
fi

if [ -t 1 ]; then
    (begun=$SECONDS; while sleep 1; do printf '\rInstalling Python packages ... %d s ' $((SECONDS - begun)); done) 9<&- & clock=$!
else say "Installing Python packages ..."; fi
# Quiet but for errors, also where pip calls itself to build.
PIP_PROGRESS_BAR=off .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check -e '.[dev]' 9<&-
rc=$?
stop_clock
[ -t 1 ] && printf '\r\033[K'
if [ $rc != 0 ]; then
    # pip undoes what it began when it fails by itself, so an environment that worked before still does.
    [ -n "$fresh" ] || rm -f "$unfinished"
    die "pip could not install the Python packages; its errors are above. The next make tries again." \
        "To watch it at work: .venv/bin/python -m pip install -e '.[dev]'"
fi
torch=$(.venv/bin/python -c 'import torch, mujoco, nbdev.test, tdmpc_opt_kit
print(torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU")') ||
    die "the packages are installed, but they cannot be imported; see above."
say "Python packages are ready after $((SECONDS - started)) s: PyTorch $torch."

# ---------------------------------------------------------------- what speed, pictures and videos need
# Nothing of this is indispensable, so what cannot be installed is told and set-up goes on.
lacking=
renders() {
    [ "$(uname)" = Linux ] || return 0
    local backend
    for backend in "$@"; do
        MUJOCO_GL=$backend .venv/bin/python -c 'import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size=\"1\"/></worldbody></mujoco>")
renderer = mujoco.Renderer(model, 8, 8); renderer.update_scene(mujoco.MjData(model)); renderer.render(); renderer.close()' >/dev/null 2>&1 && return 0
    done
    return 1
}
has_ffmpeg() { command -v ffmpeg >/dev/null; }
has_compiler() { command -v "${CXX:-g++}" >/dev/null; }
has_browser() {
    local name
    for name in ${BROWSER_PATH:+"$BROWSER_PATH"} chromium chromium-browser google-chrome google-chrome-stable chrome msedge microsoft-edge brave-browser vivaldi; do
        command -v "$name" >/dev/null && return 0
    done
    [ -d "/Applications/Google Chrome.app" ] || [ -d /Applications/Chromium.app ]
}
lacks() { warn "$1"; lacking="$lacking $2"; }

has_compiler || { apt_install g++ && has_compiler; } ||
    lacks "g++ is missing: on a CPU, planning and training run several times slower." g++
has_ffmpeg || { apt_install ffmpeg && has_ffmpeg; } ||
    lacks "ffmpeg is missing: runs go on without videos." ffmpeg
has_browser || { apt_install chromium && has_browser; } ||
    lacks "No Chromium or Chrome: runs go on without figures as PNG files, and tests that draw figures fail." chromium
renders egl osmesa || { apt_install libegl1 libegl-mesa0 libgl1-mesa-dri && renders egl; } || { apt_install libosmesa6 && renders osmesa; } ||
    lacks "Neither EGL nor OSMesa can render here: runs go on without videos and stills." "libegl1 libegl-mesa0 libgl1-mesa-dri"
if [ -n "$lacking" ]; then
    warn "To have it (Debian, Ubuntu): sudo apt-get install --no-install-recommends$lacking"
    [ "${TDMPC_SETUP_STRICT:-0}" != 1 ] || die "these system packages are needed here and could not be installed:$lacking"
fi
[ -n "$apt_failed" ] || rm -f "$apt_log"

fingerprint >"$stamp.new" && mv "$stamp.new" "$stamp" && rm -f "$unfinished"
say "Set-up is done after $((SECONDS - started)) s."
