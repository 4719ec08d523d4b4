"""Saved files: everything comes back, and whatever is wrong leaves the model untouched."""

import json
import struct
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sparsecomp.errors import FormatError, ModelError
from sparsecomp.files import container
from sparsecomp.files.storage import inspect, load, save
from sparsecomp.nn import SparseLinear
from sparsecomp.packing import pack

PATTERNS = ["2:4", "3:8", "2:4@v4", "8:2:8", "block4x4:0.5"]


class Net(nn.Module):
    def __init__(self, width=22, hidden=13, dtype=torch.float32, bias=True):
        super().__init__()
        self.first = nn.Linear(width, hidden, bias=bias)
        self.norm = nn.BatchNorm1d(hidden)
        self.second = nn.Linear(hidden, width)
        self.head = nn.Linear(width, 5)
        self.tied = nn.Linear(width, 5, bias=False)
        self.tied.weight = self.head.weight
        self.to(dtype).eval()

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu())
        return self.head(x) + self.tied(x)


def fitting(shape, pattern, dtype=torch.float32, seed=0):
    """A weight with few enough nonzeros for every pattern here."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(shape)
    if "block" in pattern:
        weight[:4, :4] = torch.randn(4, 4, generator=generator)
    else:
        weight[:, 1::8] = torch.randn(weight[:, 1::8].shape, generator=generator)
    return weight.to(dtype)


def sparse_net(pattern="2:4", dtype=torch.float32, **options):
    torch.manual_seed(1)
    net = Net(dtype=dtype, **options)
    for seed, name in enumerate(("first", "second")):
        linear = getattr(net, name)
        packed = pack(fitting(linear.weight.shape, pattern, dtype, seed), pattern)
        setattr(net, name, SparseLinear.from_packed(packed, linear.bias))
    with torch.no_grad():
        net.norm.running_mean.normal_()
    return net.eval()


def snapshot(model):
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
    )


def assert_untouched(model, before):
    state, modules, parameters = before
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == parameters
    now = model.state_dict()
    assert now.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(now[key], value), key


def refused(path, model, message):
    before = snapshot(model)
    with pytest.raises(FormatError, match=message):
        load(path, into=model)
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_dense_model_becomes_the_saved_one(tmp_path, pattern, dtype):
    saved = sparse_net(pattern, dtype)
    save(saved, tmp_path / "m.safetensors")
    fresh = Net(dtype=dtype)
    assert load(tmp_path / "m.safetensors", into=fresh) is fresh
    assert isinstance(fresh.first, SparseLinear)
    assert str(fresh.first.pattern) == pattern
    theirs, ours = saved.state_dict(), fresh.state_dict()
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert torch.equal(theirs[key], ours[key]), key
    x = torch.randn(7, 22).to(dtype)
    assert torch.equal(saved(x), fresh(x))
    assert fresh.head.weight is fresh.tied.weight
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


def test_a_sparse_model_takes_another_sparse_file(tmp_path):
    save(sparse_net("3:8"), tmp_path / "m")
    other = sparse_net("2:4")
    load(tmp_path / "m", into=other)
    assert str(other.second.pattern) == "3:8"


def test_no_bias_training_mode_and_requires_grad(tmp_path):
    save(sparse_net(bias=False), tmp_path / "m")
    fresh = Net(bias=False).train()
    fresh.second.bias.requires_grad_(False)
    load(tmp_path / "m", into=fresh)
    assert fresh.first.bias is None
    assert fresh.first.training
    assert not fresh.second.bias.requires_grad
    refused(tmp_path / "m", Net(bias=True), '"first" has no bias')


def test_a_model_without_sparse_layers(tmp_path):
    torch.manual_seed(2)
    save(saved := Net(), tmp_path / "m")
    fresh = load(tmp_path / "m", into=Net())
    assert torch.equal(fresh.head.weight, saved.head.weight)
    assert inspect(tmp_path / "m").layers == ()


def test_a_single_layer_comes_back_as_a_new_one(tmp_path):
    layer = SparseLinear.from_packed(pack(fitting((6, 16), "2:4"), "2:4"), torch.randn(6))
    save(layer, tmp_path / "m")
    loaded = load(tmp_path / "m", into=nn.Linear(16, 6))
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), layer(x))
    assert inspect(tmp_path / "m").layers[0].nbytes == layer.packed().nbytes


def test_one_layer_under_two_names_is_stored_and_loaded_once(tmp_path):
    layer = SparseLinear.from_packed(pack(fitting((16, 16), "2:4"), "2:4"))
    save(nn.ModuleList([layer, layer]), tmp_path / "m")
    shared = nn.Linear(16, 16, bias=False)
    fresh = load(tmp_path / "m", into=nn.ModuleList([shared, shared]))
    assert fresh[0] is fresh[1]
    assert torch.equal(fresh[0].packed().values, layer.packed().values)
    summary = inspect(tmp_path / "m")
    assert summary.nbytes == layer.packed().nbytes
    assert summary.dense_nbytes == 16 * 16 * 4


def test_views_and_tied_tensors_are_stored_as_tensors_of_their_own(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.arange(12.0)
            self.register_buffer("whole", base)
            self.register_buffer("part", base[2:6])
            self.register_buffer("turned", base.view(3, 4).t())
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("same", base)

    save(Views(), tmp_path / "m")
    fresh = Views()
    fresh.whole.zero_()
    fresh.part = torch.zeros(4)
    fresh.turned = torch.zeros(4, 3)
    load(tmp_path / "m", into=fresh)
    assert fresh.whole.tolist() == list(range(12))
    assert fresh.part.tolist() == [2, 3, 4, 5]
    assert fresh.turned[1].tolist() == [1, 5, 9]


def test_inspect_counts_bytes(tmp_path):
    net = sparse_net()
    save(net, tmp_path / "m", metadata={"note": "calibrated on nothing"})
    summary = inspect(tmp_path / "m")
    assert [layer.name for layer in summary.layers] == ["first", "second"]
    first = summary.layers[0]
    assert (first.pattern, first.shape, first.dtype, first.bias) == ("2:4", (13, 22), "float32", True)
    assert (first.nbytes, first.dense_nbytes) == (net.first.packed().nbytes, 13 * 22 * 4)
    dense = Net().state_dict()
    dense.pop("tied.weight")
    assert summary.dense_nbytes == sum(tensor.nbytes for tensor in dense.values())
    packed = net.state_dict()
    packed.pop("tied.weight")
    assert summary.nbytes == sum(tensor.nbytes for tensor in packed.values())
    assert summary.other_tensors == 7
    assert summary.format_version == "1"
    assert summary.metadata == {"note": "calibrated on nothing"}
    assert "13x22" in str(summary)
    assert "calibrated on nothing" in str(summary)


def test_every_truncation_is_found(tmp_path):
    save(sparse_net(), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    model = Net()
    for size in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:size])
        refused(tmp_path / "cut", model, "no whole safetensors file")


def test_flipped_bytes_are_found_wherever_they_are(tmp_path):
    save(sparse_net(), tmp_path / "m", metadata={"note": "text"})
    whole = (tmp_path / "m").read_bytes()
    model = Net()
    before = snapshot(model)
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    spots = [*range(0, header_end, 13), *range(header_end, len(whole), 97), len(whole) - 1]
    for spot in spots:
        damaged = bytearray(whole)
        damaged[spot] ^= 0x04
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(FormatError):
            load(tmp_path / "bad", into=model)
        with pytest.raises(FormatError):
            inspect(tmp_path / "bad")
    assert_untouched(model, before)


def rewritten(path, tmp_path, change):
    """The file with its header and tensors changed and the checksum made to fit again."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(header, tensors)
    header["sparsecomp.crc32"] = container._checksum(tensors, header)
    save_file(tensors, tmp_path / "changed", metadata=header)
    return tmp_path / "changed"


