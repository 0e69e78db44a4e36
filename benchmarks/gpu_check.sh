#!/usr/bin/env bash
# All that a machine with a GPU can tell of this checkout, in one call of under ten minutes.
#
#   benchmarks/gpu_check.sh OUT [options]
#
# Nothing is downloaded. Steps, each with its own time limit and its own OUT/STEP.log; one that fails
# does not stop the others:
#
#   environment  nvidia-smi, versions, commit               environment.json
#   build        the CUDA C++ kernels, where nvcc is        blip3o_fast/_C.so; with --cpu only below OUT
#   ops          every op once by every implementation
#   tests        pytest -m gpu; with --cpu one small file
#   bench        blip3o-fast bench --quick                  bench/bench.json and its pictures
#   profile      one evaluation, launch by launch           profile.json
#   memcheck     every op under compute-sanitizer
#   racecheck    the same for races in shared memory
#
# and, if --steps names them, for a call of their own:
#
#   training     one training step, launch by launch        training.json
#   long         2,000 steps in a row, any of them broken?  long.json
#
# OUT/summary.json, rewritten after each step, says for each: passed, failed or skipped, exit status,
# seconds, limit and reason. The exit status is 1 if a step failed, 2 for bad arguments.
#
#   --cpu            small budgets on a CPU: for testing this script, not for figures
#   --steps a,b      only these
#   --limit SECONDS  of each step, instead of its own
#   --full           bench without --quick; give it a --limit
#   --wheels DIR     pytest and what it needs, as wheels, for a machine without it
#   --commit SHA     for a copy of the checkout that is not a git repository
#   PYTHON           in the environment: the Python that has torch (default: python3)
# shellcheck disable=SC2329  # the steps are called by name
set -uo pipefail

usage() {
  echo "gpu_check.sh: $1" >&2
  sed -n '2,4p' "$0" >&2
  exit 2
}

declare -A own_limit=(
  [environment]=45 [build]=100 [ops]=45 [tests]=110 [bench]=125 [profile]=40 [memcheck]=55 [racecheck]=55
  [training]=120 [long]=400
)
steps="environment,build,ops,tests,bench,profile,memcheck,racecheck"
python=${PYTHON:-python3}
out="" mode=gpu limit="" wheels="" commit="" quick=--quick
while (($#)); do
  case $1 in
    --cpu) mode=cpu ;;
    --full) quick="" ;;
    --steps | --limit | --wheels | --commit)
      (($# > 1)) || usage "$1: expected a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -*) usage "unknown option $1" ;;
    *)
      [[ -z $out ]] || usage "expected one folder, got $out and $1"
      out=$1
      ;;
  esac
  shift
done
[[ -n $out ]] || usage "expected a folder for the results"
[[ $limit =~ ^([1-9][0-9]*)?$ ]] || usage "--limit: expected whole seconds, got $limit"
IFS=, read -ra chosen <<<"$steps"
for name in "${chosen[@]}"; do
  [[ -n ${own_limit[$name]:-} ]] || usage "--steps: expected some of ${!own_limit[*]}, got $name"
done
if [[ -n $wheels ]]; then
  [[ -d $wheels ]] || usage "--wheels: expected a folder, got $wheels"
  wheels=$(cd "$wheels" && pwd)
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
commit=${commit:-$(git rev-parse HEAD 2>/dev/null)}
rm -f "$out/steps.tsv"

SKIPPED=77

export PYTHONPATH=$PWD:$PWD/kernels:$out/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
device=cuda
if [[ $mode == cpu ]]; then
  device=cpu
  export CUDA_VISIBLE_DEVICES=""
fi

skip() {
  echo "$1"
  return "$SKIPPED"
}

# Run a command within what is left of the step's time; an interrupt lets pytest say how far it came.
limited() {
  local left=$((deadline - SECONDS))
  ((left > 0)) || return 124
  timeout --signal=INT --kill-after=5 "$left" "$@"
}

has_module() {
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"
}

step_environment() {
  if [[ $mode == gpu ]]; then limited nvidia-smi || echo "nvidia-smi: exit status $?"; fi
  limited "$python" -m blip3o_fast doctor || return
  limited "$python" - "$out/environment.json" "$device" <<'PY'
import json, sys
from pathlib import Path

import torch

from blip3o_fast.benchmarking.environment import describe_environment

if sys.argv[2] == "cuda" and not torch.cuda.is_available():
    sys.exit("expected a GPU that torch can use, found none; --cpu tests this script without one")
facts = describe_environment(torch.device(sys.argv[2]))
Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n")
PY
}

step_build() {
  if ! command -v nvcc >/dev/null && [[ ! -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
    skip "nvcc was not found"
    return
  fi
  local place=(--inplace) targets=9.0a
  if [[ $mode == cpu ]]; then
    place=(--build-lib "$out/build/lib")
  else
    targets=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major >= 9))') || return
  fi
  export BLIP3O_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$targets}
  limited "$python" setup.py build_ext "${place[@]}" --build-temp "$out/build/temp"
}

step_ops() {
  limited "$python" benchmarks/every_op.py --device "$device"
}

