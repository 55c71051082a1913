#!/usr/bin/env bash
# Prepare everything that measurements on a GPU machine without a network need, as pieces of at most 60 MB.
#
#   scripts/offline/prepare.sh PIECES      run in the root of the checkout
#
# PIECES gets folders 01, 02, .. for install.sh. Results of each step stay in build/offline, and a second call repeats
# what is missing there, and compiles the kernels that have changed.
#
#   TE=folder        wheels of transformer-engine, transformer-engine-cu13 and transformer-engine-torch 2.20.2, which
#                    training needs. PyPI has no wheel of the last one: `pip wheel transformer-engine-torch` builds it
#   CORPUS=0         leaves out the text and what trains language models. Otherwise apt-get downloads Debian's packages
#   RIVALS=0         leaves out Triton 3.9, and mamba-ssm with causal-conv1d, which nvcc of CUDA 13 compiles
set -euo pipefail
here=scripts/offline build=build/offline python=$PWD/.venv/bin/python fla=$PWD/.venv/fla
pieces=${1:?give the folder of the pieces: scripts/offline/prepare.sh PIECES}
WORK=${WORK:-/tmp/offline} TE=${TE:-} CORPUS=${CORPUS:-1} RIVALS=${RIVALS:-1}
if [ -e "$pieces" ] && [ ! -e "$pieces/01/files.txt" ]; then
  echo "$pieces exists and has no pieces: give another folder"
  exit 1
fi
mkdir -p $build/log "$WORK"
make .venv/.installed .venv/fla .venv/triton-3.9.0
background=()

now() {  # NAME COMMAND ..: run a command in a process that stops at the first error, with a log of its own
  local begin=$SECONDS
  "${@:2}" > "$build/log/$1" 2>&1 &
  wait $! || { echo "$1 failed: see $build/log/$1"; return 1; }
  echo "$1: $((SECONDS - begin)) s"
}

once() {  # NAME COMMAND ..: run a command unless it has succeeded before
  if [ -e "$build/$1.done" ]; then return; fi
  now "$@"
  touch "$build/$1.done"
}

wheels() {  # FOLDER REQUIREMENT ..
  $python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
    --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    -d "$build/$1" "${@:2}"
}

corpus() {
  $python benchmarks/quality/corpus.py build $build/corpus
  # the machine encodes the text, which takes many cores
  $python benchmarks/quality/tokens.py $build/corpus $build/data --learn-only
}

