# For gpu_check.sh --rehearse: a copy of the tree, which is what the check then builds in and writes to, and stand-ins for the
# programs and the GPU. `cmake` makes the module that the tree has already; Python sees one GPU of compute capability 9.0,
# on which the GPU tests skip themselves; of the benchmarks and of tuning only the arguments are read.
REHEARSAL=$(mktemp -d)
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$REHEARSAL" || return 1
cp vtok_fast/_C*.so "$REHEARSAL/vtok_fast/" || return 1
cd "$REHEARSAL" || return 1
mkdir -p stand-ins
cat >stand-ins/cmake <<'END'
#!/bin/sh
[ "$1" = --build ] && exec cp vtok_fast/_C*.so "$2"/
for argument; do
  [ "$before" = -B ] && mkdir -p "$argument"
  before=$argument
done
END
cat >stand-ins/nvidia-smi <<'END'
#!/bin/sh
echo "NVIDIA H200 (rehearsal), 9.0"
END
cat >stand-ins/compute-sanitizer <<'END'
#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = --tool ] || [ "$1" = --error-exitcode ] && shift; shift; done
exec "$@"
END
cat >stand-ins/ncu <<'END'
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
exec "$@"
END
cat >stand-ins/sitecustomize.py <<'END'
import sys

import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "rehearsal"
if "pytest" in " ".join(sys.orig_argv) or "vtok_fast.cli" in " ".join(sys.orig_argv):
    torch.cuda.is_available = lambda: False  # as it is: tests and commands say so themselves
END
cat >stand-ins/python <<END
#!/bin/sh
case " \$* " in
  *" vtok_fast.cli tune "* | *" vtok_fast.cli bench "*) exec "$PYTHON" "\$@" --help ;;
esac
exec "$PYTHON" "\$@"
END
mkdir stand-ins/pybind11
touch stand-ins/pybind11/__init__.py
echo 'print("stand-ins")' >stand-ins/pybind11/__main__.py
printf '#!/bin/sh\n' | tee stand-ins/nvcc >stand-ins/ninja
chmod +x stand-ins/python stand-ins/nvcc stand-ins/ninja stand-ins/cmake stand-ins/nvidia-smi stand-ins/compute-sanitizer stand-ins/ncu
SLOW=10  # times what a GPU's machine would take
export PATH=$PWD/stand-ins:$PATH PYTHONPATH=$PWD/stand-ins VTOK_REHEARSE=1
PYTHON=$PWD/stand-ins/python
