#!/usr/bin/env bash
# The tests that `make test` runs, on other Pythons and other releases of torch, each in an environment of its own under
# build/matrix, which is removed afterwards: with CUDA, which PyPI's torch brings along on Linux, one takes 7 GB.
#
#   scripts/matrix.sh                          Python 3.10, 3.12 and 3.13 with the pinned torch, and the oldest and the
#                                              newest torch that pyproject.toml admits with the default Python
#   scripts/matrix.sh 3.10:oldest 3.12:2.12.0  these; a torch is pinned, oldest, newest or a version
#
# Pythons are looked for on PATH and among those of pyenv; those not found, and releases of torch that pip does not find
# for a Python, are named and left out. lipgan._C is built in place, for each Python in a file of its own.
# Environment: PYTHON (the default Python, default python3), KEEP=1 (leave the environments), WORKERS (default 2), TESTS
# (folders of tests, all of them by default), ABSENT=1 (no combination that can be run is no failure).
set -euo pipefail
cd "$(dirname "$0")/.."
default=$("${PYTHON:-python3}" -c "import sys; print('%d.%d' % sys.version_info[:2])")
combinations=("$@")
(($#)) || combinations=(3.10:pinned 3.12:pinned 3.13:pinned "$default:oldest" "$default:newest")
oldest=$(sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

# interpreter VERSION: its path. A file named python3.10 may be a shim that finds nothing behind it.
interpreter() {
  local candidate
  for candidate in "${PYTHON:-python3}" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if [[ $("$candidate" -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null) == "$1" ]]; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

summary=() failed=0 ran=0
for combination in "${combinations[@]}"; do
  version=${combination%%:*} torch=${combination#*:}
  constraints=()
  case $torch in
    pinned) torch=$(grep '^torch==' constraints.txt) constraints=(--constraint constraints.txt) ;;
    oldest) torch="torch==$oldest.*" ;;
    newest) torch="torch>=$oldest" ;;
    *) torch="torch==$torch" ;;
  esac
  printf '\n== Python %s, %s (%d s)\n' "$version" "$torch" "$SECONDS"
  if ! python=$(interpreter "$version"); then
    summary+=("Python $version, $torch: left out, there is no such Python here")
    continue
  fi
  folder=build/matrix/${combination/:/-}
  "$python" -m venv "$folder"
  python=$PWD/$folder/bin/python
  log=$folder/pip.log
  if ! "$python" -m pip install --quiet --no-compile "${constraints[@]}" "$torch" >"$log" 2>&1; then
    tail -n 3 "$log"
    summary+=("Python $version, $torch: left out, pip did not install this torch")
  elif ! LIPGAN_NATIVE=on LIPGAN_CUDA=off "$python" -m pip install --quiet --no-compile "${constraints[@]}" "$torch" \
    --editable ".[test]"; then
    summary+=("Python $version, $torch: FAILED, lipgan was not installed")
    failed=1
  else
    name=$("$python" -c "import platform, torch; print('Python', platform.python_version() + ', torch', torch.__version__)")
    status=0
    # shellcheck disable=SC2086  (several folders)
    "$python" -m pytest -n "${WORKERS:-2}" --dist worksteal -m "not slow" -p no:cacheprovider ${TESTS:-} 2>&1 |
      tee "$folder/pytest.log" || status=$?
    summary+=("$name: $(tail -n 1 "$folder/pytest.log")")
    ((status == 0)) || failed=1
    ran=$((ran + 1))
  fi
  [[ ${KEEP:-0} == 1 ]] || rm -rf "$folder"
done

printf '\n== %d of %d combinations ran (%d s)\n' "$ran" "${#combinations[@]}" "$SECONDS"
printf '%s\n' "${summary[@]}"
((!failed && (ran || ${ABSENT:-0})))
