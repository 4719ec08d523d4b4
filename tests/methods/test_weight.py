import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.errors import CalibrationError, MethodError, PatternError
from sparsecomp.methods.error import relative_error
from sparsecomp.methods.registry import get_method, methods
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing import pack

# methods that keep the values of the weights they choose
CHOOSERS = [name for name in methods() if get_method(name).only_chooses]
PATTERNS = ["2:4", "1:4", "8:16", "2:4@v3", "4:2:8", "block3x5:0.4", "unstructured:0.3"]


def gram_of(columns, tokens=50, seed=0):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, columns)
    return x, x.T @ x


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", CHOOSERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 19), (1, 1), (0, 8), (4, 0)])
def test_what_comes_back_fits_and_keeps_the_dtype(pattern, method, dtype, shape):
    torch.manual_seed(0)
    w = torch.randn(shape).to(dtype)
    before = w.clone()
    result = prune_weight(w, pattern, method, gram_of(shape[1])[1])
    assert result.weight.dtype == dtype
    assert torch.equal(result.weight, torch.where(result.mask, w, torch.zeros_like(w)))
    assert torch.equal(w, before)
    assert (str(result.pattern), result.method, result.measured_on) == (pattern, method, "gram")
    if not pattern.startswith("unstructured") and dtype != torch.float64:
        assert torch.equal(pack(result.weight, pattern).unpack(), result.weight)
    again = prune_weight(result.weight, pattern, "magnitude")
    assert torch.equal(again.weight, result.weight)
    assert again.error == 0.0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(1, 2), (2, 4), (3, 4), (2, 8), (4, 8)]), st.integers(1, 3), st.integers(0, 10**6))
def test_masks_are_optimal_against_all_subsets_of_a_group(nm, out, seed):
    n, m = nm
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, m, generator=generator)
    diagonal = torch.rand(m, generator=generator) + 0.01
    for method, gram in (("magnitude", torch.eye(m)), ("wanda", torch.diag(diagonal))):
        result = prune_weight(w, f"{n}:{m}", method, gram)
        # on a diagonal Gram the layer error is the dropped saliency, which the best subset minimises
        saliency = w.double().square() * gram.diagonal().double()
        best = sum(
            min(saliency[row, list(dropped)].sum().item() for dropped in combinations(range(m), m - n))
            for row in range(out)
        )
        assert result.error == pytest.approx(math.sqrt(best / saliency.sum().item()), rel=1e-6)


def test_wanda_weighs_by_input_norms_and_magnitude_does_not():
    w = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    gram = torch.diag(torch.tensor([0.01, 0.01, 1.0, 100.0]))
    assert prune_weight(w, "2:4", "magnitude", gram).mask.tolist() == [[True, True, False, False]]
    assert prune_weight(w, "2:4", "wanda", gram).mask.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_that_of_the_outputs(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(60, 1500, dtype=torch.float64), torch.randn(5, 1500)
    result = prune_weight(w, "2:4", "wanda", (x.T @ x).to(dtype))
    want = ((w - result.weight).double() @ x.T).norm() / (w.double() @ x.T).norm()
    assert result.error == pytest.approx(want.item(), rel=1e-5 if dtype == torch.float32 else 1e-12)
    alone = prune_weight(w, "2:4")
    assert alone.error == pytest.approx(((w - alone.weight).norm() / w.norm()).item(), rel=1e-6)
    assert alone.measured_on == "weight"


def test_error_at_its_edges():
    w, zero = torch.ones(2, 4), torch.zeros(2, 4)
    assert relative_error(w, w) == 0.0
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, w) == math.inf
    assert relative_error(w, zero) == 1.0
    assert relative_error(w, zero, torch.zeros(4, 4)) == 0.0, "dead inputs: no output changes"
    assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4), torch.eye(4)) == 0.0
    tiny = torch.full((1, 4), 1e-7).half()
    assert relative_error(tiny, tiny / 2) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("method", CHOOSERS)
