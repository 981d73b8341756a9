#!/usr/bin/env bash
# heed beside llama.cpp: the same model, the same tests, one after the other on this machine.
#   bench/peers/llama.sh MODEL.gguf [-p 512 -n 64 -d 0,4096 -r 3 …]      arguments that both understand
# llama.cpp comes from the source package of llama-cpp-python 0.3.36 on PyPI and is built once in build-peers/ with the
# instruction sets named here, so that the result does not depend on what its build guesses.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

[ $# -ge 1 ] || { sed -n 's/^# \{0,1\}//; 2,4p' "$0" >&2; exit 2; }
model=$1
shift
version=0.3.36
work=build-peers
bench=$work/build/bin/llama-bench

if [ ! -x "$bench" ]; then
  mkdir -p "$work"
  [ -f "$work/llama_cpp_python-$version.tar.gz" ] ||
    python3 -m pip download --no-deps --no-binary llama-cpp-python -d "$work" "llama-cpp-python==$version"
  tar -xzf "$work/llama_cpp_python-$version.tar.gz" -C "$work"
  flags=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DLLAMA_BUILD_NUMBER=1
         -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
         -DLLAMA_BUILD_MTMD=OFF -DLLAMA_BUILD_UI=OFF)
  has() { grep -qw "$1" /proc/cpuinfo; }
  if [ "$(uname -m)" = x86_64 ]; then
    flags+=(-DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON)
    ! has avx512f || flags+=(-DGGML_AVX512=ON)
    ! has avx512_vnni || flags+=(-DGGML_AVX512_VNNI=ON)
    ! has avx512vbmi || flags+=(-DGGML_AVX512_VBMI=ON)
    ! has avx512_bf16 || flags+=(-DGGML_AVX512_BF16=ON)
    # Not its AMX kernels: that build crashes on some machines that have AMX.
  fi
  cmake -S "$work/llama_cpp_python-$version/vendor/llama.cpp" -B "$work/build" -G Ninja "${flags[@]}" >"$work/configure.log"
  cmake --build "$work/build" --target llama-bench llama-perplexity >"$work/build.log"
fi

threads=$(build/heed info --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["threads"])')
rows() { python3 -c '
import json, sys
for r in json.load(sys.stdin):
    test = "pp%d" % r["n_prompt"] if r["n_prompt"] else "tg%d" % r["n_gen"]
    if r["n_depth"]: test += " @ d%d" % r["n_depth"]
    print(sys.argv[1], test, "%.1f" % r["avg_ts"], "%.1f" % r["stddev_ts"], sep="\t")' "$1"; }

{
  build/heed bench -m "$model" -t "$threads" -o json "$@" | rows heed
  "$bench" -m "$model" -t "$threads" -fa 1 -o json "$@" 2>/dev/null | rows llama.cpp
} | python3 -c '
import sys
table = {}
for line in sys.stdin:
    program, test, rate, spread = line.rstrip("\n").split("\t")
    table.setdefault(test, {})[program] = (float(rate), spread)
print("| test | heed t/s | llama.cpp t/s | heed / llama.cpp |")
print("|---|---:|---:|---:|")
for test, row in table.items():
    if len(row) == 2:
        (a, s), (b, u) = row["heed"], row["llama.cpp"]
        print(f"| {test} | {a:.1f} ± {s} | {b:.1f} ± {u} | {a / b:.2f} |")'
