# shellcheck shell=sh
# What fio's guest saw, from its log of write latencies ($latency_log, --write_lat_log with
# --log_unix_epoch=1). Sourced by demo.sh and by docker/operator.sh, whose shell is plain sh.

# latencies FROM TO: of the guest's writes in that time, sorted, in microseconds.
latencies() {
  awk -F', *' -v from="$1" -v to="$2" '$3 == 1 && $1 >= from && $1 < to { print int($2 / 1000) }' \
    "${latency_log:?}" | sort -n
}

# guest FROM TO: as a person reads it.
guest() {
  latencies "$1" "$2" | awk -v ms=$(($2 - $1)) '{ us[NR] = $1 }
    END { printf "%.0f writes/s, p99 %.1f ms", NR * 1000 / ms, us[int((NR - 1) * 0.99) + 1] / 1000 }'
}
