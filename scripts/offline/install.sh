#!/usr/bin/env bash
# On the GPU machine: take in one piece of prepare.sh, and install in the background whatever is complete.
#
#   scripts/offline/install.sh PIECES/NN SECONDS      run in the root of the checkout, once for each piece, in any order
#
# SECONDS is the time that the jobs may take; the first call sets the deadline. The checkout is copied to
# $WORK/checkout, so that a later change does not reach the jobs. When the packages are installed, jobs.py starts.
# $WORK/log has the logs, and $WORK/ready has a file for each of: base, data, te, mamba, triton. A step that failed is
# named in $WORK/log/install.log, and the next call tries it again.
set -euo pipefail
export WORK=${WORK:-/tmp/offline}

take_in() {  # PIECE SECONDS
  local piece=${1%/} new
  mkdir -p "$WORK"/{pieces,ready,log}
  [ -e "$WORK/until" ] || echo $(($(date +%s) + $2)) > "$WORK/until"
  if [ ! -e "$WORK/checkout" ]; then
    new=$(mktemp -d "$WORK/new.XXXX")
    tar cf - --exclude "./$(dirname "$piece")" --exclude ./.git . | tar xf - -C "$new"
    mv "$new" "$WORK/checkout"
  fi
  # a file appears among the pieces only when it is whole
  new=$(mktemp -d "$WORK/new.XXXX")
  mv "$piece"/* "$new/"
  mv "$new"/* "$WORK/pieces/"
  rmdir "$new"
  echo "$(find "$WORK/pieces" -type f ! -name files.txt | wc -l) of $(wc -l < "$WORK/pieces/files.txt") files are here"
  setsid bash "$WORK/checkout/scripts/offline/install.sh" --complete >> "$WORK/log/install.err" 2>&1 < /dev/null &
}

has() {  # NAME ..: whether all files that begin with these names are here
  local beginning name
  for beginning in "$@"; do
    grep -q "^$beginning" files.txt || return 1
    for name in $(grep "^$beginning" files.txt); do [ -e "$name" ] || return 1; done
  done
}

say() { echo "$(($(cat "$WORK/until") - $(date +%s))) s left: $*" >> "$WORK/log/install.log"; }

step() {  # NAME: install a part, unless that is done or under way
  mkdir "$WORK/begun.$1" 2> /dev/null || return 0
  # a process of its own stops at the first error
  if bash "$WORK/checkout/scripts/offline/install.sh" --step "$1" >> "$WORK/log/install.$1" 2>&1; then
    touch "$WORK/ready/$1"
    say "$1 is ready"
  else
    rmdir "$WORK/begun.$1"
    say "$1 failed: see $WORK/log/install.$1"
  fi
}

complete() {
  cd "$WORK/pieces"
  if has base caches; then
    exec 9> "$WORK/lock"
    flock 9
    step base
    exec 9>&-
    # without the lock, which a process that starts here would hold until it ends
    if [ -e "$WORK/ready/base" ] && mkdir "$WORK/begun.jobs" 2> /dev/null; then start_jobs; fi
  fi
  [ -e "$WORK/ready/base" ] || return 0
  if has train heldout tokenizer manifest; then step data & fi
  if has te; then step te & fi
  if has mamba; then step mamba & fi
  if has triton; then step triton & fi
  wait
}

start_jobs() {
  local gpus
  gpus=$(python3 -c "import torch; print(*range(torch.cuda.device_count()))")
  # shellcheck disable=SC2086
  (cd "$WORK/checkout" && setsid python3 scripts/offline/jobs.py scripts/offline/jobs --logs "$WORK/log" \
    --ready "$WORK/ready" --until "$(cat "$WORK/until")" --gpus $gpus > "$WORK/log/jobs.log" 2>&1 < /dev/null &)
}

wheels() {  # FOLDER WHEEL ..
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$@"
}

install_base() {
  cat caches.part* | tar xJ -C "$WORK" &
  cat base.part* | tar x -C "$WORK"
  wheels "$WORK/site" "$WORK"/wheels/*.whl
  wheels "$WORK/fla-site" "$WORK"/fla/*.whl
  wait $!
}

install_data() {
  local pieces=$PWD
  rm -rf "$WORK/corpus"
  mkdir -p "$WORK/data"
  cp tokenizer.json "$WORK/data/"
  cd "$WORK/checkout"
  . scripts/offline/env.sh
  python3 benchmarks/quality/corpus.py unpack "$WORK/corpus" "$pieces"/{manifest.json,heldout.*.xz,train.*.xz}
  nice -n 10 python3 benchmarks/quality/tokens.py "$WORK/corpus" "$WORK/data"
}

install_te() {
  mkdir -p "$WORK/te"
  cat te.part* | tar x -C "$WORK/te"
  wheels "$WORK/te-site" "$WORK"/te/*.whl
}

install_mamba() {
  cat mamba.part* | tar x -C "$WORK"
  wheels "$WORK/mamba" "$WORK"/mamba/*.whl
}

install_triton() {
  mkdir -p "$WORK/triton-3.9.0"
  cat triton.part* | tar xJ -C "$WORK/triton-3.9.0"
}

case $1 in
  --complete) complete ;;
  --step) cd "$WORK/pieces" && "install_$2" ;;
  *) take_in "$@" ;;
esac
