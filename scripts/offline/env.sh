# The environment of a job: `. scripts/offline/env.sh`, in the root of the checkout
export WORK=${WORK:-/tmp/offline}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 TRITON_CACHE_DIR=$WORK/cache-3.6.0
export PYTHONPATH=$WORK/site:$WORK/checkout:$WORK/checkout/kernels
[ ! -e "$WORK/ready/te" ] || PYTHONPATH=$PYTHONPATH:$WORK/te-site
# also keep which configuration of a kernel was the fastest, and what torch.compile has compiled
export TRITON_CACHE_AUTOTUNING=1 TORCHINDUCTOR_CACHE_DIR=$WORK/cache-inductor

# FOLDER MODEL SEED FLAG ..: a run of benchmarks/quality at the rate $LR or 1e-3 that waits for its turn. Megatron gets the
# flags in the variable MEGATRON and those in the file $WORK/flags.
train() {
  # shellcheck disable=SC2046,SC2086
  python3 benchmarks/quality/train.py "$2" --data "$WORK/data" --out "$WORK/log/lm/$1" --lr "${LR:-1e-3}" --seed "$3" \
    --no-checkpoints --turn "$TURN" --until "$UNTIL" "${@:4}" -- ${MEGATRON:-} $(cat "$WORK/flags" 2> /dev/null)
}

# MODEL RATE ..: the sweep of a model, one run for each learning rate. A run has a tenth of the iterations of a full one.
sweep() {
  local lr
  # all of them start now, and they take turns
  for lr in "${@:2}"; do
    LR=$lr train sweep "$1" 1 --iterations 240 --evaluations 2 > "$WORK/log/sweep.$1.$lr.log" 2>&1 &
  done
  wait
}
