"""Sound files: rate, channels and samples come back."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from penstock.media.facts import read_facts
from penstock.media.wav import to_int16, write_wav
from penstock.request import GenerationResult


@pytest.mark.parametrize("channels", [1, 2])
def test_samples_come_back(channels: int, tmp_path: Path) -> None:
    tone = np.sin(np.linspace(0, 40, 800, dtype=np.float32))
    audio = np.stack([tone * (i + 1) / 2 for i in range(channels)])
    result = GenerationResult(
        kind="audio", seed=0, images=[], audio=audio, sampling_rate_hz=16000, arguments={}, elapsed_s=0.0
    )
    write_wav(result, tmp_path / "a.wav", {"seed": 3, "arguments": {"prompt": "\u00fc"}})
    assert read_facts(tmp_path / "a.wav") == {"seed": 3, "arguments": {"prompt": "\u00fc"}}
    with wave.open(str(tmp_path / "a.wav")) as stream:
        assert (stream.getframerate(), stream.getnchannels(), stream.getnframes()) == (16000, channels, 800)
        samples = np.frombuffer(stream.readframes(800), dtype=np.int16).reshape(800, channels).T
    assert np.array_equal(samples, to_int16(audio))


def test_loud_and_broken_samples_are_clipped() -> None:
    assert to_int16(np.array([[2.0, -2.0, np.nan, 0.5]], dtype=np.float32)).tolist() == [[32767, -32767, 0, 16384]]
