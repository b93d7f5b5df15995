"""Under torch.compile the call runs outside of the graph, with the same bits."""

import pytest

import cusparge

torch = pytest.importorskip("torch", reason="needs torch")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("default")  # torch's own, while it loads and traces
def test_a_compiled_function_may_call_it(backend):
    q = torch.randn(1, 2, 300, 64)
    packed = [0, 100, 300]

    def layer(x):
        out, stats = cusparge.attention(x * 2, x, x, causal=True, return_stats=True)
        rows = x[0].transpose(0, 1).contiguous()
        more = cusparge.attention_varlen(rows, rows, rows, packed, packed)
        kept = cusparge.predict_block_map(x, x).mask.sum()
        return out + 1, more * 2, kept, stats.sparsity

    with torch.no_grad():
        want = layer(q)
        compiled = torch.compile(layer, backend=backend)
        for _ in range(2):
            for got, expected in zip(compiled(q), want, strict=True):
                assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))
