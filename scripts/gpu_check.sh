#!/usr/bin/env bash
# Everything worth knowing about the CUDA backend on a machine with a GPU, in ten minutes.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/gpu_check.sh [--out DIR] [--only NAMES] [BUILD]
       scripts/gpu_check.sh --bundle DIR [BUILD]

On a machine with an NVIDIA GPU: runs the tests of operations, a training beside the CPU's, two ranks
on one GPU (if mpirun is there), the benchmarks, beside PyTorch if `python3` has it with
transformers, and memcheck, racecheck and initcheck passes of the tests (if compute-sanitizer is
there). What has not begun after ten minutes is left out. Leaves results.json, a table and the logs.

  BUILD         build folder with tests and CUDA (default: build/dev), or a bundle
  --out DIR     where the results go (default: build/gpu_check)
  --only NAMES  runs the steps of these names alone, a regular expression: 'memcheck_.*|speed|pytorch'.
                Each may take three times as long then
  --bundle DIR  copies what the check needs from BUILD into DIR and DIR.tar.xz, to carry to a machine
                where nothing can be fetched; there: DIR/gpu_check.sh DIR. NVIDIA's libraries must
                be there: in /usr/local, /usr/lib, /opt or the packages of python3.
  --help        this text

Exit code 1 if anything failed.
TEXT
}

readonly time_limit=580  # seconds for all of it
out=build/gpu_check bundle="" build="" only=".*"
while (($#)); do
  case $1 in
    --out) out=$2 && shift 2 ;;
    --only) only=$2 && shift 2 ;;
    --bundle) bundle=$2 && shift 2 ;;
    --help | -h) usage && exit 0 ;;
    -*) echo "gpu_check.sh: unknown option '$1' (see --help)" >&2 && exit 2 ;;
    *) build=$1 && shift ;;
  esac
done
build=${build:-build/dev}
patience=1
[[ $only == ".*" ]] || patience=3
fail() {
  echo "gpu_check.sh: $*" >&2
  exit 1
}

# Programs and libraries lie in the folders of a build, or all in one of a bundle.
find_file() { find "$build" -name "$1" -type f -print -quit; }
library=$(find_file libbitfall_cuda.so)
[[ -n $library ]] || library=$(find python/bitfall -name libbitfall_cuda.so 2>/dev/null | head -n 1)
[[ -n $library ]] || fail "no libbitfall_cuda.so in $build: configure with -DBITFALL_CUDA=ON"
tests=(activation adam attention attention_tangent decide_update elementwise embedding fake_quantize layer_norm
  layer_norm_tangent linear loss vector)
for name in "${tests[@]/%/_test}" gpu_check; do
  [[ -n $(find_file "$name") ]] || fail "no $name in $build: build with -DBITFALL_BUILD_TESTS=ON"
done

# The peer lies in the sources, or in a bundle.
workers=$(dirname "${BASH_SOURCE[0]}")/../benchmarks/workers
[[ -d $build/workers ]] && workers=$build/workers

