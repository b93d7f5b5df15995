"""A call inside a CUDA graph of torch: captured once, replayed on new values.

Nothing in the call waits for the GPU, reads from it or allocates outside of torch's allocator.
This needs an NVIDIA GPU; without one it says so and ends.
"""

import sys

import cusparge
from cusparge.stage1 import pool_blocks

try:
    import torch
except ImportError:
    sys.exit("nothing done, this needs torch with CUDA, and an NVIDIA GPU")
if not torch.cuda.is_available():
    sys.exit("nothing done, this needs an NVIDIA GPU with a CUDA build of torch")
try:
    cusparge.warmup(dtypes=torch.bfloat16, head_dims=128)  # nothing compiles in a capture
except cusparge.DeviceError as error:
    sys.exit(f"nothing done: {error}")

k = torch.randn(2, 8, 4096, 128, dtype=torch.bfloat16, device="cuda")
lengths = torch.tensor([4096, 1000], dtype=torch.int32, device="cuda")

with torch.no_grad():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled = pool_blocks(k, block=64, smooth=True, seqlens=lengths)

    k.copy_(torch.randn_like(k) + 1)  # new values where the graph reads
    lengths.fill_(3000)
    graph.replay()
    expected = pool_blocks(k, block=64, smooth=True, seqlens=lengths)

same = torch.equal(pooled.mean, expected.mean)
print(f"{tuple(pooled.mean.shape)} on {pooled.mean.device}")
print(f"replay gives the bits of the eager call: {same}")

assert same
assert torch.equal(pooled.token_mean, expected.token_mean)
