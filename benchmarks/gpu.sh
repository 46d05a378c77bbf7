#!/usr/bin/env bash
# Everything that a GPU has to prove, from a bare clone: nothing is installed.
#
#   bash benchmarks/gpu.sh [PART ...] [-- options of benchmarks.gpu]
#
#   PART   tests, steps, views, loss, loader (these five if none is given: under 10 minutes in all)
#          or compiled (the same steps with torch.compile; up to 9 minutes, in a call of its own)
#
#   bash benchmarks/gpu.sh steps loss -- --out results/gpu.json
#   bash benchmarks/gpu.sh loader -- --photos /data/photographs
#   bash benchmarks/gpu.sh steps views loss loader -- --device cpu --tiny     # does it run?
#
# A part that fails or runs into its limit does not stop the next; its rows so far are saved.
# Needs python3 (or $PYTHON) with torch, torchvision, timm and what the check below names.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

parts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do parts+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#parts[@]} -gt 0 ] || parts=(tests steps views loss loader)

"$python" - <<'CHECK' || exit 2
import importlib.util, sys

needed = {
    "torch": "torch", "torchvision": "torchvision", "timm": "timm", "numpy": "numpy", "PIL": "pillow",
    "pydantic": "pydantic", "pydantic_core": "pydantic-core", "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection", "tyro": "tyro", "docstring_parser": "docstring-parser",
    "typeguard": "typeguard", "rich": "rich", "markdown_it": "markdown-it-py", "mdurl": "mdurl",
    "pygments": "pygments", "jaxtyping": "jaxtyping", "wadler_lindig": "wadler-lindig",
    "safetensors": "safetensors", "pyarrow": "pyarrow", "yaml": "PyYAML", "simplejpeg": "simplejpeg",
    "tensorboard": "tensorboard",
}
wanted = {"pytest": "pytest", "beartype": "beartype", "kornia": "kornia", "kornia_rs": "kornia-rs"}

def missing(modules):
    return [name for module, name in modules.items() if importlib.util.find_spec(module) is None]

if missing(wanted):
    print("absent, so tests check no shapes or views have no peer:", *missing(wanted))
if missing(needed):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    print("missing:", *missing(needed), file=sys.stderr)
    print("elsewhere: python3 -m pip download --no-deps --only-binary=:all: --python-version", version,
          "-d wheels", *missing({**needed, **wanted}), file=sys.stderr)
    print("here: python3 -m pip install --no-index --no-deps --target site wheels/*.whl;",
          'export PYTHONPATH="$PWD/site"', file=sys.stderr)
    sys.exit(2)
CHECK
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

status=0
measure() { # part, minutes after which nothing new starts, limit in seconds, options
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
        tests/test_cuda.py || { echo "tests ended with $?"; status=1; }
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
exit $status
