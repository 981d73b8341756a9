#!/usr/bin/env bash
# Everything that must hold, in the order in which failures are cheapest to read. The last line is "N passed, N failed".
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh

quick=no
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --backend)
      [ $# -ge 2 ] || { say "--backend needs a name"; exit 2; }
      export HEED_BACKEND=$2
      shift
      ;;
    *) say "test: no option '$1' (--quick, --backend NAME)"; exit 2 ;;
  esac
  shift
done

tools/setup.sh test
results=$PWD/build/results
rm -rf "$results"
mkdir -p "$results"
start=$SECONDS

# note NAME ok|failed: a check that is not a GoogleTest program counts as one.
note() {
  echo "$1 $2" >>"$results/checks"
  say "$2: $1"
}

# Tests seldom keep all cores at work and compiling does, so a stage's tests run while the next stage is built; what they
# say is shown when they end.
pending=()
meanwhile() {
  { "$@" >"$results/$2.log" 2>&1 || true; cat "$results/$2.log"; } &
  pending+=($!)
}
trap 'kill "${pending[@]}" 2>/dev/null || true' EXIT

# suites STAGE PRESET [CTEST ARGUMENTS]: runs ctest; tools/count.py reads what the programs wrote.
suites() {
  local stage=$1 tree
  tree=$(tree_of "$2")
  shift 2
  say "$stage: tests ($((SECONDS - start)) s since the start)"
  mkdir -p "$results/$stage"
  echo "$stage" >>"$results/stages"
  GTEST_OUTPUT="json:$results/$stage/" ctest --test-dir "$tree" --output-on-failure --timeout 2400 \
    --output-junit "$results/$stage.xml" "$@" || true
  say "$stage: tests ended ($((SECONDS - start)) s since the start)"
}

# compiled STAGE PRESET TARGET...: whether it builds; a build that fails is a failed check and its tests do not run.
compiled() {
  local stage=$1
  shift
  say "$stage: build ($((SECONDS - start)) s since the start)"
  build_tree "$@" || { note "$stage-build" failed; return 1; }
}

# The sanitizers' tests, and meanwhile each fuzz target: its kept inputs and a few seconds of new ones. Reference kernels take ten
# times as long here and have tests of their own, so of the mechanisms' six settings one runs, the best table with groups of 3:
# others walk the same memory, and the sixth, in guarded memory, looks for what the sanitizers see anyhow. Every
# mechanism runs in sessions with a small budget, on the best table too; identities in sessions and evictions beside a mask,
# recomputed by reference kernels, are left to the release tests. So are recurrences and segments where the number alone is what
# is tested (two minutes of work), and comparisons with other programs' numbers or with a decomposition's (one and a half).
# The best table is here the exact one of AVX2, since golden files are of f32; what rounds runs in the kernels' tests.
sanitized() {
  local left_out='*RealModel*:*GreedyTest.*:Recording.*:Guarded.*:*EveryIdentity*:*EqualsTheUntilMask*:All/Golden.*:Xkv.*:*LongAndShort*:*.*_many'
  # Fuzzing meanwhile: one behind the other, it was the last to end by a minute.
  fuzzed >"$results/fuzz.log" 2>&1 &
  local fuzzing=$!
  GTEST_FILTER="-$left_out:Settings/*/0:Settings/*/1:Settings/*/2:Settings/*/4:Settings/*/5" HEED_CASES=0.1 \
    HEED_BACKEND=${HEED_BACKEND:-avx2} \
    suites "$1" fuzz -j 2 -E '^(apps|lab)$'
  wait $fuzzing
  cat "$results/fuzz.log"
}

fuzzed() {
  local program target
  for program in build-fuzz/fuzz_*; do
    [ -x "$program" ] || continue
    target=${program##*/fuzz_}
    if tools/fuzz.sh --built "$target" 6; then note "fuzz-$target" ok; else note "fuzz-$target" failed; fi
  done
}

# On a GPU the release tests alone run: the other stages look for what does not depend on a device.
gpu=no
[ "${HEED_BACKEND:-}" != cuda ] || { gpu=yes quick=yes; }

if compiled release release all; then
  if [ $gpu = yes ] && ! build/heed info --json | grep -q '"cuda"'; then
    say "test: --backend cuda: $(build/heed info | sed -n 's/^gpu *//p')"
    exit 2
  fi
  HEED_CASES=${HEED_CASES:-0.4} meanwhile suites release release -j 2
fi

if [ $quick = no ]; then
  export ASAN_OPTIONS=detect_stack_use_after_return=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
  export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1

  # Addresses and undefined behaviour: everything except what runs whole models; a tenth of the random cases, since each
  # takes ten times as long.
  targets=(fuzzers)
  for source in tests/*/*.cpp; do
    folder=$(basename "$(dirname "$source")")
    case " data fuzz apps lab ${targets[*]} " in *" $folder "* | *" test_$folder "*) ;; *) targets+=("test_$folder") ;; esac
  done
  if compiled sanitizers fuzz "${targets[@]}"; then meanwhile sanitized sanitizers; fi

  # Data races: what shares memory between threads (all code points in turn share none and take 14 s).
  if compiled threads tsan tests; then GTEST_FILTER='-Utf8.*' HEED_CASES=0.03 meanwhile suites threads tsan; fi

  # Arm kernels, emulated: about fifty times slower than this machine, so a thirtieth of the cases, and nothing long.
  if compiled arm aarch64 tests; then GTEST_FILTER='-*LongAndShort*:*LongSegments*' HEED_CASES=0.03 meanwhile suites arm aarch64; fi
fi
wait

say "took $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
python3 tools/count.py "$results"
