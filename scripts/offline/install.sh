#!/usr/bin/env bash
# On the GPU machine: take in one piece of prepare.sh, and install in the background whatever is complete.
#
#   scripts/offline/install.sh PIECE SECONDS      run in the root of the checkout, once for each piece, in any order
#
# SECONDS is the time that the machine still has; the first call sets the deadline. The checkout is copied to
# $WORK/checkout, so that a later change does not reach the jobs. When the packages of the first pieces are installed,
# jobs.py starts. $WORK/log has the logs, and $WORK/ready has a file for each of: base, data, te, mamba, triton.
set -euo pipefail
export WORK=${WORK:-/tmp/offline}
mkdir -p "$WORK"/{pieces,ready,log}
[ -e "$WORK/until" ] || echo $(($(date +%s) + $2)) > "$WORK/until"
if [ ! -e "$WORK/checkout" ]; then
  mkdir "$WORK/checkout"
  tar cf - --exclude "$1" --exclude ./.git . | tar xf - -C "$WORK/checkout"
fi
mv "$1"/* "$WORK/pieces/"

install_complete() {
  exec 9> "$WORK/lock"
  flock 9
  cd "$WORK/pieces"
  say() { echo "$(($(cat "$WORK/until") - $(date +%s))) s left: $*" >> "$WORK/log/install.log"; }
  has() {  # NAME: whether all files that begin with NAME are here
    local names name
    names=$(grep "^$1" files.txt) || return 1
    for name in $names; do [ -e "$name" ] || return 1; done
  }
  pip() { python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$@" >> "$WORK/log/pip.log" 2>&1; }
  start() { [ ! -e "$WORK/begun.$1" ] && touch "$WORK/begun.$1"; }
  finish() { touch "$WORK/ready/$1"; say "$1"; }
  if has base && has caches && start base; then
    cat caches.part* | tar xJ -C "$WORK" &
    cat base.part* | tar x -C "$WORK"
    pip "$WORK/site" "$WORK"/wheels/*.whl
    pip "$WORK/fla-site" "$WORK"/fla/*.whl
    wait
    finish base
    gpus=$(python3 -c "import torch; print(*range(torch.cuda.device_count()))")
    cd "$WORK/checkout"
    # shellcheck disable=SC2086
    setsid python3 scripts/offline/jobs.py scripts/offline/jobs --logs "$WORK/log" --ready "$WORK/ready" \
      --until "$(cat "$WORK/until")" --gpus $gpus > "$WORK/log/jobs.log" 2>&1 < /dev/null 9>&- &
    cd "$WORK/pieces"
  fi
  if has base && has train && has heldout && has tokenizer && [ -e "$WORK/ready/base" ] && start data; then
    (
      . "$WORK/checkout/scripts/offline/env.sh"
      for piece in heldout.*.xz train.*.xz; do xz -dk "$piece" & done
      wait
      mkdir -p "$WORK/corpus" "$WORK/data"
      for side in heldout train; do cat $side.[0-9][0-9] > "$WORK/corpus/$side.txt"; rm $side.[0-9][0-9]; done
      cp tokenizer.json "$WORK/data/"
      cd "$WORK/checkout"
      nice -n 10 python3 benchmarks/quality/tokens.py "$WORK/corpus" "$WORK/data" > "$WORK/log/tokens.log" 2>&1
      finish data
    ) 9>&- &
  fi
  if has te && [ -e "$WORK/ready/base" ] && start te; then
    mkdir -p "$WORK/te" && cat te.part* | tar x -C "$WORK/te"
    pip "$WORK/te-site" "$WORK"/te/*.whl
    finish te
  fi
  if has mamba && start mamba; then
    cat mamba.part* | tar x -C "$WORK"
    pip "$WORK/mamba" "$WORK"/mamba/*.whl
    finish mamba
  fi
  if has triton && start triton; then
    mkdir -p "$WORK/triton-3.9.0" && cat triton.part* | tar xJ -C "$WORK/triton-3.9.0"
    finish triton
  fi
}
export -f install_complete
setsid bash -c 'install_complete' > "$WORK/log/install.err" 2>&1 < /dev/null &
