"""The public surface: names, signatures, defaults, and documentation that runs."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import cusparge

NAMES = {
    "AttentionStats",
    "BlockMap",
    "CompileError",
    "CuspargeError",
    "Dense",
    "DeviceError",
    "InvalidArgumentError",
    "Policy",
    "TopCdf",
    "TopK",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "predict_block_map",
    "reference",
    "warmup",
}

# Positional names, then keyword-only names with their defaults. A default that changes, changes
# the results of every program that did not name it.
SIGNATURES = {
    "attention": (
        ["q", "k", "v"],
        {
            "policy": None,
            "block_map": None,
            "causal": False,
            "causal_align": "bottom_right",
            "sm_scale": None,
            "layout": "HND",
            "seqlens_k": None,
            "return_lse": False,
            "return_stats": False,
            "check_numerics": False,
            "backend": "auto",
        },
        "unsupported",
    ),
    "attention_varlen": (
        ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"],
        {
            "max_seqlen_q": None,
            "max_seqlen_k": None,
            "policy": None,
            "causal": False,
            "causal_align": "bottom_right",
            "sm_scale": None,
            "return_lse": False,
            "return_stats": False,
            "check_numerics": False,
            "backend": "auto",
        },
        "unsupported",
    ),
    "predict_block_map": (
        ["q", "k"],
        {
            "policy": None,
            "causal": False,
            "causal_align": "bottom_right",
            "sm_scale": None,
            "layout": "HND",
            "seqlens_k": None,
            "backend": "auto",
        },
        None,
    ),
    "warmup": ([], {"dtypes": None, "head_dims": None}, None),
    "BlockMap.from_mask": (
        ["mask"],
        {
            "seqlen_q": inspect.Parameter.empty,
            "seqlen_k": inspect.Parameter.empty,
            "block_q": 128,
            "block_k": 64,
        },
        None,
    ),
}

# Fields in order with defaults; those after "*" are keyword-only.
FIELDS = {
    "TopCdf": {
        "cdf_threshold": 0.98,
        "sim_threshold": 0.3,
        "pv_threshold": None,
        "*": None,
        "rule": "reach",
        "sink_blocks": 0,
        "local_blocks": 0,
        "quantize": None,
    },
    "TopK": {
        "keep": 0.5,
        "sim_threshold": -1.0,
        "pv_threshold": None,
        "*": None,
        "sink_blocks": 0,
        "local_blocks": 0,
        "quantize": None,
    },
    "Dense": {
        "pv_threshold": None,
        "*": None,
        "sink_blocks": 0,
        "local_blocks": 0,
        "quantize": None,
    },
}

FUNCTIONS = ["attention", "attention_varlen", "predict_block_map"]
CLASSES = sorted(name for name in NAMES if inspect.isclass(getattr(cusparge, name, None)))


def public(name):
    found = cusparge
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_public_names_are_these():
    assert set(cusparge.__all__) == NAMES
    assert list(cusparge.__all__) == sorted(cusparge.__all__)
    for name in NAMES:
        assert hasattr(cusparge, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    positional, keywords, catch_all = SIGNATURES[name]
    parameters = inspect.signature(public(name)).parameters.values()
    by_kind = {kind: [p for p in parameters if p.kind is kind] for kind in inspect._ParameterKind}
    given = by_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in given] == positional
    assert all(p.default is inspect.Parameter.empty for p in given)
    named = by_kind[inspect.Parameter.KEYWORD_ONLY]
    assert [p.name for p in named] == list(keywords)
    for parameter in named:
        # The type as well: False == 0 would pass otherwise.
        want = keywords[parameter.name]
        assert parameter.default == want, parameter.name
        assert type(parameter.default) is type(want), parameter.name
    assert [p.name for p in by_kind[inspect.Parameter.VAR_KEYWORD]] == (
        [catch_all] if catch_all else []
    )
    assert not by_kind[inspect.Parameter.VAR_POSITIONAL]


@pytest.mark.parametrize("name", FIELDS)
def test_policy_fields(name):
    policy = public(name)
    wanted = list(FIELDS[name])
    first_keyword = wanted.index("*")
    wanted.remove("*")
    fields = dataclasses.fields(policy)
    assert [field.name for field in fields] == wanted
    assert [field.kw_only for field in fields] == [i >= first_keyword for i in range(len(fields))]
    made = policy()
    for field in wanted:
        value = getattr(made, field)
        assert value == FIELDS[name][field], field
        assert type(value) is type(FIELDS[name][field]), field
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.quantize = True
    assert made == policy()
    assert hash(made) == hash(policy())


def test_shares_of_the_stats_come_in_total_and_per_head():
    for name in ("sparsity", "qk_sparsity", "pv_sparsity"):
        assert isinstance(getattr(cusparge.AttentionStats, name), property)
        assert isinstance(getattr(cusparge.AttentionStats, f"{name}_per_head"), property)


def sections(text):
    """Return the numpydoc sections of a docstring as {title: body}."""
    parts = re.split(r"^([A-Z][\w ]+)\n-{3,}\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(body):
    """Return the names that a Parameters or Attributes section describes."""
    heads = re.findall(r"^(\S.*?)(?: :.*)?$", body, flags=re.MULTILINE)
    return {name.strip(" *") for head in heads for name in head.split(",")}


@pytest.mark.parametrize("name", [*FUNCTIONS, "BlockMap.from_mask"])
def test_docstring_of_a_function(name):
    function = public(name)
    found = sections(function.__doc__)
    assert {"Parameters", "Returns", "Raises", "Examples"} <= found.keys()
    taken = set(inspect.signature(function).parameters)
    assert taken == documented(found["Parameters"])
    assert function.__doc__.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", CLASSES)
def test_docstring_of_a_class(name):
    found = public(name)
    assert found.__doc__, name
    assert found.__doc__ != "", name
    if dataclasses.is_dataclass(found):
        assert found.__doc__.splitlines()[0].endswith(".")
        fields = {field.name for field in dataclasses.fields(found)}
        assert fields == documented(sections(found.__doc__)["Parameters"])
        assert "Raises" in sections(found.__doc__)
    for member, value in vars(found).items():
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert value.__doc__, f"{name}.{member}"


def modules():
    """Yield every module of the package, but for the one that runs when it is imported."""
    yield "cusparge"
    for info in pkgutil.walk_packages(cusparge.__path__, "cusparge."):
        if not info.name.endswith("__main__"):
            yield info.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_in_docstrings_run(name):
    if name.startswith("cusparge.cli"):
        pytest.importorskip("rich", reason="rich, which the command line uses, is not installed")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} does not say what it is for"
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    if name in ("cusparge", "cusparge.attention", "cusparge._types"):
        assert attempted > 0