step_tests() {
  local name wanted=() found
  for name in pytest pytest_timeout hypothesis; do
    if ! has_module "$name" && compgen -G "${wheels:-/nowhere}/$name-*.whl" >/dev/null; then
      wanted+=("$name")
    fi
  done
  if ((${#wanted[@]})); then
    limited "$python" -m pip install --quiet --no-index --find-links "$wheels" \
      --target "$out/site" "${wanted[@]}" || return
  fi
  if ! has_module pytest; then
    skip "pytest is not installed; --wheels DIR brings it"
    return
  fi
  local options=(-v -p no:cacheprovider)
  if [[ $mode == cpu ]]; then
    limited "$python" -m pytest "${options[@]}" tests/test_axes.py
    return
  fi
  # A file that wants a package that is not here is left out by name; other errors are failures.
  found=$(limited "$python" -m pytest -q -p no:cacheprovider -m gpu --collect-only |
    sed -n 's/^ERROR \(tests[^ ]*\) - ModuleNotFoundError: \(.*\)/\1 \2/p')
  while read -r name why; do
    [[ -n $name ]] || continue
    echo "left out: $name: $why"
    options+=(--ignore "$name")
  done <<<"$found"
  if has_module xdist; then options+=(-n 4 --dist loadfile); fi
  limited "$python" -m pytest "${options[@]}" -m gpu --durations=10
}

step_bench() {
  local options=(--device "$device" --output_dir "$out/bench")
  [[ -n $quick ]] && options+=("$quick")
  if [[ $mode == cpu ]]; then options+=(--quick --groups ops --seconds 0.05); fi
  has_module matplotlib || options+=(--no_plots)
  limited "$python" -m blip3o_fast bench "${options[@]}"
}

step_profile() {
  local options=(--device "$device" --json "$out/profile.json")
  if [[ $mode == cpu ]]; then options+=(--preset tiny --batch 1); fi
  limited "$python" benchmarks/profile_launches.py "${options[@]}"
}

step_training() {
  local options=(--of training --device "$device" --json "$out/training.json")
  if [[ $mode == cpu ]]; then options+=(--preset tiny --batch 1); fi
  limited "$python" benchmarks/profile_launches.py "${options[@]}"
}

step_long() {
  local options=(--device "$device" --json "$out/long.json")
  if [[ $mode == cpu ]]; then options+=(--preset tiny --batch 1 --samples 4 --steps 4); fi
  limited "$python" benchmarks/long_training.py "${options[@]}"
}

sanitize() {
  if [[ $mode == cpu ]]; then
    skip "compute-sanitizer watches a GPU"
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    skip "compute-sanitizer was not found"
    return
  fi
  # Without the caching allocator, so that every tensor has borders that a check can see.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" benchmarks/every_op.py --device cuda
  local status=$?
  if grep -q "Device not supported" "$out/$1.log"; then
    skip "compute-sanitizer does not support this device or machine"
    return
  fi
  return "$status"
}

step_memcheck() { sanitize memcheck; }

step_racecheck() { sanitize racecheck; }

# Rewrite summary.json from steps.tsv; prints nothing.
summarise() {
  "$python" - "$out" "$mode" "$commit" <<'PY'
import json, sys
from pathlib import Path

out, mode, commit = Path(sys.argv[1]), *sys.argv[2:]
VERDICTS = {0: "passed", 77: "skipped"}


def last_line(name):
    lines = [line.strip() for line in (out / f"{name}.log").read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "no output")


steps = []
for row in (out / "steps.tsv").read_text().splitlines():
    name, status, seconds, limit = row.split("\t")
    status = int(status)
    reason = "" if status == 0 else last_line(name)
    if status in (124, 137):
        reason = f"ran past its limit of {limit} s"
    steps.append(
        {
            "name": name,
            "verdict": VERDICTS.get(status, "failed"),
            "exit": None if status == 77 else status,
            "seconds": float(seconds),
            "limit": int(limit),
            "reason": reason,
            "log": f"{name}.log",
        }
    )
environment = out / "environment.json"
content = {
    "kind": "blip3o-fast gpu check",
    "format": 1,
    "mode": mode,
    "commit": commit or None,
    "environment": json.loads(environment.read_text()) if environment.is_file() else None,
    "steps": steps,
    "failed": sum(step["verdict"] == "failed" for step in steps),
}
(out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
PY
}

failed=0
for name in "${chosen[@]}"; do
  seconds=${limit:-${own_limit[$name]}}
  deadline=$((SECONDS + seconds))
  started=$(date +%s.%N)
  ("step_$name") >"$out/$name.log" 2>&1 </dev/null
  status=$?
  took=$(awk -v a="$started" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$took" "$seconds" >>"$out/steps.tsv"
  case $status in
    0) verdict=passed ;;
    "$SKIPPED") verdict=skipped ;;
    *) verdict=failed failed=1 ;;
  esac
  printf '%-12s %-8s %6s s of %s\n' "$name" "$verdict" "$took" "$seconds"
  summarise || failed=1
done
rm -f "$out/steps.tsv"
echo "summary: $out/summary.json"
exit $failed
