#!/bin/sh
# The demo's guest: fills its disk, then writes and checks without pause, and at the end reads back
# what it wrote at the start. Each block carries a checksum. It knows one address, and keeps to it.
#
# usage: guest.sh URI
#
# What must hold: /results/working appears when the disk is full, /results/exit_code when all is
# over, with the latencies of the writes beside it; it lives on until it is told to stop, because
# the first container to end would end the demo.
set -eu
uri=$1
cd /results
fio=
trap '[ -z "$fio" ] || kill -KILL "$fio"; exit 0' TERM INT

# guest_fio NAME OPTION...: its output is shown only if it fails.
guest_fio() {
  name=$1
  shift
  fio --name="$name" --ioengine=nbd --uri="$uri" --verify=crc32c --verify_fatal=1 "$@" \
    >"$name.log" 2>&1 &
  # In the background: the shell answers a signal only between its commands, or in wait.
  fio=$!
  wait "$fio" || {
    echo "guest: $name failed:"
    cat "$name.log"
    return 1
  }
  fio=
}

work() {
  echo "guest: filling the disk of 1 GiB"
  guest_fio fill --rw=write --bs=1M --iodepth=8 --size=1G --do_verify=0 || return 1
  touch working
  echo "guest: 2,000 random 4 KiB writes a second, read back and checked, for $GUEST_SECONDS s"
  guest_fio load --rw=randwrite --bs=4k --iodepth=16 --offset=768M --size=256M \
    --time_based --runtime="$GUEST_SECONDS" --rate_iops=2000,2000 --verify_backlog=1024 \
    --write_lat_log=load --log_unix_epoch=1 || return 1
  echo "guest: reading back what it did not touch since"
  guest_fio read_back --rw=read --bs=1M --iodepth=8 --size=768M
}

code=0
work || code=1
echo $code >exit_code.new
mv exit_code.new exit_code
sleep infinity &
wait $!
