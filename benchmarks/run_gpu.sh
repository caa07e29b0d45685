#!/usr/bin/env bash
# Everything that needs a GPU, with one command, without network and without installing anything:
#
#   benchmarks/run_gpu.sh OUT [STEP ...]
#
# STEP: tests (what the suite skips elsewhere), speed (float32, TF32, bfloat16, compiled; context 1024), layers (the
# other layers and kinds), members, precision (what bfloat16 does to quality), fraction (what a KL at a share of the
# positions does); default: all of them. OUT gets a JSON file for each, and log.txt. A step that fails does not stop
# the others; the exit status is 1 then.
#
#   PYTHON=...      the Python to use (default: python3); packages may be on PYTHONPATH
#   DEVICE=cpu      a dry run: the same commands on tiny shapes
#   PRECISION_ARGS, FRACTION_ARGS   further arguments of those two, e.g. "--kinds e2e --seeds 2" where time is short
set -uo pipefail

[ $# -ge 1 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests speed layers members precision fraction)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
failed=()

if [ "$device" = cpu ]; then
    main=demo-e2e+ds others=(stories260k-local) members=(demo-local-x8)
    export OMP_NUM_THREADS=1 # several threads on tiny tensors only cost time
    shape=(--context 16 --rows 2 --twin-rows 1 --rounds 1)
    quality=(--n-samples 16 --seeds 1) fraction=(--n-samples 16 --seeds 1 --rounds 1)
else
    main=gpt2-L6-e2e+ds-46080
    others=(gpt2-L2-e2e+ds-46080 gpt2-L10-e2e+ds-46080 gpt2-L6-e2e-46080 gpt2-L6-local-46080 gpt2-L6-e2e+ds-6144)
    members=(gpt2-L10-local-1536-x8 gpt2-L6-e2e-6144-x8)
    # 32 rows fill the GPU; the twin's logits and attention scores of so many would not fit: 8, as in the paper's runs.
    shape=(--context 1024 --rows 32 --twin-rows 8 --rounds 5 --steps 4)
    quality=(--seeds 3) fraction=(--seeds 3)
fi
bfloat16=(--set autocast=bfloat16 --set tf32=true)

try() { # try NAME COMMAND...: notes what failed, and goes on
    local name=$1 begin=$SECONDS
    shift
    printf '\n===== %s: %s\n' "$name" "$*"
    if "$@" </dev/null; then
        printf '===== %s: %d s\n' "$name" $((SECONDS - begin))
    else
        printf '===== %s: FAILED after %d s\n' "$name" $((SECONDS - begin))
        failed+=("$name")
    fi
}

bench() { # bench NAME ARGUMENT...
    local name=$1
    shift
    try "$name" "$python" -m benchmarks "$@" "${shape[@]}" --device "$device" --json "$out/$name.json"
}

run_step() {
    case $1 in
    tests)
        local options=()
        # The suite's run-time shape checks need it; the tests do not.
        "$python" -c 'import beartype' 2>/dev/null || options=(-o "addopts=--import-mode=importlib")
        try tests "$python" -m pytest -q -p no:cacheprovider "${options[@]}" -m gpu tests
        ;;
    speed)
        bench speed-float32 "$main" --memory
        bench speed-tf32 "$main" --set tf32=true
        bench speed-bfloat16 "$main" --memory "${bfloat16[@]}"
        bench speed-bfloat16-compiled "$main" "${bfloat16[@]}" --set compile=true
        ;;
    layers) bench layers-bfloat16 "${others[@]}" "${bfloat16[@]}" ;;
    members) bench members-bfloat16 "${members[@]}" "${bfloat16[@]}" ;;
    precision)
        # shellcheck disable=SC2086 # several words
        try precision "$python" -m benchmarks.precision "${quality[@]}" ${PRECISION_ARGS:-} --device "$device" \
            --json "$out/precision.json"
        ;;
    fraction)
        # shellcheck disable=SC2086
        try fraction "$python" -m benchmarks.position_fraction "${fraction[@]}" ${FRACTION_ARGS:-} --device "$device" \
            --json "$out/fraction.json"
        ;;
    *)
        echo "no step is called '$1': choose from tests, speed, layers, members, precision, fraction" >&2
        failed+=("$1")
        ;;
    esac
}

run_all() {
    "$python" -c 'import sys, torch; print(sys.version.split()[0], "torch", torch.__version__, torch.version.cuda)'
    [ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    local step
    for step in "${steps[@]}"; do run_step "$step"; done
    printf '\n%s\n' "${failed[*]:+failed: ${failed[*]}}"
    [ ${#failed[@]} -eq 0 ]
}

run_all 2>&1 | tee "$out/log.txt"
