# shellcheck shell=bash
# What the scripts share; sourced with the repository's root as the working directory.

say() { printf '%s\n' "heed: $*" >&2; }
die() {
  say "$*"
  exit 1
}

# Runs a command with its output hidden unless it fails.
quietly() {
  local log
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}

# Compilers at work at once: one for each core, but each may take 1.2 GB (a kernel file for AVX-512 with sanitizers).
jobs_here() {
  local memory by_memory cores
  cores=$(nproc)
  memory=$(awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
  by_memory=$((memory / 1200))
  [ "$by_memory" -ge 1 ] || by_memory=1
  echo "${JOBS:-$((cores < by_memory ? cores : by_memory))}"
}

tree_of() { if [ "$1" = release ]; then echo build; else echo "build-$1"; fi; }

# build_tree PRESET TARGET...: configures and builds. CMakePresets.json says what a preset is. Configuring again costs two
# seconds and sees what was installed since: a tree made for the demo knows of no GoogleTest.
build_tree() {
  local preset=$1 tree
  tree=$(tree_of "$preset")
  shift
  quietly cmake --preset "$preset"
  say "building $tree ($*)"
  cmake --build "$tree" -j "$(jobs_here)" --target "$@"
}
