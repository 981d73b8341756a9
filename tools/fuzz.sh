#!/usr/bin/env bash
# fuzz [TARGET [SECONDS]]: replays tests/fuzz/corpus/TARGET, then looks for new inputs that crash, hang or leak. New
# inputs that reach new code go to build-fuzz/corpus/TARGET, crashes to build-fuzz/crashes; --built skips building.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh

built=no
if [ "${1:-}" = --built ]; then
  built=yes
  shift
fi
targets=()
for source in tests/fuzz/*.cpp; do
  name=$(basename "$source" .cpp)
  [ "$name" = replay ] || [ "$name" = '*' ] || targets+=("$name")
done
if [ $# -eq 0 ]; then
  echo "fuzz targets: ${targets[*]:-none}"
  exit 0
fi
target=$1 seconds=${2:-60}
[ -f "tests/fuzz/$target.cpp" ] || { say "fuzz: no target '$target' (there are: ${targets[*]:-none})"; exit 2; }
[[ $seconds =~ ^[0-9]+$ ]] || { say "fuzz: '$seconds' is not a number of seconds"; exit 2; }

if [ $built = no ]; then
  tools/setup.sh test
  build_tree fuzz "fuzz_$target"
fi
kept=tests/fuzz/corpus/$target
found=build-fuzz/corpus/$target
mkdir -p "$found" build-fuzz/crashes
inputs=("$found")
[ ! -d "$kept" ] || inputs+=("$kept")
dictionary=()
[ ! -f "tests/fuzz/$target.dict" ] || dictionary=(-dict="tests/fuzz/$target.dict")
limits=(-rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=25 -max_len=65536 -artifact_prefix="build-fuzz/crashes/$target-")
if [ -d "$kept" ]; then
  quietly "build-fuzz/fuzz_$target" "${limits[@]}" -max_len=16777216 -runs=0 "$kept"
fi
say "fuzzing $target for $seconds s"
log=build-fuzz/fuzz-$target.log
if ! "build-fuzz/fuzz_$target" "${limits[@]}" "${dictionary[@]}" -max_total_time="$seconds" -print_final_stats=1 \
  "${inputs[@]}" >"$log" 2>&1; then
  tail -60 "$log" >&2
  say "$target failed; the input lies in build-fuzz/crashes (run build-fuzz/fuzz_$target FILE to see it again)"
  exit 1
fi
say "$target: $(awk '/number_of_executed_units/ {print $2}' "$log") inputs, none failed"
