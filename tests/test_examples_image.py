"""The image example at reduced size: shifted digits, and images from directories in the hub's layout."""

import example_data
import numpy as np
import pytest
import torch
from datasets import load_dataset

image = example_data.load("image_classification")
from common import digits, figures  # noqa: E402
from common.methods import METHODS  # noqa: E402


def where(tmp_path):
    return ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results.csv")]


def test_the_offline_default_trains_scores_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(
        digits, "SIZE", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    )
    sizes = ["--samples", "120", "--epochs", "1", "--batch-size", "32"]
    table = image.main(["--method", "tucka", "lora", *sizes, *where(tmp_path)])
    assert set(table["method"]) == {"tucka", "lora"} and (table["train_rows"] == 4 * 72).all()
    assert (tmp_path / "out" / "digits.png").exists()
    (pretrained,) = (path for path in (tmp_path / "out").iterdir() if path.name.startswith("digits-vit"))
    before = (pretrained / "model.safetensors").stat().st_mtime_ns
    image.main(["--method", "frozen", *sizes, *where(tmp_path)])
    assert (pretrained / "model.safetensors").stat().st_mtime_ns == before, "the base model is made once"


def test_digits_of_splits_differ_and_seeds_permute_labels_alone():
    mixture, other = digits.load(0, 200), digits.load(1, 200)
    for one, two in zip(mixture, other):
        assert torch.equal(one.columns["pixel_values"], two.columns["pixel_values"])
        assert not torch.equal(one.columns["labels"], two.columns["labels"])
    upright, labels = digits._upright(200)
    sets = [{row.numpy().tobytes() for row in part.columns["pixel_values"]} for part in mixture]
    assert not (sets[0] & sets[2] or sets[1] & sets[2] or sets[0] & sets[1])
    assert [len(part) for part in mixture] == [4 * 120, 4 * 30, 4 * 50]
    # A domain permutes: images of one digit share a label in it, and every label occurs.
    part = mixture.test
    number = {picture.numpy().tobytes(): int(label) for picture, label in zip(1 - upright, labels)}
    names = [number.get(picture.numpy().tobytes()) for picture in part.columns["pixel_values"]]
    pairs = {(name, int(new)) for name, new in zip(names, part.columns["labels"]) if name is not None}
    assert names.count(None) == 150 and len(pairs) == len({new for _, new in pairs}) == 10
    assert None in names[:10] and set(names[:20]) - {None}, "domains are mixed"


@pytest.fixture
def cifar(tmp_path):
    """Options of a local CIFAR-100 of three classes, on a tiny ViT."""
    splits = (("train", 14), ("test", 5))
    data = example_data.save_images(tmp_path / "cifar", "img", "fine_label", splits)
    model = example_data.save_image_model(tmp_path / "vit")
    return ["--dataset", "cifar100", "--dataset-path", str(data), "--model", model, *where(tmp_path)]


def parse(options):
    return image.read(image.parser_of("", image.EXAMPLE, ["offline", *image.SOURCES]), options)


def test_ten_images_of_each_class_are_trained_on(cifar):
    task = image.online(parse(cifar), 0)
    for part, count in ((task.train, 10), (task.validation, 2), (task.test, 5)):
        assert np.bincount([row["labels"] for row in part]).tolist() == [count] * 3
    assert task.train[0]["pixel_values"].shape == (3, 8, 8)
    assert task.targets == ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]
    assert task.base().classifier.out_features == 3


def test_images_are_flipped_in_training_alone(cifar):
    task = image.online(parse(cifar), 0)
    torch.manual_seed(0)
    seen = {task.train[0]["pixel_values"].numpy().tobytes() for _ in range(12)}
    assert len(seen) == 2
    assert len({task.test[0]["pixel_values"].numpy().tobytes() for _ in range(12)}) == 1


def test_all_other_images_of_a_dataset_without_splits_are_scored(tmp_path):
    data = example_data.save_images(tmp_path, splits=(("train", 9), ("validation", 3), ("test", 6)), first=1)
    parts = load_dataset(str(data))
    trained, validation, test = image.few_shot(parts, image.SOURCES["caltech256"])
    assert [len(part) for part in (trained, validation, test)] == [30, 6, 18]
    pictures = [{picture.tobytes() for picture in part["image"]} for part in (trained, validation, test)]
    assert sum(map(len, pictures)) == len(set.union(*pictures)) == 54
    again = image.few_shot(parts, image.SOURCES["caltech256"])[0]
    assert [row["image"].tobytes() for row in again] == [row["image"].tobytes() for row in trained]
    few = load_dataset(str(example_data.save_images(tmp_path / "few", splits=(("train", 11),))))
    with pytest.raises(ValueError, match=r"10 \+ 2 images of each class are drawn, but class 0 has 11"):
        image.few_shot(few, image.SOURCES["caltech256"])


def test_the_hubs_path_trains_with_the_papers_preset(cifar, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda table, out: out)
    options = ["--method", "tucka-paper", "lora", "--preset", "paper", "--epochs", "1", *cifar]
    lora, paper = image.main(options).sort_values("method").itertuples()
    assert (paper.method, paper.learning_rate, paper.train_rows) == ("tucka-paper", 4e-3, 30)
    assert '"k": 5' in paper.settings and '"lora_alpha": 16' in lora.settings and '"r": 2' in lora.settings
    assert lora.learning_rate == METHODS["lora"].learning_rate


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no directory; it stands for the repository ethz/food101"):
        image.main(["--dataset", "food101", "--dataset-path", str(tmp_path / "nowhere"), *where(tmp_path)])
