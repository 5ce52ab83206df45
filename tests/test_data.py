"""The shipped data set, long-tailed subsets, samplers, views and patches."""

import gzip
import zipfile

import build_fashion_mnist_lt
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

import data
from data import (
    DATASETS,
    BadInput,
    Batches,
    change_colors,
    color_matrices,
    crop,
    load_dataset,
    long_tailed_counts,
    long_tailed_indices,
    random_blur,
    random_boxes,
    shot_groups,
    training_views,
)

COUNTS = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
RECIPE = DATASETS["fashion_mnist_lt"] | dict(view_size=20, patch_size=8)


@pytest.fixture(scope="module")
def sets():
    return load_dataset("fashion_mnist_lt")


def test_long_tailed_counts_are_the_fields_formula():
    assert long_tailed_counts(1000, 10, 1 / 100) == COUNTS
    cifar100 = long_tailed_counts(500, 100, 1 / 100)
    assert (cifar100[0], cifar100[-1], sum(cifar100)) == (500, 5, 10847)  # CIFAR-100-LT, factor 100
    assert sum(long_tailed_counts(5000, 10, 1 / 100)) == 12406  # CIFAR-10-LT, factor 100


def test_long_tailed_indices_are_disjoint_of_their_class_and_the_same_every_time():
    labels = np.arange(300) % 3
    chosen, unused = long_tailed_indices(labels, [50, 20, 5])
    again, _ = long_tailed_indices(labels, [50, 20, 5])
    for label, (indices, rest) in enumerate(zip(chosen, unused)):
        assert (labels[indices] == label).all() and (indices == again[label]).all()
        assert sorted([*indices, *rest]) == np.flatnonzero(labels == label).tolist()
    assert [len(indices) for indices in chosen] == [50, 20, 5]


def test_shot_groups_end_at_100_and_20():
    groups = shot_groups([1000, 101, 100, 20, 19, 0])
    assert {name: mask.nonzero()[:, 0].tolist() for name, mask in groups.items()} == {
        "many": [0, 1],
        "medium": [2, 3],
        "few": [4, 5],
    }


def test_the_shipped_data_set_is_the_one_described(sets):
    assert sets["train"].labels.bincount().tolist() == COUNTS
    assert sets["val"].labels.bincount().tolist() == [100] * 10
    assert sets["test"].labels.bincount().tolist() == [1000] * 10
    assert {name: mask.sum().item() for name, mask in shot_groups(COUNTS).items()} == {
        "many": 5,
        "medium": 3,
        "few": 2,
    }
    for pictures in sets.values():
        assert pictures.images.shape == (len(pictures), 1, 28, 28)
        assert pictures.images.dtype == torch.uint8
    # Every class has pictures of its own: the class means differ by far more than noise.
    means = torch.stack(
        [sets["test"].images[sets["test"].labels == c].float().mean(0) for c in range(10)]
    )
    for name in ("train", "val"):
        for label in range(10):
            mine = sets[name].images[sets[name].labels == label].float().mean(0)
            assert (means - mine).flatten(1).norm(dim=1).argmin() == label


def test_no_picture_stands_in_two_splits(sets):
    def bytes_of(pictures):
        return {image.numpy().tobytes() for image in pictures.images}

    assert not bytes_of(sets["train"]) & bytes_of(sets["val"])
    assert len(bytes_of(sets["train"])) == len(sets["train"])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(BadInput, match="fashion_mnist_lt.npz not found"):
        load_dataset("fashion_mnist_lt", tmp_path)
    whole = (data.HERE / "tests" / "fashion_mnist_lt.npz").read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2]):
        (tmp_path / "fashion_mnist_lt.npz").write_bytes(content)
        with pytest.raises(BadInput, match="fashion_mnist_lt.npz cannot be read"):
            load_dataset("fashion_mnist_lt", tmp_path)


def test_the_build_script_gives_the_same_bytes_every_time(tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("train", 12000), ("t10k", 100)):
        arrays = {
            f"{name}-images-idx3-ubyte.gz": random.integers(256, size=(size, 28, 28)),
            f"{name}-labels-idx1-ubyte.gz": np.arange(size) % 10,
        }
        for file, array in arrays.items():
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = header + array.astype(np.uint8).tobytes()
            (tmp_path / file).write_bytes(gzip.compress(content, compresslevel=1))
    for target in ("a.npz", "b.npz"):
        build_fashion_mnist_lt.main(tmp_path, tmp_path / target)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # no clock in the file
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.bincount(arrays["train_labels"]).tolist() == COUNTS
        assert np.bincount(arrays["val_labels"]).tolist() == [100] * 10
        assert len(arrays["test_images"]) == 100


