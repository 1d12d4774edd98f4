"""The fields of the API."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from penstock.server.failures import from_validation
from penstock.server.schemas import ADVICE, Ask, EditAsk, ImageAsk, ImagesAnswer, RemixAsk, VideoAsk


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (ImageAsk, {"size": "64"}),
        (ImageAsk, {"size": "0x64"}),
        (ImageAsk, {"size": "64x64\n"}),
        (ImageAsk, {"quality": "hd"}),
        (ImageAsk, {"background": "transparent"}),
        (ImageAsk, {"output_compression": 101}),
        (ImageAsk, {"partial_images": 4}),
        (ImageAsk, {"seed": -1}),
        (ImageAsk, {"seed": 2**63}),
        (ImageAsk, {"prompt": "x" * 32_001}),
        (ImageAsk, {"prompt": "a\0b"}),
        (ImageAsk, {"lora": [{"name": "a/b"}]}),
        (ImageAsk, {"lora": [{"name": ".hidden"}]}),
        (ImageAsk, {"lora": [{"name": "a", "scale": float("nan")}]}),
        (ImageAsk, {"lora": [{"name": "a", "path": "/x"}]}),
        (ImageAsk, {"lora": "not json"}),
        (EditAsk, {"input_fidelity": "high"}),
        (VideoAsk, {"seconds": "0"}),
        (VideoAsk, {"seconds": "-4"}),
        (VideoAsk, {"seconds": "1e3"}),
        (VideoAsk, {"seconds": True}),
        (VideoAsk, {"fps": 0}),
        (VideoAsk, {"fps": 0.0001}),
        (ImageAsk, {"lora": "[" * 100_000}),
        (VideoAsk, {"fps": float("inf")}),
        (VideoAsk, {"n": 2}),
        (RemixAsk, {}),
        (RemixAsk, {"prompt": "x", "size": "64x64"}),
    ],
)
def test_values_out_of_range(model: type[Ask], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(fields)


@pytest.mark.parametrize("seconds", ["4", 4, 4.0, "4.5"])
def test_seconds_as_a_text_or_a_number(seconds: Any) -> None:
    assert float(str(VideoAsk.model_validate({"seconds": seconds}, strict=True).seconds)) == float(seconds)


def test_adapters_in_their_spellings() -> None:
    for lora in ([{"name": "a", "scale": 1}], {"name": "a"}, '[{"name": "a"}]', '{"name": "a"}'):
        (one,) = ImageAsk.model_validate({"lora": lora}).lora or []
        assert (one.name, one.scale) == ("a", 1.0)


def test_other_fields_are_kept_for_the_pipeline() -> None:
    assert ImageAsk.model_validate({"true_cfg_scale": 3}).model_extra == {"true_cfg_scale": 3}


def test_a_number_of_pictures_or_videos_that_cannot_be() -> None:
    for model, n, is_about_videos in ((VideoAsk, 2, True), (ImageAsk, -1, False)):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({"n": n}, strict=True)
        message = from_validation(caught.value.errors(), ADVICE).message
        assert ("ask several times" in message) == is_about_videos and "1000" not in message
    assert VideoAsk.model_validate({"n": 1}, strict=True).n == 1 and VideoAsk.model_validate({"n": "1"}).n == "1"


def test_advice_is_about_fields_that_exist_somewhere() -> None:
    known = {name for model in (EditAsk, VideoAsk) for name in model.model_fields}
    assert ADVICE.keys() - known == {"style"}


def test_an_answer_has_what_clients_require() -> None:
    answer = ImagesAnswer(created=1, data=[], size="64x64", output_format="png", job_id="image_1", timings={})
    assert answer.model_dump(exclude_none=True)["usage"]["input_tokens_details"] == {
        "text_tokens": 0,
        "image_tokens": 0,
    }
