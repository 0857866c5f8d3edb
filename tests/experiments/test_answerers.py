"""A finished run answers as generate.py does, at any strength of its ΔW, whoever else asks."""

import json
import math
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import generate
from checkpoints.files import read_json
from configurator import configure
from experiments import answerers
from experiments.answerers import load, load_finished, with_bases
from experiments.finished_runs import find_runs
from experiments.subspaces import scaled, updates
from generate import GenerateConfig
from lora import adapters_off, lora_layers
from runtime.run_folder import FINISHED_FILE

TEXT = "train film 3 is witty"


def logprobs(answerer: answerers.Answerer, strength: float) -> list[float]:
    return answerer.answer(TEXT, strength)[0].label_logprobs


def test_strength_scales_the_update_and_leaves_the_run_as_it_was(trained: Path) -> None:
    model = load_finished(str(trained / "lora")).sampler.model
    idx = torch.randint(50257, (1, 9))
    with torch.no_grad():
        with adapters_off(model):
            base, _ = model(idx)
        whole = [layer.delta_weight() for layer in lora_layers(model).values()]
        with scaled(model, 0.0):
            assert model(idx)[0].equal(base)
        with scaled(model, 1.5):
            for layer, delta in zip(lora_layers(model).values(), whole, strict=True):
                torch.testing.assert_close(layer.delta_weight(), 1.5 * delta)
    for layer, delta in zip(lora_layers(model).values(), whole, strict=True):
        assert layer.delta_weight().equal(delta)


def test_zero_is_the_base_exactly_and_one_the_trained_adapter(trained: Path) -> None:
    run = load_finished(str(trained / "lora"))
    plain = generate.ModelSampler(
        generate.load_subject(GenerateConfig(out_dir=str(trained / "lora"))).model, run.loader)
    assert logprobs(run, 0.0) == logprobs(run.base(), 1.0)
    assert logprobs(run, 1.0) == plain.predict([{"text": TEXT}])[0].label_logprobs
    assert logprobs(run, 0.0) != logprobs(run, 1.0) != logprobs(run, 2.0)
    assert run.chance_at(1.0, TEXT) == math.exp(logprobs(run, 1.0)[1])


def test_visitors_who_ask_at_once_get_their_own_answers(trained: Path) -> None:
    run = load_finished(str(trained / "lora"))
    strengths = [0.0, 2.0, 1.0, 0.5] * 8
    expected = [logprobs(run, strength) for strength in strengths]
    with ThreadPoolExecutor(4) as visitors:
        assert list(visitors.map(lambda strength: logprobs(run, strength), strengths)) == expected


def test_accuracy_is_the_one_that_generate_writes(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "lora", tmp_path / "run")
    generate.main(configure(GenerateConfig, [f"out_dir={run}", "split=validation", "device=cpu"]))
    expected = read_json(run / "best" / "results-validation.json")["accuracy"]
    assert load_finished(str(run)).accuracy_at(1.0, 200) == expected


def test_words_move_the_answer_by_what_leaving_them_out_changes(trained: Path) -> None:
    run = load_finished(str(trained / "lora"))
    whole, changes = run.without_words(["a", "witty", "film"], 1.0)
    assert whole == run.chance_at(1.0, "a witty film")
    assert changes == [run.chance_at(1.0, text) - whole
                       for text in ("witty film", "a film", "a witty")]
    assert len(run.without_words(["film"], 1.0)[1]) == 1  # nothing is left


def test_singular_values_stand_by_part_and_layer(trained: Path) -> None:
    run = load_finished(str(trained / "lora"))
    values = run.singular_values()
    assert {part: len(layers) for part, layers in values.items()} == {"q": 2, "k": 2, "v": 2}
    found = {(each.part, each.layer.split(".")[2]): each for each in updates(run.sampler.model)}
    dense = found["k", "1"].scaling * found["k", "1"].B @ found["k", "1"].A
    torch.testing.assert_close(torch.tensor(values["k"][1]), torch.linalg.svdvals(dense)[:2])


def test_models_are_loaded_once_until_their_weights_change(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "lora", tmp_path / "run")
    first = load_finished(str(run))
    assert load_finished(str(run)) is first
    assert first.base() is load_finished(str(trained / "lora")).base()
    weights = run / "best" / "adapter_model.safetensors"
    shutil.copy(weights, tmp_path / "copy")
    (tmp_path / "copy").replace(weights)
    assert load_finished(str(run)) is not first


def test_a_model_without_lora_answers_alike_at_any_strength(trained: Path) -> None:
    run = load_finished(str(trained / "bitfit"))
    assert (run.is_lora, run.about) == (False, "bitfit; task sentiment")
    assert logprobs(run, 0.0) == logprobs(run, 2.0) != logprobs(run.base(), 1.0)
    with pytest.raises(ValueError, match="trained method=bitfit and has no ΔW"):
        load_finished(str(trained / "bitfit"), lora=True)


def test_runs_are_found_wherever_they_stand_and_others_named(
    trained: Path, tmp_path: Path
) -> None:
    for name in ("a/lora", "writing", "broken", "damaged"):
        shutil.copytree(trained / "lora", tmp_path / name)
    (tmp_path / "writing" / FINISHED_FILE).unlink()
    (tmp_path / "writing" / "metrics.jsonl").write_text('{"iteration": 1, "train_loss": 1.0}\n{"it')
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "damaged" / "best" / "results.json").write_text('{"n": 3}')
    (tmp_path / "model").mkdir()
    shutil.copy(trained / "base" / "config.json", tmp_path / "model")  # of a model, not of a run
    finished, notes = find_runs(tmp_path)
    assert finished == [tmp_path / "a" / "lora"]
    assert len(notes) == 3
    assert f"{tmp_path / 'writing'} is not finished" in notes
    assert all(any(name in note for note in notes) for name in ("broken", "damaged"))
    assert find_runs(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize(("change", "message"), [
    (lambda run: (run / FINISHED_FILE).write_text(json.dumps({"iteration": 1})),
     "run is not finished: wait until its training ends"),
    (lambda run: (run / "config.json").unlink(), "is not finished"),
    (lambda run: (run / "best" / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model"),
    (lambda run: shutil.rmtree(run / "last"), "is not finished"),
])
def test_a_run_that_cannot_be_shown_is_refused(
    trained: Path, tmp_path: Path, change: object, message: str
) -> None:
    run = shutil.copytree(trained / "lora", tmp_path / "run")
    change(run)
    with pytest.raises((ValueError, OSError), match=message):
        load_finished(str(run))


def test_an_untrained_model_answers_without_a_run(trained: Path) -> None:
    base = load(GenerateConfig(init_from=str(trained / "base"), dataset="movie_reviews"))
    assert (base.name, base.about) == ("base", "before training; task sentiment")
    assert base.answer(TEXT)[1] > 0


def test_a_folder_whose_name_no_page_can_send_is_named_in_a_note(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "lora", tmp_path / "bad\udcff")
    finished, (note,) = find_runs(tmp_path)
    assert finished == []
    assert note == rf"{tmp_path}/bad\udcff is named in another encoding than UTF-8"


def test_many_runs_are_asked_without_holding_all_their_models(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answerers, "_load", lru_cache(maxsize=2)(answerers._load.__wrapped__))
    folders = [str(shutil.copytree(trained / "lora", tmp_path / str(i))) for i in range(5)]
    alive, names, most = weakref.WeakSet(), [], 0
    for model in with_bases(folders):
        alive.add(model)
        names.append(model.name)
        most = max(most, len(alive))
        del model
    assert names == ["base", *folders]
    assert most <= 4