# ------------------------------------------------------------------------------------- samplers


def test_an_epoch_shows_every_picture_at_most_once_and_epochs_differ():
    labels = torch.zeros(50, dtype=torch.long)
    batches = [indices for indices, _ in Batches(labels, 8, 3, seed=0)]
    assert len(batches) == 18 and all(len(batch) == 8 for batch in batches)
    epochs = [sum(batches[i : i + 6], []) for i in (0, 6, 12)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_resume_anywhere_and_ranks_share_them_out(balanced):
    labels = torch.arange(60) % 4
    options = dict(seed=3, balanced=balanced)
    whole = list(Batches(labels, 10, 4, **options))
    assert list(Batches(labels, 10, 4, start=7, **options)) == whole[7:]
    ranks = [list(Batches(labels, 10, 4, rank=r, world=2, **options)) for r in range(2)]
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*ranks)]  # the crops' seeds as well
    assert joined == whole
    assert len({seed for _, seeds in whole for seed in seeds}) == 240
    assert list(Batches(labels, 10, 4, seed=4, balanced=balanced)) != whole


def test_class_balanced_sampling_draws_classes_and_their_pictures_uniformly():
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)  # no picture of class 2
    batches = Batches(labels, 500, 20, seed=0, balanced=True)
    drawn = torch.tensor([index for indices, _ in batches for index in indices])
    shares = labels[drawn].bincount() / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([1, 1, 0, 1]) / 3, atol=0.01, rtol=0)
    tail = drawn[labels[drawn] == 3].bincount(minlength=1000)[990:]
    assert tail.min() > 0.85 * tail.max()


@pytest.mark.parametrize("batch_size, world", [(61, 1), (9, 2)])
def test_a_batch_that_cannot_be_made_is_refused(batch_size, world):
    with pytest.raises(BadInput, match="--batch-size"):
        Batches(torch.zeros(60, dtype=torch.long), batch_size, 1, seed=0, world=world)


# ----------------------------------------------------------------------------- views and patches


def test_random_boxes_follow_random_resized_crop():
    torch.manual_seed(0)
    boxes = random_boxes(20000, 224, (0.08, 1.0), "cpu")
    sides = boxes[:, 2:] - boxes[:, :2]
    area, ratio = sides.prod(1) / 224**2, sides[:, 0] / sides[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 224.001
    assert 0.0799 < area.min() < 0.09 and 0.95 < area.max() <= 1
    assert 0.7499 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.3334
    assert ratio.log().mean().abs() < 0.01
    # Against torchvision's own draws of the same crop.
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(1, 224, 224)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(20000)]
    ).float()
    for ours, other in (
        (boxes[:, 0], theirs[:, 1]),
        (boxes[:, 1], theirs[:, 0]),
        (sides[:, 0], theirs[:, 3]),
        (sides[:, 1], theirs[:, 2]),
    ):
        assert (ours.mean() - other.mean()).abs() < 2 and (ours.std() - other.std()).abs() < 2


def test_crop_is_a_resize_of_the_box_with_half_pixel_centres():
    # On a ramp a crop must give the coordinates of its own pixels' centres.
    ramp = torch.arange(28.0).add(0.5).expand(1, 1, 28, 28).repeat(2, 1, 1, 1)
    boxes = torch.tensor(
        [
            [4.0, 3.0, 20.0, 27.0],
            [1.0, 0.5, 27.0, 27.0],
            [5.0, 5.0, 13.0, 13.0],
            [2.5, 1.0, 26.5, 9],
        ]
    )
    out = crop(ramp, boxes, 8)
    assert out.shape == (4, 1, 8, 8)
    for box, row in zip(boxes, out[:, 0, 3]):
        x1, x2 = box[0], box[2]
        torch.testing.assert_close(
            row, x1 + (torch.arange(8) + 0.5) * (x2 - x1) / 8, atol=1e-3, rtol=0
        )


