#!/usr/bin/env bash
# Shows the main job, on a fresh machine: a 1 GiB disk moves to another server while a guest writes to
# it, and the guest goes on without noticing. Installs and builds what is missing first; under two
# minutes after that; leaves nothing behind but the build directory.
#
# The "other host" is nbdkit behind a simulated link of 1 Gb/s; the guest is fio, over NBD, which
# verifies what it has written. Before the switch the guest is frozen for a moment, so that both sides
# can be compared byte for byte while neither changes; the switch itself happens under its load.
set -euo pipefail
# shellcheck source=scripts/deps.sh
. "$(dirname "$0")/deps.sh"

say() { printf '\n== %s\n' "$*"; }
now_ms() { date +%s%3N; }

say "Installing what is missing, building"
install_for build demo
configure "$root/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo
ninja -C "$root/build" -j2 --quiet nbdferry
nbdferry=$root/build/proxy/nbdferry

scratch=$(mktemp -d "${TMPDIR:-/tmp}/nbdferry-demo-XXXXXX")
pids=()
clean_up() {
  for ((i = ${#pids[@]} - 1; i >= 0; --i)); do
    kill "${pids[i]}" 2>/dev/null || continue
    wait "${pids[i]}" 2>/dev/null || true
  done
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
cd "$scratch"

wait_for_socket() {
  for _ in $(seq 100); do
    [ -S "$1" ] && return 0
    sleep 0.05
  done
  echo "nothing came up at $1:" >&2
  cat ./*.log >&2
  return 1
}

# field NAME: of the status, for example paths.0.sent_bytes
field() {
  "$nbdferry" status --control source.img.ctl --json | python3 -c '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    value = value[int(key)] if isinstance(value, list) else value[key]
print(value)' "$1"
}

latency_log=guest_lat.1.log
# shellcheck source=scripts/guest_latencies.sh
. "$root/scripts/guest_latencies.sh"

say "A disk of 1 GiB: 768 MiB of this machine's /usr, and 256 MiB that the guest works on"
truncate -s 1G source.img
{ tar -C / -cf - usr 2>/dev/null || true; } | head -c 768M | dd of=source.img conv=notrunc bs=1M status=none
truncate -s 1G target.img
"$nbdferry" serve source.img 2>ferry.log &
pids+=($!)
ferry=$!
nbdkit -f -U "$scratch/target.sock" --filter=rate file target.img rate=1G 2>nbdkit.log &
pids+=($!)
wait_for_socket source.img.ctl
wait_for_socket target.sock

say "The guest begins: 2,000 random 4 KiB writes and checks a second, for 40 s"
fio --name=guest --ioengine=nbd "--uri=nbd+unix:///?socket=$scratch/source.img.sock" \
  --rw=randwrite --bs=4k --iodepth=16 --offset=768M --size=256M --time_based --runtime=40 \
  --rate_iops=2000,2000 --verify=crc32c --verify_backlog=1024 --verify_fatal=1 \
  --write_lat_log=guest --log_unix_epoch=1 --output=fio.log &
pids+=($!)
fio=$!
sleep 1
before=$(now_ms)
sleep 5

say "Migrate, over 1 Gb/s, under that load"
begin=$(now_ms)
"$nbdferry" migrate --control source.img.ctl --wait "nbd+unix:///?socket=$scratch/target.sock"
in_sync=$(now_ms)
sent=$(field paths.0.sent_bytes)

say "In sync. Freeze the guest, compare both sides byte for byte, let it go on"
kill -STOP "$fio"
for _ in $(seq 200); do
  [ "$(field debt_bytes)" = 0 ] && break
  sleep 0.05
done
identical=no
cmp source.img target.img && identical=yes
kill -CONT "$fio"
sleep 2

say "Switch, under load: from now on the same connection is served from the target"
switching=$(now_ms)
"$nbdferry" switch --control source.img.ctl --pivot
switched=$(now_ms)
kill -0 "$fio" 2>/dev/null || { echo "the guest ended too early to show the switch" >&2; exit 1; }
echo "serving from: $(field serving); the guest goes on until its time is up"
guest_ok=yes
wait "$fio" || guest_ok=no
end=$(now_ms)
kill "$ferry"
ferry_ok=yes
wait "$ferry" || ferry_ok=no
# What the guest does not write to must still be the same.
cmp -n $((768 << 20)) source.img target.img || identical=no

seconds=$(awk -v ms=$((in_sync - begin)) 'BEGIN { printf "%.1f", ms / 1000 }')
rate=$(awk -v bytes="$sent" -v ms=$((in_sync - begin)) 'BEGIN { printf "%.0f", bytes * 1000 / ms / 1048576 }')
longest=$(latencies $((switching - 100)) $((switched + 100)) | tail -n 1)
say "What happened"
cat <<SUMMARY
migrated:        1 GiB in $seconds s: $((sent / 1048576)) MiB sent at $rate MiB/s
guest before:    $(guest "$before" "$begin")
guest during:    $(guest "$begin" "$in_sync")
switch:          $((switched - switching)) ms, the guest's longest write then $((longest / 1000)) ms
guest after:     $(guest "$((switched + 500))" "$((end - 500))")
identical:       $identical (1 GiB, byte for byte)
guest verified:  $guest_ok (its blocks read back and checked, before, during and after)
SUMMARY
if [ "$identical$guest_ok$ferry_ok" != yesyesyes ]; then
  cat fio.log ferry.log >&2
  exit 1
fi
