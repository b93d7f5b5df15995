"""``cusparge run``: attention over the arrays of a file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import cusparge
from cusparge.cli import files
from cusparge.cli.by_head import attention_by_head
from cusparge.cli.measure import machine
from cusparge.cli.options import (
    add_call_options,
    call_options,
    describe_policy,
    numbers,
    policy_record,
    usage_of,
)
from cusparge.cli.ui import Ui, UsageError, table
from cusparge.errors import InvalidArgumentError

__all__ = ["add_parser"]

EXAMPLES = """\
FILE holds three arrays called q, k and v, float16, float32 or float64, in .safetensors also
bfloat16, each (batch, heads, tokens, head_dim). Make one with

  numpy.savez("layer.npz", q=q, k=k, v=v)

examples:
  cusparge run layer.npz                        writes layer.out.npz
  cusparge run layer.npz --cdf 0.95 --sim -1    skip more
  cusparge run layer.safetensors --keep 0.25 --causal --lse -o result.npz
  cusparge run layer.npz --cdf 0.95,0.9,0.98    one threshold for each of three heads
  cusparge run layer.npz --sim=-1,0.3,-1        a list that starts with a minus sign needs the =
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        parents=[common],
        help="attention over the arrays q, k, v of a file",
        description="Compute sparse attention over the arrays q, k and v of an .npz or "
        ".safetensors file, write the result, and tell what was left out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help=".npz or .safetensors with q, k and v")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="where to write `out`; .npz or .safetensors (default: FILE with .out before its "
        "suffix)",
    )
    parser.add_argument(
        "--lse",
        action="store_true",
        help="also write `lse`, the log of the sum of the exponentials of each row",
    )
    add_call_options(parser)
    group = parser.add_argument_group(
        "what may be skipped (default: the library's, --cdf 0.98 --sim 0.3)"
    )
    group.add_argument(
        "--cdf",
        type=numbers,
        metavar="X",
        help="compute the key blocks that reach this share of the pooled softmax together, 0 to 1; "
        "or one for each head, separated by commas",
    )
    group.add_argument(
        "--keep",
        type=numbers,
        metavar="X",
        help="compute this share of the key blocks instead, above 0 up to 1",
    )
    group.add_argument(
        "--sim",
        type=numbers,
        metavar="X",
        help="always compute blocks whose tokens are not more alike than this, -1 to 1; negative: "
        "no such blocks (default: 0.3, with --keep -1)",
    )
    group.add_argument("--dense", action="store_true", help="skip nothing")
    group.add_argument(
        "--quantize",
        action=argparse.BooleanOptionalAction,
        help="int8 Q.K and fp8 P.V, as on a GPU (slower on the CPU); --no-quantize: never "
        "(default: what the device is fast at)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "cuda", "cpu", "reference"),
        default="auto",
        help="what computes; reference is the slow float64 oracle (default: auto)",
    )
    parser.set_defaults(execute=execute, usage=parser.format_usage())


def policy_of(args: argparse.Namespace) -> cusparge.Policy:
    """Return the policy that the options ask for."""
    if args.dense:
        for name in ("cdf", "keep", "sim"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"--dense skips nothing, and --{name} says what to skip: give one of them.",
                    args.usage,
                )
        return cusparge.Dense(quantize=args.quantize)
    if args.keep is not None and args.cdf is not None:
        raise UsageError(
            "--cdf and --keep are two rules for the same choice: give one of them.", args.usage
        )
    options: dict[str, Any] = {"quantize": args.quantize}
    if args.sim is not None:
        options["sim_threshold"] = args.sim
    make: Any = cusparge.TopCdf
    if args.cdf is not None:
        options["cdf_threshold"] = args.cdf
    if args.keep is not None:
        make = cusparge.TopK
        options["keep"] = args.keep
    policy: cusparge.Policy = usage_of(lambda: make(**options))
    return policy


def _output_of(args: argparse.Namespace) -> Path:
    source = Path(args.file)
    if not source.name and args.output is None:
        raise InvalidArgumentError(f"{args.file!r} is not the name of a file.")
    given = source.with_suffix(f".out{source.suffix}") if args.output is None else args.output
    if Path(given).suffix.lower() not in files.SUFFIXES and args.output is not None:
        raise UsageError(
            f"-o: the name must end in .npz or .safetensors: got {args.output!r}.", args.usage
        )
    return Path(given)


def execute(args: argparse.Namespace, ui: Ui) -> int:
    """Run the command."""
    policy = policy_of(args)
    output = _output_of(args)
    inputs = files.read_inputs(args.file)
    target = files.check_output(output, inputs=[args.file])
    start = time.perf_counter()
    result = attention_by_head(inputs, policy, ui, {"backend": args.backend, **call_options(args)})
    seconds = time.perf_counter() - start
    out, lse = result.out, result.lse
    bfloat16 = inputs.dtypes["q"] == "bfloat16"
    as_npz = target.suffix.lower() == ".npz"
    dtype = str(out.dtype)
    if bfloat16 and not as_npz:
        dtype = "bfloat16"
    elif bfloat16:
        ui.note(f"{output}: .npz has no bfloat16, so that out is written as float32")
    arrays = {"out": out} | ({"lse": lse} if args.lse else {})
    files.write_arrays(target, arrays, bfloat16=bfloat16 and not as_npz)
    bad_rows = int(np.count_nonzero(~np.isfinite(out).all(axis=-1)))
    record = {
        "command": "run",
        "file": args.file,
        "output": str(output),
        "inputs": {
            name: {"shape": getattr(inputs, name).shape, "dtype": inputs.dtypes[name]}
            for name in "qkv"
        },
        "out": {"shape": out.shape, "dtype": dtype},
        "lse": {"shape": lse.shape, "dtype": str(lse.dtype)} if args.lse else None,
        **policy_record(policy),
        **call_options(args),
        "backend": args.backend,
        "seconds": seconds,
        "sparsity": result.sparsity,
        "qk_sparsity": result.qk_sparsity,
        "pv_sparsity": result.pv_sparsity,
        "sparsity_per_head": result.sparsity_per_head,
        "rows_not_finite": bad_rows,
        "machine": machine(),
    }
    ui.result(record)
    for name in "qkv":
        shape = "x".join(map(str, getattr(inputs, name).shape))
        ui.show(f"{name}    {shape} {inputs.dtypes[name]}")
    ui.show(f"out  {'x'.join(map(str, out.shape))} {dtype}, written to {output}")
    ui.show(f"policy    {describe_policy(policy)}")
    ui.show(f"time      {seconds * 1e3:.1f} ms, head after head")
    ui.show(f"sparsity  {result.sparsity:.3f} (share of the block products not computed)")
    rows = [
        (str(sequence), str(head), f"{value:.3f}")
        for sequence, heads in enumerate(result.sparsity_per_head)
        for head, value in enumerate(heads)
    ]
    if len(rows) <= 64:
        ui.show("", table("sparsity of each head", ("sequence", "head", "sparsity"), rows, words=0))
    if bad_rows:
        names = [name for name in "qkv" if not np.isfinite(getattr(inputs, name)).all()]
        why = (
            f"{' and '.join(names)} of the file hold such values"
            if names
            else (
                "the inputs are finite, but scores overflow: see --sm-scale and the size of q and k"
            )
        )
        ui.note(f"{bad_rows} rows of out hold NaN or infinity: {why}.")
    return 0
