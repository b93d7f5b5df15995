"""How good is the prediction? Predicted blocks against where the attention really goes.

Per head: how much is left out, how much of the true attention the kept blocks hold, and how much
the best choice of as many blocks would hold.
"""

from importlib.resources import files

import numpy as np
from safetensors.numpy import load_file

import cusparge

BLOCK_Q, BLOCK_K = 128, 64

arrays = load_file(str(files("cusparge") / "data" / "whisper_tiny_en.safetensors"))
q, k, v = (arrays[name].astype(np.float32) for name in "qkv")

predicted = cusparge.predict_block_map(q, k, policy=cusparge.TopCdf(0.95, -1.0))
_, lse = cusparge.attention(q, k, v, policy=cusparge.Dense(), return_lse=True)

# lse is what softmax divides by: exp(score - lse) is the attention itself, exactly.
weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) - lse[..., None])
mass = np.add.reduceat(weights, np.arange(0, q.shape[2], BLOCK_Q), axis=2)
mass = np.add.reduceat(mass, np.arange(0, k.shape[2], BLOCK_K), axis=3)
mass /= mass.sum(axis=-1, keepdims=True)  # each row of blocks: shares of its attention

print("head  left out  attention kept  best possible")
for head, (mask, true) in enumerate(zip(predicted.mask[0], mass[0], strict=True)):
    kept = true[mask].sum() / len(true)
    heaviest = -np.sort(-true, axis=-1)
    best = heaviest[np.arange(true.shape[1]) < mask.sum(axis=-1)[:, None]].sum() / len(true)
    print(f"{head:4}  {1 - mask.mean():8.1%}  {kept:14.1%}  {best:13.1%}")
    assert best + 1e-6 >= kept > 0.9

print(f"all heads together: sparsity {predicted.sparsity:.1%}")
assert abs(predicted.sparsity - (1 - predicted.mask.mean())) < 1e-12
