"""What the tests of torch's compilers share: inputs, and how results are compared."""

import numpy as np
import pytest
from compare import assert_same_bits

from cusparge import BlockMap, TopCdf, TopK, predict_block_map
from cusparge._types import AttentionStats

torch = pytest.importorskip("torch", reason="needs torch")

GENERATOR = torch.Generator().manual_seed(3)  # the policies below depend on it a little


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GENERATOR).to(dtype)


Q, K, V = randn(2, 4, 300, 64), randn(2, 2, 260, 64), randn(2, 2, 260, 64)
PACKED = [x[0].transpose(0, 1) for x in (Q, K, V)]
LENGTHS = [100, 3]
KEEP = 0.3
MAP = predict_block_map(Q, K, policy=TopK(KEEP))
FINE = BlockMap.from_mask(
    torch.rand((2, 4, 5, 5), generator=GENERATOR) < 0.5, seqlen_q=300, seqlen_k=260, block_q=64
)
POLICY = TopCdf(
    *(0.7, [0.1, 0.2, -1, 0.4], 3.0),
    **{"rule": "within", "sink_blocks": 1, "local_blocks": 2, "quantize": True},
)


@pytest.fixture(autouse=True)
def fresh():
    """Let no test meet what another one compiled, and ask for no gradients."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def leaves(result):
    """The tensors and arrays of a result, stats and maps included."""
    if isinstance(result, (tuple, list)):
        return [leaf for part in result for leaf in leaves(part)]
    if isinstance(result, AttentionStats):
        return [result.counts.stacked()]
    if isinstance(result, BlockMap):
        sizes = (result.seqlen_q, result.seqlen_k, result.sparsity)
        return [result.mask, *(np.array(size) for size in sizes)]
    return [result]


def assert_equal(got, want):
    for one, other in zip(leaves(got), leaves(want), strict=True):
        assert_same_bits(one, other)
        if isinstance(other, torch.Tensor):
            assert one.stride() == other.stride()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)
