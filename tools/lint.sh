#!/usr/bin/env bash
# lint [--fix]: formatting of every C++ file, then the static checks of .clang-tidy on every source of src/ and tests/.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh

mapfile -t files < <(git ls-files -- '*.cpp' '*.h' | sort)
tools/setup.sh test
if [ "${1:-}" = --fix ]; then
  clang-format-19 -i "${files[@]}"
  exit 0
fi
[ $# -eq 0 ] || { say "lint: no option '$1' (--fix)"; exit 2; }

failed=0
clang-format-19 --dry-run -Werror "${files[@]}" || failed=1
[ $failed = 0 ] || say "formatting differs; ./run lint --fix rewrites it"

# One instruction set is enough to read the code, and clang must be given its own flags; files one by one.
quietly cmake --preset fuzz -B build-lint -DCMAKE_UNITY_BUILD=OFF
mapfile -t sources < <(git ls-files -- 'src/*.cpp' 'tests/*.cpp' ':!tests/fuzz/replay.cpp' | sort)
say "static checks of ${#sources[@]} files"
printf '%s\n' "${sources[@]}" | xargs -P "$(jobs_here)" -n 4 \
  clang-tidy-19 -p build-lint --quiet --warnings-as-errors='*' --extra-arg=-DHEED_PROGRAM='"heed"' 2> >(grep -v 'warnings generated' >&2 || true) || failed=1
exit $failed
