#!/usr/bin/env bash
# gpu_carry.sh YARDSTICK [CACHES]: lay out in .carry (which git must ignore) what a GPU machine without a registry and
# without this checkout needs: 64 MiB in all, so the kit with the tree, and the yardstick, may have to travel apart.
#   .carry/kit     make device-kit
#   .carry/tree    the sources at HEAD, with COMMIT
#   .carry/vllm    a copy of YARDSTICK, the folder with vLLM's bundle, its unpack.sh and bench_vllm.py
#   .carry/model-0, model-1  the demo model in two parts, for two calls of one lease: whole it is over 64 MiB
#   .carry/cache   kernel caches that an earlier run's `save` left in CACHES (ficache.tgz, tritoncache.tgz)
#   .carry/begin.sh  to be sourced there first: installs what came, sets PYTHONPATH, VLLM (flags of gpu.py) and `save`
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
yardstick=${1:?"usage: tools/gpu_carry.sh YARDSTICK [CACHES]"}
caches=${2:-}
out=.carry
exclude=$(git rev-parse --git-common-dir)/info/exclude
grep -qx '/.carry/' "$exclude" || echo '/.carry/' >> "$exclude"
make --silent device-kit | tail -1
rm -rf $out/tree $out/kit
mkdir -p $out/tree $out/cache
git archive HEAD benchmarks tests tools pyproject.toml docs/performance.md client router stage protos | tar -x -C $out/tree
git rev-parse HEAD > $out/tree/COMMIT
cp -r build/device-kit $out/kit
[ -d $out/vllm ] || cp -r "$yardstick" $out/vllm
for archive in ficache.tgz tritoncache.tgz; do
    if [ -n "$caches" ] && [ -f "$caches/$archive" ]; then cp -f "$caches/$archive" $out/cache/; fi
done
chmod -R u+w $out
model=.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
first=34500000 # bytes: the rest fits a call with the sources, these one with the kit and the caches
if [ -f $model ] && [ "$(stat -c %s $out/model-0/part 2> /dev/null)" != $first ]; then
    mkdir -p $out/model-0 $out/model-1
    gzip --stdout $model > $out/model.gz
    head -c $first $out/model.gz > $out/model-0/part
    tail -c +$((first + 1)) $out/model.gz > $out/model-1/part
    rm $out/model.gz
fi
cat > $out/begin.sh <<'BEGIN'
export PYTHONUNBUFFERED=1 FLASHINFER_CUDA_ARCH_LIST=9.0a
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
if [ -d .carry/kit ] && [ ! -f /tmp/kit-done ]; then
    sh .carry/kit/install.sh /tmp/stagemesh-site || exit 1
    mkdir -p ~/.cache
    [ -f .carry/cache/ficache.tgz ] && tar xzf .carry/cache/ficache.tgz -C ~/.cache
    [ -f .carry/cache/tritoncache.tgz ] && tar xzf .carry/cache/tritoncache.tgz -C ~
    # FlashInfer builds anew what is older than its sources.
    find /tmp/stagemesh-site/flashinfer /tmp/stagemesh-site/tvm_ffi -exec touch -d 2020-01-01 {} + 2>/dev/null
    rm -rf /tmp/tree
    cp -r .carry/tree /tmp/tree
    touch /tmp/kit-done
fi
if [ -d .carry/vllm ] && [ ! -d /tmp/vllm-site/vllm ]; then
    bash .carry/vllm/unpack.sh .carry/vllm /tmp/vllm-site
    cp .carry/vllm/bench_vllm.py /tmp/bench_vllm.py
fi
for part in 0 1; do
    [ -f .carry/model-$part/part ] && cp .carry/model-$part/part /tmp/model-$part
done
if [ -f /tmp/model-0 ] && [ -f /tmp/model-1 ]; then
    export STAGEMESH_DEMO_MODEL=/tmp/SmolLM2-135M-Instruct.Q4_1.gguf
    [ -f $STAGEMESH_DEMO_MODEL ] || cat /tmp/model-0 /tmp/model-1 | gzip -d > $STAGEMESH_DEMO_MODEL
fi
export PYTHONPATH=/tmp/stagemesh-site PATH=/tmp/stagemesh-site/bin:$PATH
cd /tmp/tree
nvidia-smi -L
VLLM="--vllm /tmp/vllm-site --bench-vllm /tmp/bench_vllm.py"
save() {
    (cd "$OUT" && rm -rf ./*.jsonl ./*.log traces && cp /tmp/gpu-merged.json . 2>/dev/null)
    tar czf "$OUT/tritoncache.tgz" -C ~ .triton
    tar czf "$OUT/ficache.tgz" -C ~/.cache flashinfer
}
BEGIN
du -sm $out/kit $out/tree $out/vllm $out/cache