def test_crop_takes_picture_i_for_box_i():
    pictures = torch.arange(3.0)[:, None, None, None].expand(3, 1, 28, 28)
    boxes = random_boxes(6, 28, (0.1, 0.5), "cpu")
    assert crop(pictures, boxes, 4).mean((1, 2, 3)).tolist() == pytest.approx([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "position, adjust",
    [
        (0, TF.adjust_brightness),
        (1, TF.adjust_contrast),
        (2, TF.adjust_saturation),
    ],
)
def test_each_colour_change_is_torchvisions(position, adjust):
    torch.manual_seed(0)
    images = 0.3 + 0.3 * torch.rand(6, 3, 16, 16)  # away from the clamps
    jitter = [0.0] * 4
    jitter[position] = 0.3
    matrices = color_matrices(images.mean((2, 3)), jitter)
    changed = change_colors(images, matrices)
    for image, matrix, ours in zip(images, matrices, changed):
        factor = (matrix[0, 0] - matrix[1, 0]).item()  # of each of the three changes
        assert 0.7 <= factor <= 1.3
        torch.testing.assert_close(ours, adjust(image, factor), atol=2e-3, rtol=0)


def test_hue_keeps_luma_and_grey_and_turns_red_to_yellow():
    torch.manual_seed(0)
    grey, red = torch.full((50, 3, 1, 1), 0.5), torch.zeros(50, 3, 1, 1)
    red[:, 0] = 0.5
    for images in (grey, red):
        matrices = color_matrices(images.mean((2, 3)), (0, 0, 0, 0.1))
        changed = matrices[:, :, :3] @ images[..., 0]
        luma = torch.tensor(data.LUMA) @ changed
        torch.testing.assert_close(
            luma, torch.tensor(data.LUMA) @ images[..., 0], atol=2e-3, rtol=0
        )
    torch.testing.assert_close(
        change_colors(grey, color_matrices(grey.mean((2, 3)), (0, 0, 0, 0.1))),
        grey,
        atol=5e-3,
        rtol=0,
    )
    # As torchvision's hue in direction: some draws turn red towards yellow, others towards magenta.
    changed = change_colors(red, color_matrices(red.mean((2, 3)), (0, 0, 0, 0.1)))
    assert (changed[:, 1] > 0.05).any() and (changed[:, 2] > 0.05).any()


def test_grey_makes_the_three_channels_the_luma():
    images = torch.rand(5, 3, 4, 4)
    changed = change_colors(images, color_matrices(images.mean((2, 3)), (0, 0, 0, 0), grey_p=1.0))
    for image, ours in zip(images, changed):
        torch.testing.assert_close(ours, TF.rgb_to_grayscale(image, 3), atol=1e-3, rtol=0)


def test_probabilities_of_colour_changes():
    torch.manual_seed(0)
    means = torch.rand(4000, 3)
    unchanged = color_matrices(means, (0.4, 0.4, 0.4, 0.1), jitter_p=0.8) == torch.eye(3, 4)
    assert unchanged.flatten(1).all(1).float().mean().item() == pytest.approx(0.2, abs=0.02)
    grey = color_matrices(means, (0, 0, 0, 0), grey_p=0.2)
    assert (grey[:, 0] == grey[:, 1]).all(1).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_blur_is_torchvisions_gaussian_and_leaves_the_rest():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32)
    blurred = random_blur(images, 1.0, sigma=(1.5, 1.5))
    expected = TF.gaussian_blur(images, [9, 9], [1.5, 1.5])
    torch.testing.assert_close(blurred, expected, atol=0.01, rtol=0)
    some = random_blur(images, 0.5)
    same = (some - images).abs().flatten(1).max(1).values < 1e-6
    assert 8 < same.sum() < 32
    assert random_blur(images, 0.0) is images


def test_patches_are_the_boxes_of_the_query_view_before_its_colours(sets):
    torch.manual_seed(0)
    recipe = RECIPE | dict(query_jitter=(0, 0, 0, 0), key_jitter=(0, 0, 0, 0), grey_p=0.0)
    images = sets["train"].images[::100].expand(2, -1, -1, -1, -1)
    query, key, boxes, patches = training_views(images, recipe, 5)
    view, size = recipe["view_size"], recipe["patch_size"]
    assert query.shape == key.shape == (images.shape[1], 3, view, view)
    assert boxes.shape == (5, images.shape[1], 4)
    assert patches.shape == (5, images.shape[1], 3, size, size)
    expected = crop(query, boxes.flatten(0, 1), size).view_as(patches)
    straight = (patches - expected).abs().flatten(2).max(2).values < 1e-4
    flipped = (patches.flip(4) - expected).abs().flatten(2).max(2).values < 1e-4
    assert (straight | flipped).all() and straight.any() and flipped.any()
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) / view**2
    assert 0.0499 <= area.min() and area.max() <= 0.6001
    assert not torch.equal(query, key)


def test_views_are_standardised_and_repeat_with_the_seed(sets):
    images = sets["train"].images[:200].expand(2, -1, -1, -1, -1)
    torch.manual_seed(5)
    first = training_views(images, RECIPE, 2)
    torch.manual_seed(5)
    for a, b in zip(first, training_views(images, RECIPE, 2)):
        assert torch.equal(a, b)
    whole = data.evaluation_view(sets["train"].images[None], RECIPE)
    assert whole.mean().abs() < 0.1 and (whole.std() - 1).abs() < 0.1
    assert training_views(images, RECIPE, 0)[3] is None