def test_user_masks_in_masks_out(method):
    torch.manual_seed(0)
    w, gram = torch.randn(3, 8), gram_of(8)[1]
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0]] * 3, dtype=torch.bool)
    result = prune_weight(w, "2:4", method, gram, mask=mask)
    assert torch.equal(result.mask, mask)
    assert torch.equal(result.weight, torch.where(mask, w, torch.zeros(())))
    assert result.density == 0.25
    chosen = prune_weight(w, "2:4", method, gram)
    assert torch.equal(prune_weight(w, "2:4", method, gram, mask=chosen.mask).weight, chosen.weight)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 8), r"mask is torch\.float32; allowed is a torch\.bool tensor.*try mask != 0"),
        ([[True]], "mask is list"),
        (torch.ones(8, 3, dtype=torch.bool), r"mask has shape \(8, 3\); the weight has \(3, 8\)"),
        (
            torch.ones(3, 8, dtype=torch.bool),
            r"mask breaks 2:4 in row 0, group 0 \(columns 0 to 3\): 4 weights kept",
        ),
    ],
)
def test_masks_that_cannot_be_used(mask, message):
    with pytest.raises(PatternError, match=message):
        prune_weight(torch.randn(3, 8), "2:4", mask=mask)


def test_parameters_and_views_are_taken_and_the_result_has_no_gradient():
    w = torch.nn.Parameter(torch.randn(8, 3))
    result = prune_weight(w.t(), "2:4")
    assert not result.weight.requires_grad
    assert torch.equal(result.weight, prune_weight(w.detach().t().contiguous(), "2:4").weight)


def test_half_precision_scores_are_compared_in_wider_arithmetic():
    # in float16 both scores would round to 1.0
    w = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float16)
    gram = torch.diag(torch.tensor([1.0, 1.0001, 0.0, 0.0]))
    assert prune_weight(w, "1:4", "wanda", gram).mask.tolist() == [[False, True, False, False]]


def test_methods_are_listed():
    assert {"magnitude", "wanda", "ria"} <= set(CHOOSERS)
    page = (Path(__file__).parents[2] / "docs" / "design" / "pruning_methods.md").read_text()
    assert [name for name in methods() if f"`{name}`" not in page] == [], "say there what it does"
    assert all(get_method(name).description for name in methods())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_cannot_be_used(bad):
    w = torch.randn(3, 8)
    w[1, 6] = bad
    with pytest.raises(PatternError, match=rf"weight\[1, 6\] is {bad}; weights must be finite"):
        prune_weight(w, "2:4")
    with pytest.raises(PatternError, match=r"takes dtypes torch\.float32.*got torch\.int8; convert the weight first"):
        prune_weight(torch.ones(3, 8, dtype=torch.int8), "2:4")
    with pytest.raises(PatternError, match=r"of shape \[out, in\], got shape \(8,\)"):
        prune_weight(torch.randn(8), "2:4")
    with pytest.raises(PatternError, match="got list"):
        prune_weight([[1.0]], "2:4")


def test_unknown_methods_are_named_with_the_nearest():
    with pytest.raises(MethodError, match=r'unknown pruning method "wnada"; the methods are magnitude, wanda.*"wanda"'):
        prune_weight(torch.randn(3, 8), "2:4", "wnada")
    with pytest.raises(PatternError, match='pattern "5:4" has no such group'):
        prune_weight(torch.randn(3, 8), "5:4")


def lopsided():
    gram = gram_of(8)[1]
    gram[0, 1] += 100
    return gram


def negative():
    gram = gram_of(8)[1]
    gram[3, 3] = -1
    return gram


def holed():
    gram = gram_of(8)[1]
    gram[2, 5] = math.nan
    return gram


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (None, r'method "wanda" needs a Gram matrix and got none; pass gram=cal\[name\].gram of cal = sc.calibrate'),
        (torch.eye(7), r"gram has shape \(7, 7\); a weight of shape \(3, 8\) needs \(8, 8\)"),
        (torch.zeros(50, 8), r"gram has shape \(50, 8\)"),
        (torch.eye(8, dtype=torch.float16), r"gram is torch\.float16; allowed are torch\.float32 and torch\.float64"),
        ([[1.0]], "gram is a list, not a tensor"),
        (holed(), r"gram\[2, 5\] is nan; a Gram must be finite"),
        (negative(), r"gram\[3, 3\] is -1.0, below zero"),
        (lopsided(), "gram is not symmetric"),
    ],
)
def test_grams_that_cannot_be_used(gram, message):
    with pytest.raises(CalibrationError, match=message):
        prune_weight(torch.randn(3, 8), "2:4", "wanda", gram)
