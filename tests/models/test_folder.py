"""Names of models: built-in, folder, hub id; and what is wrong with the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.config import SourceConfig
from penstock.errors import ConfigError, ModelError, ModelNotFoundError, NotAPipelineError
from penstock.models.folder import PromptGrammar, open_folder

SOURCE = SourceConfig()


def make_folder(path: Path, index: str, notes: str | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model_index.json").write_text(index)
    if notes is not None:
        (path / "penstock.json").write_text(notes)
    return path


def test_folder(tmp_path: Path) -> None:
    index = {
        "_class_name": "P",
        "vae": ["diffusers", "V"],
        "image_encoder": [None, None],
        "odd": [1, 2],
        "is_distilled": True,
    }
    folder = open_folder(make_folder(tmp_path / "m", json.dumps(index)), SOURCE)
    assert folder.class_name == "P"
    assert folder.component_classes == {"vae": ("diffusers", "V")}
    assert folder.component_path("vae") == folder.path / "vae"
    assert folder.notes.defaults == {} and folder.notes.prompts is None


def test_demo_is_built_in_and_knows_its_grammar() -> None:
    folder = open_folder("demo", SOURCE)
    assert folder.class_name == "FluxPipeline"
    assert folder.notes.defaults["height"] == folder.notes.defaults["width"] == 64
    assert folder.notes.prompts is not None
    assert folder.notes.prompts.knows("a red circle left of a blue square")
    assert not folder.notes.prompts.knows("a dog")


def test_demo_video_is_built_in_and_knows_its_grammar() -> None:
    folder = open_folder("demo-video", SOURCE)
    assert folder.class_name == "LTXPipeline"
    assert (folder.notes.defaults["num_frames"], folder.notes.defaults["frame_rate"]) == (17, 8)
    assert folder.notes.prompts is not None
    assert folder.notes.prompts.knows("a red circle moving right")
    assert not folder.notes.prompts.knows("a red circle")


def test_grammar_ignores_case_and_outer_space() -> None:
    grammar = PromptGrammar(pattern="a (dog|cat)", description="a {dog|cat}")
    assert grammar.knows(" A Dog ")
    assert not grammar.knows("a dog on a mat")


@pytest.mark.parametrize("name", ["nowhere", "./no/such/folder", "a/b/c", "", "x" * 5000])
def test_unknown_names_say_what_is_possible(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="Give"):
        open_folder(name, SOURCE)


def test_hub_id_without_a_hub() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'owner/name' is no folder here, and the hub did not give it"):
        open_folder("owner/name", SOURCE)


def test_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(NotAPipelineError, match=r"from_single_file.*penstock.apply.*load_lora_weights"):
        open_folder(file, SOURCE)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"_class_name": null}', '{"_class_name": 3}', '{"_class_name": ["a"]}', '{"vae"']
)
def test_folder_that_is_no_pipeline(tmp_path: Path, index: str) -> None:
    with pytest.raises(NotAPipelineError, match=r"model_index\.json"):
        open_folder(make_folder(tmp_path / "m", index), SOURCE)


def test_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(NotAPipelineError, match=r"has no model_index\.json"):
        open_folder(tmp_path, SOURCE)


@pytest.mark.parametrize(
    "notes",
    ["", "[]", '{"sizes": [64]}', '{"prompts": {"pattern": "(", "description": "d"}}', '{"prompts": {"pattern": "x"}}'],
)
def test_notes_are_checked(tmp_path: Path, notes: str) -> None:
    with pytest.raises(ModelError, match="not valid notes"):
        open_folder(make_folder(tmp_path / "m", '{"_class_name": "P"}', notes), SOURCE)


def test_revision_is_not_ignored_for_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", '{"_class_name": "P"}')
    for model in (str(folder), "demo", "demo-video"):
        with pytest.raises(ConfigError, match="revision='v1' is for hub models"):
            open_folder(model, SourceConfig(revision="v1"))
