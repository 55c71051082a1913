#!/usr/bin/env bash
# On the GPU machine: wait while the jobs run, then print how far they are.
#
#   scripts/offline/wait.sh SECONDS [FOLDER]
#
# FOLDER gets log.tar.xz with all logs. When no job is left, and from a minute before the deadline on, it also gets
# caches.tar.xz with what the machine has compiled and tuned.
#
# The program ends early when no job is left. It fails at once where the installation has not begun. Then the pieces
# base and caches are not complete, or this is a new machine, which has replaced the one that got the first pieces.
set -euo pipefail
WORK=${WORK:-/tmp/offline}
cd "$WORK" 2> /dev/null && [ -e begun.base ] || {
  echo "nothing is being installed in $WORK: send all pieces to this machine, from the first one on"
  exit 1
}
end=$((SECONDS + $1))
while [ $SECONDS -lt $end ] && ! grep -qs "no job is left" log/jobs.log; do sleep 1; done

left=$(($(cat until) - $(date +%s)))
echo "$left s left"
cat log/install.log log/jobs.log 2> /dev/null || true
nvidia-smi --query-gpu=index,utilization.gpu,memory.used --format=csv,noheader || true
for log in log/[0-9s]*.log; do
  [ -e "$log" ] && echo "$log: $(grep -v "^ *warnings.warn\|Warning: " "$log" | tail -n 1)"
done
if [ $# -gt 1 ]; then
  # status 1 says that a log has grown meanwhile
  tar cJf "$2/log.tar.xz" --warning=no-file-changed --exclude index log || [ $? -eq 1 ]
  if [ $left -lt 60 ] || grep -qs "no job is left" log/jobs.log; then
    find cache-* -type f -newer ready/base -print0 | tar cJf "$2/caches.tar.xz" --null -T -
  fi
fi
