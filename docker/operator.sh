#!/bin/sh
# The operator's part of the demo: what one types at the source's host, and a summary of what it did
# to the guest. Exit code 0 only if nothing was lost.
#
# usage: operator.sh URI-OF-THE-DESTINATION
set -eu
uri=$1
control=/run/nbdferry/control.sock
cd /results

say() { printf '\n== %s\n' "$*"; }
now_ms() { date +%s%3N; }

# field NAME: a number of the status; the first of that name.
field() {
  nbdferry status --control $control --json | grep -o "\"$1\":[0-9]*" | head -n 1 | cut -d: -f2
}

# wait_for FILE SECONDS: made by the guest.
wait_for() {
  tries=$(($2 * 10))
  until [ -e "$1" ]; do
    tries=$((tries - 1))
    if [ $tries -eq 0 ] || { [ -e exit_code ] && [ ! -e "$1" ]; }; then
      echo "the guest did not get there: no $1" >&2
      exit 1
    fi
    sleep 0.1
  done
}

latency_log=load_lat.1.log
# shellcheck source=scripts/guest_latencies.sh
. /guest_latencies.sh

wait_for working 300
say "The guest works. Its disk moves in five seconds"
before=$(now_ms)
sleep 5

say "nbdferry migrate --wait $uri"
begin=$(now_ms)
nbdferry migrate --control $control --wait "$uri"
in_sync=$(now_ms)
sent=$(field sent_bytes)

say "nbdferry verify: both sides compared block by block, while the guest writes"
nbdferry verify --control $control
verified=$(field verified_bytes)
mismatched=$(field mismatched_bytes)

say "nbdferry switch --pivot: from now on the guest's connection is served from the destination"
switching=$(now_ms)
nbdferry switch --control $control --pivot
switched=$(now_ms)
if [ -e exit_code ]; then
  echo "the guest ended too early to show the switch: set GUEST_SECONDS in compose.yaml" >&2
  exit 1
fi
echo "the guest goes on until its time is up"
wait_for exit_code 600
end=$(stat -c %Y000 load_lat.1.log)

guest_ok=no
[ "$(cat exit_code)" = 0 ] && guest_ok=yes
identical=no
[ "$verified" = $((1 << 30)) ] && [ "$mismatched" = 0 ] && identical=yes
# By other means too: what the guest has not written to since must be the same in both files.
cmp -n $((768 << 20)) /source/disk.img /destination/disk.img || identical=no

seconds=$(awk -v ms=$((in_sync - begin)) 'BEGIN { printf "%.1f", ms / 1000 }')
rate=$(awk -v bytes="$sent" -v ms=$((in_sync - begin)) 'BEGIN { printf "%.0f", bytes * 1000 / ms / 1048576 }')
longest=$(latencies $((switching - 100)) $((switched + 100)) | tail -n 1)
say "What happened"
cat <<SUMMARY
migrated:        1 GiB in $seconds s: $((sent / 1048576)) MiB sent ($sent bytes) at $rate MiB/s
guest before:    $(guest "$before" "$begin")
guest during:    $(guest "$begin" "$in_sync")
switch:          $((switched - switching)) ms, the guest's longest write then $((longest / 1000)) ms
guest after:     $(guest "$((switched + 500))" "$((end - 2000))")
identical:       $identical (1 GiB compared before the switch, $mismatched bytes differed)
guest verified:  $guest_ok (its blocks read back and checked, before, during and after)
SUMMARY
[ "$identical$guest_ok" = yesyes ]
