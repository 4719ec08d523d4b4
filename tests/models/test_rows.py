"""Which rows count: every layer gets the mask of what its input is made of, or the user is asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsecomp.errors import CalibrationError, ModelError
from sparsecomp.models.calibration import calibrate
from tests.small_models import ids, reals, small

TEXTS, TOKENS = 4, 10
LAYERS = {
    "bart": {
        "encoder": "model.encoder.layers.0.fc1",
        "decoder": "model.decoder.layers.0.fc1",
        "decoder's own": "model.decoder.layers.0.self_attn.q_proj",
        "cross k": "model.decoder.layers.0.encoder_attn.k_proj",
        "cross v": "model.decoder.layers.1.encoder_attn.v_proj",
        "cross q": "model.decoder.layers.0.encoder_attn.q_proj",
    },
    "t5": {
        "encoder": "encoder.block.0.layer.1.DenseReluDense.wi",
        "decoder": "decoder.block.1.layer.2.DenseReluDense.wi",
        "decoder's own": "decoder.block.0.layer.0.SelfAttention.q",
        "cross k": "decoder.block.0.layer.1.EncDecAttention.k",
        "cross v": "decoder.block.1.layer.1.EncDecAttention.v",
        "cross q": "decoder.block.0.layer.1.EncDecAttention.q",
    },
}
OF_THE_ENCODER = {"encoder", "cross k", "cross v"}


def batch_of(kind: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """A batch, and how many rows of the encoder and of the decoder are real."""
    words, mask, other = ids(TEXTS, TOKENS), reals(TEXTS, TOKENS, 4), reals(TEXTS, TOKENS, 9)
    enc, dec, everything = TEXTS * 4, TEXTS * 9, TEXTS * TOKENS
    both = {"input_ids": words, "decoder_input_ids": ids(TEXTS, TOKENS)}
    match kind:
        case "both":
            return both | {"attention_mask": mask, "decoder_attention_mask": other}, enc, dec
        case "the encoder's alone":
            return both | {"attention_mask": mask}, enc, everything
        case "the decoder's alone":
            return both | {"decoder_attention_mask": other}, everything, dec
        case "the same words":
            same = {"input_ids": words, "decoder_input_ids": words}
            return same | {"attention_mask": mask, "decoder_attention_mask": other}, enc, dec
        case "labels":
            return {"input_ids": words, "attention_mask": mask, "labels": words}, enc, everything
        case "as many texts as tokens":
            square = {"input_ids": ids(TOKENS, TOKENS), "decoder_input_ids": ids(TOKENS, TOKENS)}
            masks = {
                "attention_mask": reals(TOKENS, TOKENS, 4),
                "decoder_attention_mask": reals(TOKENS, TOKENS, 9),
            }
            return square | masks, 40, 90
        case _:
            raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    ["both", "the encoder's alone", "the decoder's alone", "the same words", "labels", "as many texts as tokens"],
)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoders_mask_never_lies_over_the_decoder(name, kind):
    batch, encoder, decoder = batch_of(kind)
    cal = calibrate(small(name), [batch], show_progress=False)
    for what, layer in LAYERS[name].items():
        assert cal[layer].tokens == (encoder if what in OF_THE_ENCODER else decoder), what


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **batch):
        return self.inner(**batch)


@pytest.mark.parametrize("around", [False, True])
def test_a_decoder_that_is_fed_the_shifted_words_of_the_encoder_counts_whole(around):
    batch = {"input_ids": ids(TEXTS, TOKENS), "attention_mask": reals(TEXTS, TOKENS, 4)}
    model, prefix = (Around(small("bart")), "inner.") if around else (small("bart"), "")
    cal = calibrate(model, [batch], show_progress=False)
    tokens = {what: cal[prefix + layer].tokens for what, layer in LAYERS["bart"].items()}
    assert tokens["encoder"] == tokens["cross k"] == 16 and tokens["decoder"] == tokens["cross q"] == 40


def test_the_mask_of_words_does_not_lie_over_an_image_of_as_many_patches():
    batch = {
        "input_ids": ids(TEXTS, TOKENS),
        "attention_mask": reals(TEXTS, TOKENS, 4),
        "pixel_values": torch.randn(TEXTS, 3, 12, 12),  # 9 patches and the class token
    }
    cal = calibrate(small("clip"), [batch], show_progress=False)
    text, image = (next(each for each in cal if each.endswith("fc1") and kind in each) for kind in ("text", "vision"))
    assert cal[text].tokens == 16 and cal[image].tokens == 40


def test_a_model_with_tokens_first_gets_the_mask_of_its_axes_also_for_as_many_texts_as_tokens():
    torch.manual_seed(2)
    model = small("xlnet")
    batch = {"input_ids": ids(8, 8), "attention_mask": reals(8, 8, 3)}
    parts = [{key: each[some] for key, each in batch.items()} for some in (slice(0, 5), slice(5, 8))]
    square, apart = (calibrate(model, each, show_progress=False) for each in ([batch], parts))
    for name, statistics in apart.items():
        assert square[name].tokens == statistics.tokens == 24
        torch.testing.assert_close(square[name].gram, statistics.gram, rtol=1e-4, atol=1e-4)


def test_where_a_part_of_a_square_batch_cannot_be_run_the_user_is_asked():
    model = small("xlnet")
    batch = {"input_ids": ids(8, 8), "attention_mask": reals(8, 8, 3)}

    def whole(model, batch):
        assert len(batch["input_ids"]) == 8
        return model(**batch)

    with pytest.raises(CalibrationError, match=r"it cannot be told which axes .* pass mask="):
        calibrate(model, [batch], forward=whole, show_progress=False)


class Turned(nn.Module):
    """Works on [T, B, in], as the modules of torch do by default."""

    def __init__(self, turn: bool = True) -> None:
        super().__init__()
        self.embedding, self.body, self.turn = nn.Embedding(60, 8), nn.Linear(8, 8), turn

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        return self.body(hidden.transpose(0, 1) if self.turn else hidden)


def gram_of(model: Turned, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = model.embedding(batch["input_ids"])[batch["attention_mask"].bool()].detach()
    return rows.T @ rows


@pytest.mark.parametrize("turn", [False, True])
def test_square_masks_follow_what_other_batches_showed_and_else_the_user_is_asked(turn):
    model = Turned(turn)
    square = {"input_ids": ids(6, 6), "attention_mask": reals(6, 6, 2)}
    other = {"input_ids": ids(3, 6), "attention_mask": reals(3, 6, 6)}
    cal = calibrate(model, [other, square], show_progress=False)
    torch.testing.assert_close(cal["body"].gram, gram_of(model, other) + gram_of(model, square))
    with pytest.raises(CalibrationError, match=r"body: it cannot be told which axes .* pass mask=lambda"):
        calibrate(model, [square], show_progress=False)

    def mask(batch):
        return batch["attention_mask"].T if turn else batch["attention_mask"]

    assert torch.allclose(calibrate(model, [square], mask=mask)["body"].gram, gram_of(model, square), atol=1e-5)
    # where both ways say the same there is nothing to ask
    square["attention_mask"] = torch.tril(torch.ones(6, 6)) * torch.tril(torch.ones(6, 6)).T
    assert calibrate(model, [square], show_progress=False)["body"].tokens == 6


def test_masks_by_name_go_to_the_layers_they_name():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.whole = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            # the same tensor, of which two layers count different rows
            return self.left(x) + self.right(x) + self.whole(x)

    x = torch.randn(3, 5, 4)
    first, second = reals(3, 5, 2).bool(), reals(3, 5, 3).bool()
    cal = calibrate(Pair(), [x], mask=lambda batch: {"left": first, "r*": second, "*": None}, show_progress=False)
    assert [cal[name].tokens for name in ("left", "right", "whole")] == [6, 9, 15]
    for name, mask in (("left", first), ("right", second)):
        torch.testing.assert_close(cal[name].gram, x[mask].T @ x[mask])
    with pytest.raises(ModelError, match='mask for "lefd" matches no layer'):
        calibrate(Pair(), [x], mask=lambda batch: {"lefd": first}, show_progress=False)
    with pytest.raises(CalibrationError, match=r"mask\(batch\) gave a str; allowed are"):
        calibrate(Pair(), [x], mask=lambda batch: "left", show_progress=False)


def test_a_mask_that_may_speak_of_heads_or_tokens_is_asked_for():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(60, 12), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.body(self.embedding(input_ids).unflatten(-1, (3, 4)).transpose(1, 2))

    batch = {"input_ids": ids(2, 5), "attention_mask": reals(2, 5, 4)}
    assert calibrate(Heads(), [batch], show_progress=False)["body"].tokens == 2 * 3 * 4
    batch = {"input_ids": ids(2, 3), "attention_mask": reals(2, 3, 2)}
    with pytest.raises(CalibrationError, match="it cannot be told which axes"):
        calibrate(Heads(), [batch], show_progress=False)


def test_words_behind_keys_and_values_given_with_the_batch_have_the_last_columns_of_the_mask():
    transformers = pytest.importorskip("transformers")
    model = small("llama")
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids(2, 4), past_key_values=cache, use_cache=True)
    mask = torch.cat([torch.ones(2, 4, dtype=torch.int64), reals(2, 5, 3)], dim=1)
    batch = {"input_ids": ids(2, 5), "attention_mask": mask, "past_key_values": cache}
    assert calibrate(model, [batch, batch], show_progress=False)["model.layers.0.mlp.up_proj"].tokens == 12
    assert cache.get_seq_length() == 4
