"""Choose a policy by its error: try thresholds on your own data, take the sparsest under a bound.

The error is relative L1 against dense attention, sum|O - O'| / sum|O|. Take inputs of your own
model instead of the shipped ones, several of them, and judge by the worst.
"""

from importlib.resources import files

import numpy as np
from safetensors.numpy import load_file

import cusparge

BOUND = 0.05

arrays = load_file(str(files("cusparge") / "data" / "whisper_tiny_en.safetensors"))
q, k, v = (arrays[name].astype(np.float32) for name in "qkv")
dense = cusparge.attention(q, k, v, policy=cusparge.Dense())

best, best_sparsity = cusparge.Dense(), 0.0
print("cdf_threshold  sim_threshold  sparsity  error")
for sim in (0.6, 0.3, -1.0):
    for cdf in (0.99, 0.98, 0.95, 0.9):
        policy = cusparge.TopCdf(cdf, sim)
        out, stats = cusparge.attention(q, k, v, policy=policy, return_stats=True)
        error = np.abs(out - dense).sum() / np.abs(dense).sum()
        print(f"{cdf:13.2f}  {sim:13.1f}  {stats.sparsity:8.3f}  {error:.4f}")
        if error <= BOUND and stats.sparsity > best_sparsity:
            best, best_sparsity = policy, stats.sparsity

print(f"sparsest with an error of at most {BOUND}:")
if isinstance(best, cusparge.TopCdf):
    print(f"  TopCdf(cdf_threshold={best.cdf_threshold}, sim_threshold={best.sim_threshold})")
else:  # nothing can be left out under this bound
    print("  Dense()")

out, stats = cusparge.attention(q, k, v, policy=best, return_stats=True)
assert np.abs(out - dense).sum() <= BOUND * np.abs(dense).sum()
assert stats.sparsity == best_sparsity