source_of() {  # NAME==VERSION FOLDER: the source of a package on PyPI
  rm -rf "$2"
  mkdir -p "$2"
  $python -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$2" "$1"
  tar xzf "$2"/*.tar.gz -C "$2" --strip-components 1
}

mamba_ssm() {  # its Triton kernels, without the imports that ask for its CUDA extension
  source_of mamba-ssm==2.3.2.post1 $build/source/mamba-ssm
  sed -i '/^from mamba_ssm/d' $build/source/mamba-ssm/mamba_ssm/__init__.py
  mkdir -p $build/mamba
  cp -r $build/source/mamba-ssm/mamba_ssm $build/mamba/
}

causal_conv1d() {  # for sm_90 alone
  source_of causal-conv1d==1.7.0 $build/source/causal-conv1d
  # without its own list of architectures, the build takes that of TORCH_CUDA_ARCH_LIST
  sed -i '/-gencode/d; /"arch=compute_/d
    s/^\( *\)if bare_metal_version >= Version("1[123]\.[08]"):$/\1if True:\n\1    pass/' $build/source/causal-conv1d/setup.py
  $python -m pip install -q ninja wheel
  PATH=$(dirname "$python"):$PATH CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=2 TORCH_CUDA_ARCH_LIST=9.0 \
    CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} "$python" -m pip wheel -q --no-build-isolation --no-deps -w $build/mamba \
    $build/source/causal-conv1d
}

newer_triton() {  # Triton 3.9 without debugging symbols and without what a Hopper GPU does not need
  local folder=$build/triton-3.9.0
  rm -rf $folder
  cp -r .venv/triton-3.9.0 $folder
  strip --strip-unneeded $folder/triton/_C/libtriton.so
  rm -rf $folder/bin $folder/triton/{FileCheck,_C/libproton.so,backends/amd/lib} \
    $folder/triton/backends/nvidia/{bin/cuobjdump,bin/nvdisasm,bin/ptxas-blackwell,lib/cupti,lib/cupti-blackwell}
  # PyTorch looks for this program, also on other GPUs
  ln -s ptxas $folder/triton/backends/nvidia/bin/ptxas-blackwell
  find $folder -name __pycache__ -prune -exec rm -rf {} +
  tar cf - -C $folder . | xz -3 > $build/triton.tar.xz
}

fill() {  # TRITON PYTHONPATH PROGRAM [ARGUMENT ..]: run a program without a GPU, and keep what it compiles
  # -O, because fla asserts what tensors without numbers do not have
  TRITON_CACHE_DIR=$WORK/cache-$1 PYTHONPATH=$2:$PWD/kernels:$PWD $python -O scripts/compile_for_gpu.py "${@:3}"
}

cut_up() {  # FILE NAME: cut a file into NAME.part00, NAME.part01, ..
  split -b 55000000 -d -a 2 "$1" "$build/parts/$2.part"
}

once wheels wheels wheels megatron-core==0.19.2 transformers==5.24.0 omegaconf==2.4.0 pydantic==2.14.3 \
  pydantic-core==2.50.4 annotated-types typing-inspection nvdlfw-inspect importlib-metadata flask==3.1.3 \
  flask-restful werkzeug itsdangerous blinker aniso8601 pytz
once fla wheels fla fla-core==0.6.0 flash-linear-attention==0.6.0
if [ "$RIVALS" != 0 ]; then
  once triton newer_triton
  once mamba_ssm mamba_ssm
  once causal_conv1d causal_conv1d &
  background+=($!)
fi
if [ "$CORPUS" != 0 ]; then
  once corpus corpus
  once packed $python benchmarks/quality/corpus.py pack $build/corpus $build/packed &
  background+=($!)
fi
now fill-fla fill 3.6.0 "$fla" $here/fill/fla_hgrn2.py
now fill-training fill 3.6.0 "" $here/fill/training_shapes.py
# without numbers no test passes
now fill-tests fill 3.6.0 "" -m pytest -q -m gpu tests/kernels/test_hopper.py || true
now fill-operator fill 3.6.0 "" benchmarks/operator_times.py
for program in needle state_tracking; do
  now fill-$program fill 3.6.0 "" benchmarks/quality/$program.py --compile --out nothing.json
done
now fill-mqar fill 3.6.0 "" benchmarks/quality/mqar.py --widths 512 --compile --out nothing.json
if [ "$RIVALS" != 0 ]; then
  newer=$PWD/$build/triton-3.9.0
  now fill-mamba2 fill 3.6.0 $build/mamba $here/fill/mamba2.py
  now fill-gated-delta-net fill 3.9.0 "$newer:$fla" $here/fill/gated_delta_net.py
fi
for step in "${background[@]}"; do wait "$step"; done

rm -rf "$pieces" $build/parts $build/travels
mkdir -p "$pieces" $build/parts $build/travels
cp -r "$WORK"/cache-* $build/travels/
$python $here/launchable.py $build/travels/cache-*
tar cf - -C $build/travels . | xz -3 > $build/caches.tar.xz
tar cf $build/base.tar -C $build wheels fla
cut_up $build/caches.tar.xz caches
cut_up $build/base.tar base
if [ "$RIVALS" != 0 ]; then
  cut_up $build/triton.tar.xz triton
  tar cf $build/mamba.tar -C $build mamba
  cut_up $build/mamba.tar mamba
fi
if [ "$CORPUS" != 0 ]; then
  cp $build/packed/*.xz $build/packed/manifest.json $build/data/tokenizer.json $build/parts/
fi
if [ -n "$TE" ]; then
  tar cf $build/te.tar -C "$TE" .
  cut_up $build/te.tar te
fi
$python $here/pieces.py $build/parts "$pieces"
