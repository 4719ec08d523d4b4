"""What decides whether eager calls go past torch's dispatcher: the switch, the version, and torch as it is found."""

from __future__ import annotations

import argparse
import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.cli import doctor
from sparsecomp.machine.native import native
from sparsecomp.nn import SparseLinear
from sparsecomp.nn.eager import probe as module
from sparsecomp.nn.eager import watch
from sparsecomp.nn.eager.calls import _Product
from sparsecomp.nn.eager.probe import SWITCH, Functions, probe
from tests.sparse_layers import assert_right, make


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.delenv(SWITCH, raising=False)
    probe.cache_clear()
    module._warn_once.cache_clear()
    yield
    probe.cache_clear()


def _reason() -> str:
    """Why calls go through the dispatcher, after seeing that layers are right and that people are told."""
    reason = probe()
    assert isinstance(reason, str) and reason and not reason.endswith(".")
    layer = make()
    with torch.no_grad():
        assert layer._eager(torch.randn(3, 40), None, None) is None
    assert_right(layer, torch.randn(3, 40))
    (note,) = [each for each in layer.explain().notes if "dispatcher" in each]
    assert note.endswith(reason) and reason in str(layer.explain())
    assert doctor._eager() == {"past_the_dispatcher": False, "reason": reason}
    return reason


def test_calls_go_past_the_dispatcher_here() -> None:
    found = probe()
    assert isinstance(found, Functions) and found.watch.nobody()
    assert (found.extension is None) is isinstance(native(), str)
    assert doctor._eager() == {"past_the_dispatcher": True, "reason": found.in_python}
    assert not any("dispatcher" in note for note in make().explain().notes)


@pytest.mark.parametrize("value", ["", "on", " ON "])
def test_the_switch_is_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, value)
    assert isinstance(probe(), Functions)


@pytest.mark.parametrize("value", ["off", "Off"])
def test_the_switch_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _reason() == "SPARSECOMP_EAGER=off"


def test_another_value_of_the_switch_is_told_once_and_counts_as_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "fast")
    with pytest.warns(UserWarning, match='SPARSECOMP_EAGER=fast is neither "on" nor "off"') as told:
        assert "SPARSECOMP_EAGER=fast" in _reason()
        make()
    assert len(told) == 1


@pytest.mark.parametrize("version", ["2.10.9", "2.14.0", "2.14.0a0+git1", "3.0.0", "1.13.1", "unknown"])
def test_a_torch_that_is_not_tested(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert _reason().startswith(f"torch {version} is outside what is tested")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.1+cu130"])
def test_a_torch_that_is_tested(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert isinstance(probe(), Functions)


@pytest.mark.parametrize(
    "error", [AttributeError("_gone"), ImportError("moved"), RuntimeError("no"), TypeError(), OSError(1)]
)
def test_whatever_the_probe_meets_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Any:
        raise error

    monkeypatch.setattr(watch, "find", find)
    reason = _reason()
    assert type(error).__name__ in reason and torch.__version__ in reason


def test_without_threads_the_dispatcher_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert "can't start new thread" in str(probe())
    _reason()


def test_a_new_key_of_the_dispatcher_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch._C._dispatch_tls_local_include_set
    monkeypatch.setattr(
        torch._C, "_dispatch_tls_local_include_set", lambda: true().add(torch._C.DispatchKey.PythonDispatcher)
    )
    assert "PythonDispatcher" in _reason()


def test_a_new_key_that_is_left_out_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch._C._dispatch_tls_local_exclude_set
    monkeypatch.setattr(
        torch._C, "_dispatch_tls_local_exclude_set", lambda: true().add(torch._C.DispatchKey.PythonDispatcher)
    )
    assert "PythonDispatcher" in _reason()


@pytest.mark.parametrize(
    ("owner", "name", "instead", "missed"),
    [
        (torch._C, "_is_torch_function_mode_enabled", lambda: False, "a mode of functions would not be noticed"),
        (torch._C, "_is_any_autocast_enabled", lambda: False, "autocast would not be noticed"),
        (torch._C, "_is_any_autocast_enabled", lambda: True, "something watches"),
        (torch._C, "_is_any_autocast_enabled", None, "TypeError"),
        (torch.autograd.forward_ad, "_current_level", "none", "no integer"),
    ],
)
def test_functions_that_mean_something_else_are_not_used(
    owner: Any, name: str, instead: Any, missed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, instead)
        assert missed in str(probe())
    _reason()


def test_keys_that_no_longer_tell_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch._C._dispatch_tls_local_include_set()
    with torch.inference_mode():
        inside = torch._C._dispatch_tls_local_include_set()
    monkeypatch.setattr(
        torch._C, "_dispatch_tls_local_include_set", lambda: inside if torch.is_inference_mode_enabled() else keys
    )
    reason = _reason()
    assert "a mode of the dispatcher and a transform would not be noticed" in reason


@pytest.mark.parametrize(
    "surrounding",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.autograd.forward_ad.dual_level,
        lambda: torch.autograd.profiler.profile(use_cpu=True),
        nullcontext,
    ],
)
def test_it_may_be_asked_anywhere(surrounding: Any) -> None:
    with surrounding():
        assert isinstance(probe(), Functions)
    assert probe().watch.nobody()  # type: ignore[union-attr]
    assert_right(make(), torch.randn(3, 40))


def test_without_the_extension_calls_go_past_the_dispatcher_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native", lambda: "the compiled extension is not there (test)")
    found = probe()
    assert isinstance(found, Functions) and found.extension is None
    assert doctor._eager() == {"past_the_dispatcher": True, "reason": "the compiled extension is not there (test)"}
    layer = make()
    assert isinstance(layer._eager, _Product)
    assert_right(layer, torch.randn(3, 40))


def test_hooks_are_never_bypassed() -> None:
    """So no list of them is kept: a kind that torch gets in the future is run by nn.Module.__call__ as well."""

    class Sub(SparseLinear):
        pass

    for kind in (SparseLinear, Sub):
        assert kind.__call__ is nn.Module.__call__
        assert not {"_call_impl", "_wrapped_call_impl"} & {name for each in kind.__mro__[:-2] for name in vars(each)}


def test_doctor_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    for value, line in (("on", "eager calls go past torch's dispatcher"), ("off", "SPARSECOMP_EAGER=off")):
        monkeypatch.setenv(SWITCH, value)
        probe.cache_clear()
        doctor.run(argparse.Namespace(quick=True, json=False))
        assert line in capsys.readouterr().out.replace("\n", " ")
        doctor.run(argparse.Namespace(quick=True, json=True))
        told = json.loads(capsys.readouterr().out)["eager_calls"]
        assert told["past_the_dispatcher"] is (value == "on")


def test_gradients_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(), torch.randn(2, 3, 40)

    def gradients() -> list[Tensor]:
        inner = x.clone().requires_grad_()
        made = SparseLinear.from_packed(layer.packed(), layer.bias, activation="gelu")
        made(inner).square().sum().backward()
        assert inner.grad is not None and made.bias is not None and made.bias.grad is not None
        return [inner.grad, made.bias.grad]

    past = gradients()
    monkeypatch.setenv(SWITCH, "off")
    probe.cache_clear()
    for got, want in zip(gradients(), past, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
