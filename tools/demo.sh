#!/usr/bin/env bash
# A dozen ways to attend to the same text, next to dense attention: what each costs in quality, saves in time and memory.
# LENGTH (4096) tokens are read; the last of them are predicted one by one with what each mechanism kept.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh

budget=512 # entries that each KV head keeps or reads: an eighth of the text
mechanisms=(
  dense
  "streaming-llm(window=$((budget - 4)))"
  "snapkv(budget=$budget)"
  "pyramidkv(budget=$budget,window=16)" # with the default window its smallest layer would be smaller than the window: no pyramid
  "adakv(snapkv(budget=$budget))"
  "h2o(budget=$budget)"
  "tova(budget=$budget)"
  "kvzip(budget=$budget)"
  "quest(budget=$budget)"
  "tidal-decode(budget=$budget)"
  "kivi"
  "flexprefill"
  "xattention(threshold=0.9)+adakv(snapkv(budget=$budget))"
)
arguments=()
for spec in "${mechanisms[@]}"; do arguments+=(--attention "$spec"); done

mkdir -p out
# On the processor also where there is a GPU, as the table in README.md was made.
build/heed compare --backend cpu -m models/smollm2-135m.gguf -f models/text.txt -c "${LENGTH:-4096}" "${arguments[@]}" \
  --report out/report.html "$@"
say "the same with charts: file://$PWD/out/report.html"
