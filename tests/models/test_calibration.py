import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsecomp.errors import CalibrationError, ModelError
from sparsecomp.models.calibration import LayerStatistics, calibrate
from sparsecomp.models.gram import GramSum
from sparsecomp.patterns.rounding import rounded_rows, rounding_energy


def explicit(rows):
    rows = torch.cat([each.reshape(-1, each.shape[-1]) for each in rows]).double()
    return rows.T @ rows


def assert_gram(gram, rows, tolerance=1e-6):
    """Every entry to within ``tolerance`` of sqrt(G_ii G_jj), against float64."""
    want = explicit(rows)
    scale = want.diagonal().sqrt()
    error = (gram.double() - want).abs() / (scale[:, None] * scale + 1e-300)
    assert float(error.max()) < tolerance
    assert torch.equal(gram, gram.T)


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        return self.out(self.query(x) * self.key(x) + self.value(x))


class Masked(nn.Module):
    def __init__(self, flat=False):
        super().__init__()
        self.flat = flat
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.pooler = nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids)
        self.body(hidden.reshape(-1, 8) if self.flat else hidden)
        return self.pooler(hidden[:, 0])


def test_grams_equal_the_products_and_shared_inputs_share_one():
    torch.manual_seed(0)
    model = Attention()
    batches = [torch.randn(2, 5, 8), torch.randn(7, 8), torch.randn(8)]
    cal = calibrate(model, batches)
    assert list(cal) == ["query", "key", "value", "out"]
    assert cal["query"].gram is cal["key"].gram is cal["value"].gram
    assert len({id(layer.gram) for layer in cal.values()}) == 2
    assert cal.nbytes == 2 * 8 * 8 * 4
    assert_gram(cal["query"].gram, batches)
    with torch.no_grad():
        assert_gram(cal["out"].gram, [model.query(x) * model.key(x) + model.value(x) for x in batches])
    assert {layer.tokens for layer in cal.values()} == {18}
    assert repr(cal) == "Calibration(4 layers, 18 tokens, 2 Gram matrices, 0.0 MB)"


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_sum_at_block_edges(size):
    torch.manual_seed(size)
    rows = [torch.randn(count, size) for count in (1, 3000, 0, 17)]
    total, other = (GramSum(size, torch.float32, torch.device("cpu")) for _ in range(2))
    total.add_rows(rows[0]).add_rows(rows[1])
    other.add_rows(rows[2]).add_rows(rows[3])
    copied = other.clone()
    total.add_sum(other)
    assert total.tokens == 3018
    assert_gram(total.finish(), rows)
    assert_gram(copied.finish(), rows[3:])


def test_many_batches_stay_accurate_where_a_plain_float32_sum_does_not():
    torch.manual_seed(0)
    batch = 1 + 0.01 * torch.randn(4, 16)
    count = 20_000
    total = GramSum(16, torch.float32, torch.device("cpu"))
    naive = torch.zeros(16, 16)
    for _ in range(count):
        total.add_rows(batch)
        naive += batch.T @ batch
    want = explicit([batch]) * count
    assert float(((total.finish().double() - want) / want).abs().max()) < 3e-7
    assert float(((naive.double() - want) / want).abs().max()) > 3e-6


