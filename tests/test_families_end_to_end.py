"""The homework's commands do with a Llama what they do with a GPT-2."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import close, read_lines
from made_runs import train_in_two_parts
from made_tokenizers import CONFIG, byte_level, make_llama, write_gguf
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import experiments.dataset_analysis as dataset_analysis
import generate
import train as training
from checkpoints.files import read_json, read_tensors, write_json
from dataloader import make_loader
from experiments.plan import ExperimentsConfig, plan
from generate import GenerateConfig
from models.families import load_decoder
from models.tokenizer import load_tokenizer
from tasks.registry import make_task
from train import TrainConfig, train

WEIGHTS = ["adapter_model.safetensors", "model.safetensors"]


@pytest.fixture
def on_llama(config: TrainConfig, llama: Path) -> TrainConfig:
    return replace(config, init_from=str(llama), lora_targets="all")


def trained_weights(config: TrainConfig, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    folder = Path(config.out_dir, checkpoint)
    return read_tensors(next(folder / name for name in WEIGHTS if (folder / name).exists()))


@pytest.mark.parametrize("rank", [4, 0], ids=["LoRA", "full"])
def test_interrupted_run_ends_as_an_uninterrupted_one(
    on_llama: TrainConfig, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(on_llama, lora_rank=rank, dropout=0.1, max_iters=4, eval_interval=2)
    whole = replace(config, out_dir=str(tmp_path / "whole"))
    assert train_in_two_parts(config, monkeypatch) == train(whole)
    expected, found = trained_weights(whole), trained_weights(config)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_training_lowers_the_loss_and_scores_the_model_s_own_tokens(on_llama: TrainConfig) -> None:
    scores = train(replace(on_llama, max_iters=60, eval_interval=20, learning_rate=1e-2))
    metrics = read_lines(Path(on_llama.out_dir, "metrics.jsonl"))
    losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    assert losses[-1] < losses[0] / 3
    assert scores["last"]["garbage"] < scores["last"]["n"] / 2


def test_adapter_answers_alike_in_peft(on_llama: TrainConfig, llama: Path) -> None:
    train(on_llama)
    base = AutoModelForCausalLM.from_pretrained(llama)
    theirs = PeftModel.from_pretrained(base, Path(on_llama.out_dir, "best")).double().eval()
    ours = training.load_checkpoint(
        Path(on_llama.out_dir, "best"), on_llama, torch.device("cpu"), torch.float32)
    ours = ours.double().eval()  # in float32, merging alone differs by 1e-5
    idx = torch.arange(3, 43).view(2, 20)
    close(ours(idx)[0], theirs(idx).logits.detach())


def test_fully_tuned_checkpoint_is_a_model_of_its_own(on_llama: TrainConfig) -> None:
    train(replace(on_llama, lora_rank=0, max_iters=2))
    best, text = Path(on_llama.out_dir, "best"), "Is it good? 12 times."
    theirs = AutoModelForCausalLM.from_pretrained(best)
    tokenizer = AutoTokenizer.from_pretrained(best)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids[0].tolist() == load_tokenizer(best).encode_ordinary(text)
    close(load_decoder(best).eval()(ids)[0], theirs.eval()(ids).logits.detach())
    train(replace(on_llama, init_from=str(best), out_dir=on_llama.out_dir + "-on", max_iters=1))


@pytest.mark.parametrize("prompt", ["terse", "chat"])
def test_run_is_scored_asked_and_exported(
    on_llama: TrainConfig, prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = replace(on_llama, prompt=prompt, max_iters=2)
    scores = train(config)
    asked = GenerateConfig(out_dir=config.out_dir, device="cpu", dtype="float32")
    generate.main(asked)
    again = read_json(Path(config.out_dir, "best", "results.json"))
    assert again["accuracy"] == scores["best"]["accuracy"]
    assert again["prompt"] == make_task("sentiment", prompt).template
    generate.main(replace(asked, text="a witty film"))
    assert "negative" in capsys.readouterr().out
    generate.main(replace(asked, export=str(tmp_path / "merged")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    task = make_task("sentiment", prompt)
    message = task.prompt({"text": "a witty film"})
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True,
        return_dict=False) if prompt == "chat" else tokenizer(message)["input_ids"]
    ours = load_decoder(tmp_path / "merged").eval()
    loader = make_loader(replace(config), ours.config, load_tokenizer(tmp_path / "merged"))
    assert loader.encode_prompt({"text": "a witty film"}) == list(ids)
    idx = torch.tensor([ids])
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=6, do_sample=False)
    assert ours.generate(idx, 6, temperature=0).tolist() == expected.tolist()


def test_chat_supervises_the_answer_and_the_end_of_its_message(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    loader = make_loader(
        TrainConfig(prompt="chat", dataset="movie_reviews"), load_decoder(llama).config, tokenizer)
    prompt, answer = loader.encode({"text": "fine <|im_end|> indeed", "label": 1})
    assert tokenizer.decode(answer) == "positive<|im_end|>"
    asked = tokenizer.decode(prompt)
    assert asked.startswith("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n")
    assert asked.endswith("Review: fine <|im_end|> indeed<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.count(tokenizer.eot_token) == 2  # the review's own stays plain text


def test_chat_needs_an_instruct_model(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="no chat template; prompt=chat needs an instruct model"):
        train(replace(config, prompt="chat"))
    assert not Path(config.out_dir).exists()


def test_tokenizer_of_another_model_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=600 of the model is below the 50257 tokens"):
        make_loader(TrainConfig(), load_decoder(llama).config, load_tokenizer("gpt2-mini"))
    wide = replace(load_decoder(llama).config, vocab_size=60_000)
    with pytest.raises(ValueError, match=r"ends a text with \(2,\), its tokenizer with 50256"):
        make_loader(TrainConfig(), wide, load_tokenizer("gpt2-mini"))


def test_gguf_file_trains_as_the_folder_does(on_llama: TrainConfig, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = make_llama(max_position_embeddings=512, eos_token_id=2)
    folder, file = tmp_path / "folder", tmp_path / "model.gguf"
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", byte_level())
    write_json(folder / "tokenizer_config.json", CONFIG)
    write_gguf(file, model, pre="smollm")
    found = {}
    for source in (folder, file):
        config = replace(on_llama, init_from=str(source), out_dir=f"{source}-run", max_iters=3)
        found[source] = train(config), trained_weights(config)
        assert read_json(Path(config.out_dir, "config.json"))["base_sha256"]
    close(found[folder][1], found[file][1])
    assert found[folder][0]["last"]["accuracy"] == found[file][0]["last"]["accuracy"]


def test_plan_of_an_instruct_llama_has_a_chat_and_no_fused_projection(llama: Path) -> None:
    config = ExperimentsConfig(init_from=str(llama))
    names = {question: [variant.name for variant in variants]
             for question, variants in plan(config).items()}
    assert "zero_shot_chat" in names["zero_shot"]
    assert "r16_alpha64_shared" not in names["layers"]
    of_gpt2 = plan(replace(config, init_from="gpt2-mini"))
    assert "zero_shot_chat" not in [variant.name for variant in of_gpt2["zero_shot"]]
    assert "r16_alpha64_shared" in [variant.name for variant in of_gpt2["layers"]]


def test_analysis_counts_the_tokens_of_the_named_model(
    llama: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shown = []
    for model in ("gpt2-mini", str(llama)):
        dataset_analysis.main(dataset_analysis.AnalysisConfig(
            dataset=reviews, out_dir=str(tmp_path), init_from=model))
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]


def test_shared_a_of_three_separate_projections_is_refused(on_llama: TrainConfig) -> None:
    with pytest.raises(ValueError, match="lora_qkv=shared is for GPT-2"):
        train(replace(on_llama, lora_qkv="shared"))
