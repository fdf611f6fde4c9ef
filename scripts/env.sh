# Sourced by the other scripts: the .venv on the PATH and Ray with a token of the script's own.
#
# A local ray.init() switches token authentication on by writing a token into the user's home, and
# later Ray commands then fail in ways that never mention it. So each script makes a token first, in
# a temporary folder. With RAY_ADDRESS (a cluster that is up already) the caller's settings stand.
# shellcheck shell=bash
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv" PYTHONUNBUFFERED=1
export RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# Some containers set it; each of hundreds of processes would compile the library again.
unset PYTHONDONTWRITEBYTECODE
litecache_tmp=$(mktemp -d)
trap 'rm -rf "$litecache_tmp"' EXIT
if [ -z "${RAY_ADDRESS:-}" ] && [ -z "${RAY_AUTH_TOKEN_PATH:-}" ]; then
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$litecache_tmp/ray-token"
  (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
fi
