#!/usr/bin/env bash
# Virtual environment, locked dependencies, light visuals. `make setup` runs this once for each requirements.lock.
# Idempotent, asks nothing; a second run continues where a first one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
venv=.venv
say() { echo "setup: $*"; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo "$candidate"; return; }
  done
  return 1
}

make_venv() {
  local python
  python=$(find_python) || {
    echo "setup: Python 3.11 is needed (the locked versions are made for it), found $(python3 --version 2>&1 || true)." >&2
    echo "    Install it, or name it: make setup PYTHON=/path/to/python3.11" >&2
    exit 1
  }
  # Debian keeps the part of venv that installs pip in a package of its own
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      echo "setup: \`$python -m venv\` does not work here. Ask an administrator to run:" >&2
      echo "    sudo apt-get install -y python3.11-venv" >&2
      exit 1
    fi
    say "installing python3.11-venv"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3.11-venv >/dev/null
  fi
  "$python" -m venv "$venv"
}

say "1/4 virtual environment"
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then make_venv; fi

pip=("$venv/bin/python" -m pip install)
say "2/4 torch"
# alone and by its exact version, so that a CPU build which is there already (or in a local folder of wheels) is kept
"${pip[@]}" "$(grep '^torch==' requirements.lock)"

say "3/4 locked dependencies ($(grep -c == requirements.lock) packages)"
"${pip[@]}" -r requirements.lock
"${pip[@]}" --quiet --no-deps --no-build-isolation -e .

say "4/4 light visuals"
"$venv/bin/python" -c 'from trl_stare.envs.visuals import warm_up; print("setup: in", warm_up())'
say "done. \`make doctor\` says what works."