def test_float64_is_exact_to_float64():
    torch.manual_seed(0)
    batches = [torch.randn(50, 8) for _ in range(10)]
    cal = calibrate(Attention(), batches, dtype=torch.float64)
    assert cal["query"].gram.dtype == torch.float64
    assert_gram(cal["query"].gram, batches, tolerance=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_widened_first(dtype):
    torch.manual_seed(0)
    batch = (300 * torch.randn(64, 8)).to(dtype)
    cal = calibrate(Attention().to(dtype), [batch], only="query")
    assert cal["query"].gram.dtype == torch.float32
    assert_gram(cal["query"].gram, [batch])


def test_autocast_and_reduced_matmul_precision_do_not_reach_the_sums():
    torch.manual_seed(0)
    batches = [torch.randn(64, 8)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            cal = calibrate(Attention(), batches)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_gram(cal["query"].gram, batches)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_stays_out(flat):
    torch.manual_seed(0)
    model = Masked(flat)
    batches = [
        {"input_ids": torch.randint(0, 20, (3, 5)), "attention_mask": (torch.rand(3, 5) < 0.6).long()} for _ in range(4)
    ]
    cal = calibrate(model, batches)
    hidden = [model.embedding(batch["input_ids"]).detach() for batch in batches]
    real = [each[batch["attention_mask"].bool()] for each, batch in zip(hidden, batches, strict=True)]
    assert_gram(cal["body"].gram, real)
    assert cal["body"].tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert_gram(cal["pooler"].gram, [each[:, 0] for each in hidden])
    everything = calibrate(model, batches, mask=lambda batch: None)
    assert_gram(everything["body"].gram, hidden)


def test_an_explicit_mask_and_tuple_batches_and_forward():
    torch.manual_seed(0)
    x, keep = torch.randn(3, 5, 8), torch.rand(3, 5) < 0.5
    model = Attention()
    masked = calibrate(model, [(x,)], mask=lambda batch: keep)
    assert_gram(masked["query"].gram, [x[keep]])
    twice = calibrate(model, [("ignored", x)], forward=lambda model, batch: model(2 * batch[1]))
    assert_gram(twice["query"].gram, [2 * x])
    with pytest.raises(CalibrationError, match="the mask fits no layer input"):
        calibrate(model, [x], mask=lambda batch: torch.ones(4, 4))


def test_nan_in_padding_is_no_harm_and_elsewhere_names_layer_and_batch():
    x = torch.randn(2, 3, 8)
    x[1, 2] = torch.nan
    keep = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert calibrate(Attention(), [x], only="query", mask=lambda batch: keep)["query"].tokens == 5
    with pytest.raises(CalibrationError, match=r"query: its input holds NaN or Inf in calibration batch 1 \(counted"):
        calibrate(Attention(), [torch.randn(2, 3, 8), x])
    with pytest.raises(CalibrationError, match="query: its Gram matrix overflows float32"):
        calibrate(Attention(), [torch.full((1, 8), 1e30)], only="query")


class Scripted(nn.Module):
    """Calls its layers with the inputs it is told, in that order: (layer, input) pairs."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))

    def forward(self, calls, inputs):
        for layer, which in calls:
            self.layers[layer](inputs[which])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=10), min_size=1, max_size=5
    ),
    st.integers(0, 10**6),
)
def test_any_order_of_calls_gives_each_layer_exactly_its_inputs(script, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [(calls, [torch.randn(2, 3, generator=generator) for _ in range(3)]) for calls in script]
    cal = calibrate(Scripted(4), batches, show_progress=False)
    for layer in range(4):
        rows = [inputs[which] for calls, inputs in batches for each, which in calls if each == layer]
        if rows:
            assert_gram(cal[f"layers.{layer}"].gram, rows)
            assert cal[f"layers.{layer}"].tokens == 2 * len(rows)
        else:
            assert f"layers.{layer}" in cal.unreached


def test_layers_share_until_a_batch_parts_them():
    inputs = [torch.randn(2, 3) for _ in range(3)]
    together, apart = [(0, 0), (1, 0), (0, 1), (1, 1)], [(0, 0), (1, 2)]
    shared = calibrate(Scripted(2), [(together, inputs)] * 3)
    assert shared["layers.0"].gram is shared["layers.1"].gram
    parted = calibrate(Scripted(2), [(together, inputs), (apart, inputs)])
    assert parted["layers.0"].gram is not parted["layers.1"].gram
    assert_gram(parted["layers.1"].gram, [inputs[0], inputs[1], inputs[2]])


def test_a_tensor_changed_in_place_between_two_layers_is_not_shared():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = x + 0
            self.a(x)
            x.mul_(3)
            return self.b(x)

    x = torch.randn(4, 3)
    cal = calibrate(InPlace(), [x, x])
    assert_gram(cal["a"].gram, [x, x])
    assert_gram(cal["b"].gram, [3 * x, 3 * x])


def test_modes_gradients_hooks_and_switches_are_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 4))
    model[1].eval()
    x = torch.randn(16, 4)
    cal = calibrate(model, [x])
    with torch.no_grad():
        assert_gram(cal["2"].gram, [model[0](x)])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(CalibrationError, match="mat1 and mat2 shapes"):
        calibrate(model, [torch.randn(3, 5)])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_transformer_encoder_layers_are_reached_in_spite_of_the_fused_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 2:] = True
    batch = {"src": torch.randn(3, 5, 8), "src_key_padding_mask": padding}
    cal = calibrate(model, [batch], mask=lambda batch: ~batch["src_key_padding_mask"])
    assert cal.unreached == ()
    assert {layer.tokens for layer in cal.values()} == {12}


def test_layers_that_see_nothing_are_named():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    cal = calibrate(model, [torch.randn(2, 4)], forward=lambda model, batch: model["used"](batch))
    assert cal.unreached == ("unused",)
    assert "unused" not in cal
    with pytest.raises(CalibrationError, match=r"no layer was reached by any batch \(used, unused\)"):
        calibrate(model, [torch.randn(2, 4)], forward=lambda model, batch: None)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "got no batches"),
        (iter(()), "got no batches"),
        (torch.randn(2, 8), r"batches is one Tensor, not an iterable of batches; pass \[batch\]"),
        ({"x": torch.randn(2, 8)}, "batches is one dict"),
        (None, "batches is one NoneType"),
        (["some text"], "batch 0 is a str; allowed are a tensor, a tuple or list and a mapping; pass forward="),
        ([{"x": torch.randn(1, 2, 8), "attention_mask": torch.ones(1, 1, 2, 2)}], "attention_mask is of shape"),
    ],
)
def test_batches_that_cannot_be_used(batches, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(Attention(), batches)


def test_other_arguments_that_cannot_be_used():
    with pytest.raises(CalibrationError, match=r"cannot accumulate in torch\.float16"):
        calibrate(Attention(), [torch.randn(2, 8)], dtype=torch.float16)
    with pytest.raises(ModelError, match="no layer that can be sparse"):
        calibrate(nn.Sequential(nn.ReLU()), [torch.randn(2, 8)])


def test_what_rounding_would_move_is_summed_over_the_same_rows():
    torch.manual_seed(0)
    model, ids = Masked(), torch.randint(0, 20, (6, 5))
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[2:, 3:] = 0
    batches = [
        {"input_ids": each, "attention_mask": kept} for each, kept in zip(ids.split(2), mask.split(2), strict=True)
    ]
    cal = calibrate(model, batches)
    for name, rows in (("body", model.embedding(ids)[mask.bool()]), ("pooler", model.embedding(ids)[:, 0])):
        integers, zeros, steps = rounded_rows(rows.detach())
        want = ((integers - zeros) * steps - rows.detach()).double().square().sum(0)
        assert cal[name].tokens == len(rows) and float(want.sum()) > 0
        torch.testing.assert_close(cal[name].rounding, want)


def test_sums_of_rounding_are_those_of_their_parts():
    rows = torch.randn(5000, 7)
    whole, parts = GramSum(7, torch.float32, torch.device("cpu")).add_rows(rows), []
    for each in rows.split([1, 2999, 2000]):
        parts.append(GramSum(7, torch.float32, torch.device("cpu")).add_rows(each))
    copied = parts[0].clone()
    for other in parts[1:]:
        parts[0].add_sum(other)
    torch.testing.assert_close(parts[0].rounding, whole.rounding)
    assert torch.equal(copied.rounding, rounding_energy(rows[:1])) and whole.rounding.dtype == torch.float64
    assert GramSum(7, torch.float32, torch.device("cpu")).add_rows(rows[:0]).rounding.tolist() == [0.0] * 7


def test_statistics_pickled_without_what_rounding_moves_are_read():
    older = LayerStatistics.__new__(LayerStatistics)
    older.__dict__.update(gram=torch.eye(2), tokens=3)
    assert older.rounding is None and older.rows_per_input == 1.5
