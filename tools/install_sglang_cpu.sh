#!/usr/bin/env bash
# A real SGLang server for CPU-only Linux on x86_64, in a virtual environment of its own: 1.5 GB, about a minute.
# usage: tools/install_sglang_cpu.sh DIR        (PYTHON: the interpreter, python3.11 unless set)
# Afterwards: bpdg serve student CHECKPOINT --python DIR/bin/python. Does nothing where DIR is up to date.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
directory=$(realpath -m "$1")
recipe=$(realpath "$(dirname "$0")")/sglang_cpu
stamp=$directory/.installed
wanted=$(cd "$recipe" && find . -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    touch "$stamp"
    echo "up to date: $directory"
    exit
fi
if [ -d "$directory" ] && [ -n "$(ls -A "$directory")" ] && [ ! -f "$directory/pyvenv.cfg" ]; then
    echo "error: $directory is not empty and no virtual environment; choose another directory" >&2
    exit 1
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
"${PYTHON:-python3.11}" -m venv --clear "$directory"
python=$directory/bin/python
# torch first and alone, so that nothing else chooses another build of it.
"$python" -m pip install --quiet "$(grep '^torch==' "$recipe/requirements.txt")"
if ! "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
    echo "error: pip found a CUDA build of torch. Name an index of CPU builds and start again, such as" >&2
    echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu $0 $1" >&2
    exit 1
fi
"$python" -m pip install --quiet --no-deps -r "$recipe/requirements.txt"
if "$python" -m pip list --format=freeze | grep -iE '^(nvidia|cuda|triton|sgl-kernel|sglang-kernel|torchvision|flashinfer)'; then
    echo "error: these packages need CUDA and do not belong into a CPU installation" >&2
    exit 1
fi
cp -r "$recipe/standins/." "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1 "$python" -W ignore -c 'import sglang.launch_server, sglang.srt.managers.scheduler'
echo "$wanted" > "$stamp"
echo "installed: SGLang $("$python" -m pip show sglang | sed -n 's/^Version: //p') in $directory"