# make_bundle: the programs without symbols, and their libraries that are not part of the C library.
make_bundle() {
  mkdir -p "$bundle/lib"
  local name file
  for name in "${tests[@]/%/_test}" gpu_check; do
    strip -o "$bundle/$name" "$(find_file "$name")"
  done
  strip -o "$bundle/libbitfall_cuda.so" "$library"
  ldd "$bundle"/*_test "$bundle/gpu_check" | awk '$3 ~ /^\// {print $3}' | sort -u |
    grep -vE '/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*)\.so' | while read -r file; do
    cp -Lu "$file" "$bundle/lib/"
  done
  mkdir -p "$bundle/workers"
  cp "$workers"/{torch_gpu,power_iteration,start_vector}.py "$bundle/workers/"
  cp "${BASH_SOURCE[0]}" "$bundle/gpu_check.sh"
  tar -C "$(dirname "$bundle")" -cf - "$(basename "$bundle")" | xz -T0 -3 >"$bundle.tar.xz"
  du -sh "$bundle" "$bundle.tar.xz"
}
if [[ -n $bundle ]]; then
  make_bundle
  exit 0
fi

mkdir -p "$out"
rm -f "$out"/*.log "$out"/results.json
export BITFALL_CUDA_LIBRARY=$library

# Libraries that this machine does not find: a bundle's, and cuBLASLt where CUDA or PyTorch has it.
# They come behind the machine's own, which others may need in the version that is there.
libraries=$(mktemp -d)
trap 'rm -rf "$libraries"' EXIT
programs=(env "LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries")
missing() { "${programs[@]}" ldd "$library" "$(find_file gpu_check)" 2>/dev/null | awk '/=> not found/ {print $1}'; }
find_library() {
  local packages
  packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null) || packages=/usr/lib
  find "$build/lib" /usr/local /usr/lib /opt "$packages" -name "$1" -print -quit 2>/dev/null || true
}
for _ in 1 2 3; do  # a library that is found may need others
  while read -r name; do
    found=$(find_library "$name")
    [[ -z $found ]] || ln -sf "$(realpath "$found")" "$libraries/$name"
  done < <(missing | sort -u)
done
[[ -z $(missing) ]] || echo "gpu_check.sh: not found: $(missing | sort -u | paste -sd' ')" >&2

lines=()
failed=0

# record NAME STATUS SECONDS DETAIL
record() {
  lines+=("{\"check\": \"$1\", \"status\": \"$2\", \"seconds\": $3, \"detail\": \"$4\"}")
  printf '%-34s %-8s %5d s  %s\n' "$1" "$2" "$3" "$4"
  [[ $2 != failed ]] || failed=1
}

# step NAME LIMIT COMMAND...: one line of the table; the log keeps the rest.
step() {
  local name=$1 limit=$((patience * $2)) log="$out/$1.log" began=$SECONDS status=passed detail code=0
  shift 2
  [[ $name =~ ^($only)$ ]] || return 0
  local left=$((time_limit - SECONDS))
  if ((left < 10)); then
    record "$name" skipped 0 "no time left: --only '$name' runs it alone"
    return
  fi
  ((limit < left)) || limit=$left
  timeout -k 5 "$limit" "$@" >"$log" 2>&1 || code=$?
  ((code == 0)) || status=failed
  detail=$(grep -aE '^\[  (PASSED|FAILED|SKIPPED)' "$log" | grep -aoE '(PASSED|FAILED|SKIPPED).*[0-9]+ tests?' |
    tr -d ']' | tr -s ' ' | paste -sd, - || true)
  # A device that is not found skips every test: that is no pass here.
  if grep -aq 'no GPU:' "$log"; then status=failed detail=$(grep -a -m1 'no GPU:' "$log"); fi
  if ((code == 124 || code == 137)); then
    detail="stopped after $limit s"
  elif [[ $status == failed && -z $detail ]]; then
    detail=$(grep -av '^{"check"' "$log" | grep -a . | tail -n 1 | cut -c 1-200 || true)
  fi
  record "$name" "$status" $((SECONDS - began)) "${detail//[$'"\\'[:cntrl:]]/ }"
}

# unable NAME WHY: a step that cannot be run here.
unable() {
  [[ ! $1 =~ ^($only)$ ]] || record "$1" skipped 0 "$2"
}

for name in "${tests[@]}"; do
  step "${name}_test" 120 "${programs[@]}" "$(find_file "${name}_test")" --gtest_filter='*cuda*'
done
step compare 120 "${programs[@]}" "$(find_file gpu_check)" compare
if command -v mpirun >/dev/null; then
  step ranks 60 "${programs[@]}" BITFALL_SHARE_GPU=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    mpirun --oversubscribe -np 2 "$(find_file gpu_check)" ranks
else
  unable ranks "no mpirun"
fi
step speed 180 "${programs[@]}" "$(find_file gpu_check)" speed
if python3 -c 'import torch, transformers; assert torch.cuda.is_available()' >/dev/null 2>&1; then
  step pytorch 240 python3 "$workers/torch_gpu.py" "$out/speed.log" $((patience * 160))
else
  unable pytorch "not measured: python3 has no PyTorch and transformers that see the GPU"
fi

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
for tool in memcheck racecheck initcheck; do
  for name in adam fake_quantize attention attention_tangent layer_norm embedding; do
    if [[ -z $sanitizer ]]; then
      unable "${tool}_$name" "no compute-sanitizer"
    else
      step "${tool}_$name" 60 "${programs[@]}" "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "$(find_file "${name}_test")" --gtest_filter='*cuda*'
    fi
  done
done

((${#lines[@]} > 0)) || fail "no step is named '$only'"

# The lines of JSON that programs print, one result each.
values=$(cat "$out"/{compare,ranks,speed,pytorch}.log 2>/dev/null | grep -a '^{"check"' || true)
field() { sed -nE "s/.*\"$1\": (\"([^\"]*)\"|([^,}]*)).*/\2\3/p" <<<"$2"; }
printf '\n%-10s %-13s %-18s %s\n' value unit target what
while read -r line; do
  [[ -n $line ]] || continue
  target="$(field bound "$line") $(field limit "$line")" verdict=""
  [[ $target != *null ]] || target=""
  [[ $(field passed "$line") == true ]] || verdict=" MISSED"
  printf '%-10s %-13s %-18s %s%s\n' "$(field value "$line")" "$(field unit "$line")" "$target" \
    "$(field check "$line")" "$verdict"
done <<<"$values" | tee "$out/table.txt"
{
  echo '['
  { printf '%s\n' "${lines[@]}" && printf '%s\n' "$values"; } | grep . | paste -sd, | sed 's/},{/},\n{/g'
  echo ']'
} >"$out/results.json"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/gpu.txt" 2>/dev/null || true
echo "results: $out/results.json"
exit $failed
