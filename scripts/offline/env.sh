# The environment of a job: `. scripts/offline/env.sh`, in the root of the checkout
export WORK=${WORK:-/tmp/offline}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 TRITON_CACHE_DIR=$WORK/cache-3.6.0
export PYTHONPATH=$WORK/site:$WORK/checkout:$WORK/checkout/kernels
[ ! -e "$WORK/ready/te" ] || PYTHONPATH=$PYTHONPATH:$WORK/te-site
# also keep which configuration of a kernel was the fastest, and what torch.compile has compiled
export TRITON_CACHE_AUTOTUNING=1 TORCHINDUCTOR_CACHE_DIR=$WORK/cache-inductor