def edit_layer(**entries):
    def change(header, tensors):
        layers = json.loads(header["sparsecomp.layers"])
        layers["first"].update(entries)
        header["sparsecomp.layers"] = json.dumps(layers)

    return change


@pytest.mark.parametrize("numbers", ["float", "int8"])
def test_files_that_name_no_numbers_are_read(tmp_path, numbers):
    """As version 0.1.0 wrote them: whether a layer is quantised, and nothing more."""
    first = SparseLinear.from_linear(nn.Linear(16, 8), "2:4", method="magnitude", quantized=numbers == "int8")
    save(nn.Sequential(OrderedDict(first=first)), tmp_path / "m")

    def older(header, tensors):
        layers = json.loads(header["sparsecomp.layers"])
        assert layers["first"].pop("numbers") == numbers
        header["sparsecomp.layers"] = json.dumps(layers)

    again = nn.Sequential(OrderedDict(first=nn.Linear(16, 8)))
    load(rewritten(tmp_path / "m", tmp_path, older), into=again)
    assert again.first.numbers == first.numbers and torch.equal(again.first.weight, first.weight)


def put(name, value):
    return lambda header, tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update({"sparsecomp.format": "3"}), "format version 3, this package reads 1 and 2"),
        (lambda h, t: h.pop("sparsecomp.format"), "not written by sparsecomp.save"),
        (lambda h, t: h.pop("sparsecomp.layers"), "does not describe its layers"),
        (lambda h, t: h.update({"sparsecomp.layers": "[1]"}), "does not describe its layers"),
        (edit_layer(pattern="3:5"), 'pattern "3:5" has no such group'),
        (edit_layer(pattern="unstructured:0.5"), "not stored as N:M"),
        (edit_layer(numbers="int4@a8"), 'no kernel computes numbers "int4@a8" yet'),
        (edit_layer(numbers="int8@a8"), 'has no tensor "first.scales"'),
        (edit_layer(numbers=8), "numbers are a name or a value of Numbers, not int"),
        (edit_layer(pattern="1:4"), "packed tensors have shapes"),
        (edit_layer(shape=[13, 30]), "packed tensors have shapes"),
        (edit_layer(shape=[-1, 22]), "a shape is"),
        (edit_layer(dtype="float16"), "said to be float16"),
        (edit_layer(bias=False), '"first" has no bias'),
        (lambda h, t: t.pop("first.bias"), 'missing: "first.bias"'),
        (lambda h, t: t.pop("first.metadata"), 'no tensor "first.metadata"'),
        (put("first.metadata", torch.full((13, 3), 0xFF, dtype=torch.uint8)), "do not ascend"),
        (put("first.bias", torch.zeros(14)), "bias of shape"),
        (put("first.extra", torch.zeros(1)), '"first.extra" too many'),
        (put("norm.extra", torch.zeros(1)), 'has "norm.extra" too many'),
        (lambda h, t: t.pop("norm.weight"), 'lacks "norm.weight"'),
        (put("norm.weight", torch.zeros(12)), r"has shape \(12,\), the model wants \(13,\)"),
        (put("norm.weight", torch.zeros(13, dtype=torch.float16)), "is torch.float16, the model has torch.float32"),
        (
            lambda h, t: (h.update({"sparsecomp.aliases": "{}"}), t.update({"tied.weight": torch.zeros(5, 22)})),
            '"head.weight" and "tied.weight" differ',
        ),
        (lambda h, t: h.update({"sparsecomp.aliases": '{"tied.weight": "gone"}'}), 'missing: "gone"'),
    ],
)
def test_wrong_contents_with_a_right_checksum(tmp_path, change, message):
    save(sparse_net(), tmp_path / "m")
    refused(rewritten(tmp_path / "m", tmp_path, change), Net(), message)


def test_a_model_of_another_size_or_dtype_or_class(tmp_path):
    save(sparse_net(), tmp_path / "m")
    refused(tmp_path / "m", Net(hidden=14), r'"first" has shape \(13, 22\), the model\'s layer has \(14, 22\)')
    refused(tmp_path / "m", Net(dtype=torch.bfloat16), "convert the model first")
    refused(tmp_path / "m", nn.Sequential(nn.Linear(22, 13)), "no place in the model.*no such linear layer")
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(FormatError, match="meta device"):
        load(tmp_path / "m", into=empty)
    refused(tmp_path / "gone", Net(), "is not a file")
    (tmp_path / "text").write_text("not a model, but long enough to hold a header length")
    refused(tmp_path / "text", Net(), "no whole safetensors file")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FormatError, match=r'there is no folder ".*missing"; make it first'):
        save(Net(), tmp_path / "missing" / "m.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    save(sparse_net(), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    net = sparse_net()
    with pytest.raises(ModelError, match="is not text"):
        save(net, tmp_path / "m", metadata={"steps": 3})
    net.register_buffer("nothing", torch.zeros(2, device="meta"))
    with pytest.raises(ModelError, match="on the meta device"):
        save(net, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
