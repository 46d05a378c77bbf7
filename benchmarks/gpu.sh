#!/usr/bin/env bash
# Runs every check and benchmark that needs a GPU, from a bare clone; it installs nothing.
#
#   bash benchmarks/gpu.sh [PART ...] [-- options of benchmarks.gpu]
#
#   PART   tests, steps, views, loss, loader (all five if none is given: under 10 minutes in total)
#          or compiled (the same steps with torch.compile; up to 9 minutes, in a separate call)
#
#   bash benchmarks/gpu.sh steps loss -- --out results
#   bash benchmarks/gpu.sh loader -- --photos /data/photographs
#   bash benchmarks/gpu.sh steps views loss loader -- --device cpu --quick    # only shows that it runs
#
# If a part fails or reaches its time limit, the next part still runs; rows so far are saved.
# Needs python3 (or $PYTHON) with the packages of pyproject.toml; the tests also need pytest, and
# the comparison of views kornia.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

parts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do parts+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#parts[@]} -gt 0 ] || parts=(tests steps views loss loader)

"$python" -c "import benchmarks.gpu" || {
  echo "elsewhere: python3 -m pip download --only-binary=:all: -d wheels NAMES, for this Python" >&2
  echo "here: python3 -m pip install --no-index --no-deps --target site wheels/*.whl;" \
    'export PYTHONPATH="$PWD/site"' >&2
  exit 2
}
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

status=0
measure() { # part, minutes after which no new measurement starts, limit in seconds, options
  local part=$1 minutes=$2 limit=$3
  shift 3
  echo "== $part"
  timeout --kill-after=10 "$limit" "$python" -m benchmarks.gpu "$part" --minutes "$minutes" "$@"
  local code=$?
  [ $code -eq 0 ] || { echo "$part ended with $code (124: its limit of $limit s)"; status=1; }
}

for part in "${parts[@]}"; do
  case $part in
    tests)
      echo "== tests"
      shapes=()
      "$python" -c 'import beartype' 2>/dev/null || shapes=(--override-ini addopts=)
      timeout --kill-after=10 80 "$python" -m pytest -q -p no:cacheprovider "${shapes[@]}" \
        tests/training/test_cuda.py || { echo "tests ended with $?"; status=1; }
      ;;
    steps) measure steps 3.4 245 "$@" ;;
    compiled) measure compiled 7 540 "$@" ;;
    views) measure views 1 75 "$@" ;;
    loss) measure loss 0.7 50 "$@" ;;
    loader) measure loader 1.4 125 "$@" ;;
    *)
      echo "no such part: $part (tests, steps, compiled, views, loss, loader)" >&2
      exit 2
      ;;
  esac
done
[ ! -d benchmarks/results ] || "$python" -m benchmarks.report # also if a part was cut short
exit $status
