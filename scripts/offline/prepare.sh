#!/usr/bin/env bash
# Prepare everything that measurements on a GPU machine without a network need, as pieces of at most 60 MB.
#
#   scripts/offline/prepare.sh PIECES      run in the root of the checkout, after `make .venv/.installed .venv/fla`
#
# PIECES gets folders 01, 02, .. for install.sh. The machine has Python 3.12, PyTorch 2.11 with CUDA 13, Triton 3.6,
# einops and pytest. Results of each step stay in build/offline, and a second call repeats only what is missing there.
#
#   TE=folder        wheels of transformer-engine, transformer-engine-cu13 and transformer-engine-torch 2.20.2, which
#                    training needs; the last one has to be built
#   CORPUS=0         leaves out the text and what trains language models
#   RIVALS=0         leaves out Triton 3.9 for gated delta net, and mamba-ssm and causal-conv1d, which nvcc compiles
#   FILL="a b"       programs in scripts/offline/fill/ that fill Triton's cache; all of them if it is not set
set -euo pipefail
here=scripts/offline build=build/offline python=$PWD/.venv/bin/python pieces=$1
WORK=${WORK:-/tmp/offline} TE=${TE:-} CORPUS=${CORPUS:-1} RIVALS=${RIVALS:-1}
mkdir -p $build/log "$WORK"

once() {  # NAME COMMAND ..: run a command unless it has succeeded before
  [ -e "$build/$1.done" ] && return
  local begin=$SECONDS
  "${@:2}" > "$build/log/$1" 2>&1 || { echo "$1 failed: see $build/log/$1"; return 1; }
  touch "$build/$1.done"; echo "$1: $((SECONDS - begin)) s"
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

mamba() {  # mamba-ssm without its CUDA extension, and causal-conv1d for sm_90 alone
  local source=$PWD/$build/source
  mkdir -p $build/mamba && rm -rf "$source" && mkdir "$source"
  $python -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$source" mamba-ssm==2.3.2.post1 \
    causal-conv1d==1.7.0
  (cd "$source" && for x in *.tar.gz; do tar xzf "$x"; done
    sed -i '/^from mamba_ssm/d' mamba_ssm-2.3.2.post1/mamba_ssm/__init__.py
    cd causal_conv1d-1.7.0 && sed -i '/-gencode/d; /"arch=compute_/d' setup.py
    # the conditions around the deleted lines need a body
    sed -i 's/^\( *\)if bare_metal_version >= Version("1[123]\.[08]"):$/\1if True:\n\1    pass/' setup.py)
  cp -r "$source"/mamba_ssm-2.3.2.post1/mamba_ssm $build/mamba/
  $python -m pip install -q ninja wheel
  (cd "$source"/causal_conv1d-1.7.0 && PATH=$(dirname "$python"):$PATH CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=2 \
    TORCH_CUDA_ARCH_LIST=9.0 CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} "$python" -m pip wheel -q --no-build-isolation --no-deps \
    -w "$source/../mamba" .)
}

newer_triton() {  # Triton 3.9 without debugging symbols and without what a Hopper GPU does not need
  local folder=$build/triton-3.9.0
  $python -m pip install -q --no-deps --upgrade --target $folder triton==3.9.0
  strip --strip-unneeded $folder/triton/_C/libtriton.so
  rm -rf $folder/bin $folder/triton/{FileCheck,_C/libproton.so,backends/amd/lib} \
    $folder/triton/backends/nvidia/{bin/cuobjdump,bin/nvdisasm,bin/ptxas-blackwell,lib/cupti,lib/cupti-blackwell}
  # PyTorch looks for this program, also on other GPUs
  ln -s ptxas $folder/triton/backends/nvidia/bin/ptxas-blackwell
  find $folder -name __pycache__ -prune -exec rm -rf {} +
  tar cf - -C $folder . | xz -6 > $build/triton.tar.xz
}

fill() {  # NAME: run scripts/offline/fill/NAME.py without a GPU, and keep what it compiles
  local program=$here/fill/$1.py path=$PWD/kernels:$PWD
  local triton=3.6.0
  case $1 in
    gated_delta_net) triton=3.9.0 path=$PWD/$build/triton-3.9.0:$PWD/.venv/fla:$path ;;
    mamba2) path=$PWD/$build/mamba:$path ;;
    fla_hgrn2) path=$PWD/.venv/fla:$path ;;
  esac
  # -O, because fla asserts what tensors without numbers do not have
  TRITON_CACHE_DIR=$WORK/cache-$triton PYTHONPATH=$path $python -O scripts/compile_for_gpu.py "$program"
}

cut_up() {  # FILE NAME: cut a file into NAME.part00, NAME.part01, ..
  split -b 55000000 -d -a 2 "$1" "$build/parts/$2.part"
}

background=()
once wheels wheels wheels megatron-core==0.19.2 transformers==5.24.0 omegaconf==2.4.0 pydantic==2.14.3 \
  pydantic-core==2.50.4 annotated-types typing-inspection nvdlfw-inspect importlib-metadata flask==3.1.3 \
  flask-restful werkzeug itsdangerous blinker aniso8601 pytz
once fla wheels fla fla-core==0.6.0 flash-linear-attention==0.6.0
if [ "$RIVALS" != 0 ]; then
  once triton newer_triton
  once mamba mamba &
  background+=($!)
fi
if [ "$CORPUS" != 0 ]; then
  once corpus corpus
  once packed $python benchmarks/quality/corpus.py pack $build/corpus $build/packed &
  background+=($!)
fi
for program in ${FILL:-$(cd $here/fill && ls -- *.py | sed 's/\.py$//')}; do
  if [ "$RIVALS" = 0 ] && [[ $program =~ ^(gated_delta_net|mamba2)$ ]]; then continue; fi
  # a test fails where it reads a number; what it had compiled by then stays
  once "fill-$program" fill "$program" || true
done
for step in "${background[@]}"; do wait "$step"; done

rm -rf "$pieces" $build/parts $build/travels
mkdir -p "$pieces" $build/parts $build/travels
cp -r "$WORK"/cache-* $build/travels/
$python $here/launchable.py $build/travels/cache-*
tar cJf $build/caches.tar.xz -C $build/travels .
tar cf $build/base.tar -C $build wheels fla
cut_up $build/caches.tar.xz caches
cut_up $build/base.tar base
if [ "$RIVALS" != 0 ]; then
  cut_up $build/triton.tar.xz triton
  tar cf $build/mamba.tar -C $build mamba
  cut_up $build/mamba.tar mamba
fi
if [ "$CORPUS" != 0 ]; then cp $build/packed/*.xz $build/packed/manifest.json $build/data/tokenizer.json $build/parts/; fi
if [ -n "$TE" ]; then
  tar cf $build/te.tar -C "$TE" .
  cut_up $build/te.tar te
fi
$python $here/pieces.py $build/parts "$pieces"
