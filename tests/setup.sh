# SPDX-License-Identifier: MIT
# Sourced by the run scripts: progress lines, and the tools that a script needs.

say() { printf '== %s\n' "$*"; }

usage_error() {
  echo "$(basename "$0"): $* (--help says more)" >&2
  exit 2
}

# The number of a job option: checks that it is one.
is_number() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

has_header() { printf '#include <%s>\n' "$1" | g++ -x c++ -std=c++20 -E - >/dev/null 2>&1; }

# Prints the Debian packages of those tools that are missing.
missing_packages() {
  local tool
  for tool in "$@"; do
    case $tool in
      g++ | clang-tidy | clang-format-16 | valgrind) command -v "$tool" >/dev/null || echo "$tool" ;;
      cmake) command -v cmake >/dev/null || echo cmake ;;
      ninja) command -v ninja >/dev/null || echo ninja-build ;;
      objdump) command -v objdump >/dev/null || echo binutils ;;
      clang++) command -v clang++ >/dev/null || echo clang ;;
      aarch64-linux-gnu-g++) command -v aarch64-linux-gnu-g++ >/dev/null || echo g++-aarch64-linux-gnu ;;
      qemu-aarch64) command -v qemu-aarch64 >/dev/null || echo qemu-user ;;
      doctest) has_header doctest/doctest.h || echo doctest-dev ;;
      benchmark) has_header benchmark/benchmark.h || echo libbenchmark-dev ;;
      *) usage_error "no package is known for $tool" ;;
    esac
  done
}

# need <tool...>: installs what is missing, or says what to install.
need() {
  local packages root=()
  mapfile -t packages < <(missing_packages "$@")
  if ((${#packages[@]} > 0)); then
    if [[ $(id -u) -ne 0 ]]; then root=(sudo -n); fi
    if ! command -v apt-get >/dev/null || ! "${root[@]}" true 2>/dev/null; then
      echo "$(basename "$0"): please install: ${packages[*]} (the names are Debian's)" >&2
      exit 1
    fi
    say "installing ${packages[*]}"
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  fi
  local version
  version=$(cmake --version | sed -nE '1s/.* ([0-9]+\.[0-9]+).*/\1/p')
  if [[ $(printf '%s\n' 3.25 "$version" | sort -V | head -n 1) != 3.25 ]]; then
    echo "$(basename "$0"): CMake 3.25 or newer is needed, this is $version" >&2
    exit 1
  fi
}

# Runs a command quietly; shows what it printed only if it fails.
quietly() {
  local output
  if ! output=$("$@" 2>&1); then
    printf '%s\n' "$output"
    return 1
  fi
}
