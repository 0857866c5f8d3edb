"""The anatomy of LoRA's updates equals dense linear algebra, and its page holds what it says."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from made_families import Family, ids
from made_models import TINY, read_lines

from experiments.anatomy import AnatomyConfig, main, named
from experiments.subspaces import amplification, similarity, truncate, updates
from lora import lora_layers
from model import GPT
from train import TrainConfig, train

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def test_updates_are_the_parts_of_the_dense_update(family: Family) -> None:
    model = family.adapted()
    found = {}
    for update in updates(model):
        U, S, Vh = update.svd()
        found.setdefault(update.layer, []).append(U * S @ Vh)
        close(update.scaling * update.B @ update.A, found[update.layer][-1])
        close(S, torch.linalg.svdvals(found[update.layer][-1])[: len(S)])
    layers = lora_layers(model)
    assert found.keys() == layers.keys()
    for name, parts in found.items():
        close(torch.cat(parts), layers[name].delta_weight())
    weights = [update.weight for update in updates(model)]
    assert sum(weight.numel() for weight in weights) == sum(
        layer.weight.numel() for layer in layers.values())


def test_the_two_output_projections_of_gpt2_are_parts_of_their_own() -> None:
    model = GPT(replace(TINY, lora_rank=2, lora_targets=("all",)))
    assert [update.part for update in updates(model)][:6] == [
        "q", "k", "v", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_rank_above_the_width_of_a_part_has_all_its_directions(family: Family) -> None:
    model = family.adapted("qkv", lora_rank=20)
    for update in updates(model):
        U, S, Vh = update.svd()
        close(U * S @ Vh, update.scaling * update.B @ update.A)
    before = model(idx := ids(2, 9))[0]
    truncate(model, 20)
    close(model(idx)[0], before)


def test_similarity_is_the_papers() -> None:
    one, other = torch.randn(4, 30), torch.randn(6, 30)
    found = similarity(one, other)
    spans = [torch.linalg.svd(matrix)[2] for matrix in (one, other)]
    for i in range(4):
        for j in range(6):
            product = spans[0][: i + 1] @ spans[1][: j + 1].T
            close(found[i, j], product.norm() ** 2 / min(i + 1, j + 1))
    close(similarity(one, one).diagonal(), torch.ones(4))
    close(similarity(one, torch.cat((one, other)))[3, 9], torch.tensor(1.0))
    orthogonal = torch.linalg.qr(torch.randn(30, 8))[0].T
    close(similarity(orthogonal[:4], orthogonal[4:]), torch.zeros(4, 4))


def test_similarity_of_random_matrices_is_their_share_of_the_space() -> None:
    found = torch.stack([similarity(torch.randn(8, 200), torch.randn(40, 200))
                         for _ in range(20)]).mean(0)
    assert found[7, 39].item() == pytest.approx(40 / 200, abs=0.02)
    assert found[7, 7].item() == pytest.approx(8 / 200, abs=0.02)


def test_amplification_is_the_papers(family: Family) -> None:
    update = next(updates(family.adapted()))
    found = amplification(update, torch.Generator().manual_seed(0))
    dense = update.scaling * update.B @ update.A
    U, _, Vh = torch.linalg.svd(dense)
    inside = (U[:, :4].T @ update.weight @ Vh[:4].T).norm()
    assert found.update == pytest.approx(dense.norm().item(), rel=1e-4)
    assert found.within_update == pytest.approx(inside.item(), rel=1e-4)
    assert found.factor == pytest.approx((dense.norm() / inside).item(), rel=1e-4)
    assert found.within_itself > max(found.within_update, found.within_random) > 0


def test_truncation_goes_from_the_base_to_the_whole_update(family: Family) -> None:
    model, idx = family.adapted(), ids(2, 9)
    whole, distances = model(idx)[0], []
    for directions in range(5):
        cut = copy.deepcopy(model)
        truncate(cut, directions)
        ranks = {torch.linalg.matrix_rank(u.B @ u.A, rtol=1e-4).item() for u in updates(cut)}
        assert ranks == {directions}
        distances.append(sum((u.scaling * (u.B @ u.A - v.B @ v.A)).norm().item()
                             for u, v in zip(updates(cut), updates(model), strict=True)))
        if directions == 0:
            close(cut(idx)[0], family.load()(idx)[0])
    close(cut(idx)[0], whole)
    assert distances == sorted(distances, reverse=True)


def test_parts_with_one_a_cannot_be_cut(family: Family) -> None:
    if family.name == "gpt2":
        with pytest.raises(ValueError, match="q, k and v have one A and cannot be cut apart"):
            truncate(family.adapted("qkv", lora_qkv="shared"), 1)


@pytest.fixture
def runs(config: TrainConfig, tmp_path: Path) -> list[str]:
    """Three short runs of two ranks and two seeds."""
    made = []
    for name, changes in {"r4": {}, "r8": {"lora_rank": 8}, "seed": {"seed": 2}}.items():
        made.append(str(tmp_path / name))
        train(replace(config, out_dir=made[-1], max_iters=2, eval_interval=2, **changes))
    return made


def test_page_holds_every_section(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(AnatomyConfig(runs=",".join(runs), report_dir=str(tmp_path / "page")))
    assert capsys.readouterr().out.endswith(f"written: {tmp_path}/page/report.md\n")
    text = (tmp_path / "page" / "report.md").read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert [title.split(":")[0] for title in titles] == [
        *["Singular values of ΔW", "Amplification"] * 3, *["Shared subspaces"] * 3,
        "How many directions does it need?"]
    pictures = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert pictures == {*(f"spectra{i}.png" for i in (1, 2, 3)), "directions.png",
                        *(f"similarity{i}.png" for i in (1, 2, 3))}
    scored = read_lines(Path(runs[1], "best", "predictions.jsonl"))
    assert "n = 12 validation examples" in text
    assert len(scored) == 12
    main(AnatomyConfig(runs=runs[0], report_dir=str(tmp_path / "page")))  # its own page, again


@pytest.mark.parametrize(("changes", "said"), [
    ({"runs": ""}, "name 1 to 4 folders"), ({"runs": "nowhere"}, "holds no run"),
])
def test_bad_settings_are_refused(changes: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        main(AnatomyConfig(report_dir=str(tmp_path / "page"), **changes))
    assert not (tmp_path / "page").exists()


def test_other_methods_have_no_anatomy(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, method="bitfit", max_iters=1))
    with pytest.raises(ValueError, match="trained method=bitfit: it has no LoRA"):
        main(AnatomyConfig(runs=config.out_dir, report_dir=str(tmp_path / "page")))


def test_folders_may_be_named_alone(tmp_path: Path) -> None:
    assert named([str(tmp_path), "limit=3"]) == ["limit=3", f"runs={tmp_path}"]
    assert named(["limit=3"]) == ["limit=3"]
