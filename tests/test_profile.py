"""The profile's arithmetic and its JSON, both ways."""

from __future__ import annotations

import json

from penstock.profile import ComponentProfile, Fact, Profile, StackProfile

FACT = Fact(origin="structure", detail="a test")


def make_profile() -> Profile:
    stack = StackProfile(path="blocks", block_class="Block", block_bytes=(30, 20), fact=FACT)
    transformer = ComponentProfile(
        name="transformer",
        class_name="T",
        role="denoiser",
        fact=FACT,
        num_bytes=64,
        dtype_bytes={"F32": 64},
        stacks=(stack,),
        declares=("_cp_plan",),
    )
    vae = ComponentProfile(name="vae", class_name="V", role="vae", fact=FACT, num_bytes=6, dtype_bytes={"BF16": 6})
    return Profile(
        model="m",
        pipeline_class="P",
        output="image",
        components=(transformer, vae),
        parts={"scheduler": "S"},
        notes=("n",),
    )


def test_bytes_add_up() -> None:
    profile = make_profile()
    assert profile.num_bytes == 70
    (denoiser,) = profile.by_role("denoiser")
    assert denoiser.other_bytes == 14
    assert denoiser.stacks[0].num_blocks == 2
    assert denoiser.stacks[0].num_bytes == 50


def test_json_both_ways() -> None:
    profile = make_profile()
    text = profile.to_json()
    assert "\n" not in text
    assert json.loads(text)["components"][0]["stacks"][0]["block_bytes"] == [30, 20]
    assert Profile.from_json(text) == profile
