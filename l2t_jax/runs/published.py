"""Published test scores in %, to stand beside ours: accuracies, AP50, mIoU. Where a paper prints errors, 100 - error.

Table 1 of L2T-DLN copies its baseline rows from earlier papers, and its own students are about 16 times larger than
theirs; the noisy-label rows are those of L2T-DLN's poster, which takes its baselines from Meta-Weight-Net's flips. So
a published number says what was claimed, not what this student on this budget should reach.
"""

from typing import NamedTuple


class Group(NamedTuple):
    """What a number was measured on."""

    dataset: str
    student: str
    noise: str = ""  # e.g. "flip2 40"
    imbalance: float = 1.0  # of the first class to the last


def _column(dataset: str, student: str, noise: str = "", /, **accuracies: float) -> dict[tuple[Group, str], float]:
    return {(Group(dataset, student, noise), method): value for method, value in accuracies.items()}


def _baselines(cross_entropy: float, smooth: float, large_margin: float, l2t_dlf: float) -> dict[str, float]:
    return {
        "cross_entropy": cross_entropy,
        "smooth_zero_one": smooth,
        "large_margin_softmax": large_margin,
        "l2t_dlf": l2t_dlf,
    }


PUBLISHED: dict[tuple[Group, str], float] = {
    # L2T-DLF (NeurIPS 2018), Table 1: errors.
    **_column("mnist", "mlp", **_baselines(98.06, 98.11, 98.17, 98.31)),
    **_column("mnist", "lenet", **_baselines(99.02, 99.06, 99.12, 99.23)),
    # L2T-DLN (NeurIPS 2023), Table 1.
    **_column("cifar10", "resnet8", **_baselines(87.6, 87.9, 88.7, 89.2), adaptive_robust=89.5, slf=89.8, l2t_dln=90.7),
    **_column(
        "cifar10", "resnet20", **_baselines(91.3, 91.5, 92.0, 92.4), adaptive_robust=91.5, slf=93.0, l2t_dln=93.4
    ),
    **_column(
        "cifar10",
        "resnet32",
        **_baselines(92.5, 92.6, 93.0, 93.1),
        adaptive_robust=92.2,
        slf=93.6,
        ala=93.2,
        l2t_dln=93.8,
    ),
    **_column(
        "cifar10",
        "wide_resnet",
        **_baselines(96.2, 96.2, 96.3, 96.6),
        adaptive_robust=95.9,
        slf=97.1,
        ala=96.7,
        l2t_dln=96.7,
    ),
    **_column(
        "cifar100",
        "resnet8",
        **_baselines(60.2, 60.5, 61.1, 61.7),
        adaptive_robust=60.2,
        slf=62.7,
        ala=62.2,
        l2t_dln=63.5,
    ),
    **_column(
        "cifar100",
        "resnet20",
        **_baselines(67.7, 68.0, 68.4, 69.0),
        adaptive_robust=67.8,
        slf=69.9,
        ala=69.5,
        l2t_dln=70.4,
    ),
    **_column(
        "cifar100",
        "resnet32",
        **_baselines(69.6, 69.9, 70.4, 70.8),
        adaptive_robust=69.8,
        slf=71.5,
        ala=70.9,
        l2t_dln=72.0,
    ),
    # The baseline is RMSProp's; a policy that was trained on CIFAR-10 is ALA's (ICML 2019) own row.
    **_column("imagenet2012", "nasnet_mobile", cross_entropy=73.5, ala=74.6, ala_transfer=74.3, l2t_dln=74.2),
    # Tables 2 and 3: AP50 at 416 pixels, mIoU; the baselines are those of YOLOv3's and PSPNet's own papers.
    **_column("coco/2014", "yolov3", sum_of_terms=55.3, l2t_dln=56.9),
    **_column("voc/2012", "pspnet101", cross_entropy=82.6, l2t_dln=82.9),
    # Meta-Weight-Net (NeurIPS 2019), flips, which the poster of L2T-DLN repeats; its own row and that of Fan
    # et al. 2021 are the poster's.
    **_column(
        "cifar10",
        "resnet32",
        "flip2 20",
        cross_entropy=76.83,
        mentornet=86.36,
        l2rw=87.86,
        meta_weight_net=90.33,
        deep_interactions=91.05,
        l2t_dln=92.11,
    ),
    **_column(
        "cifar10",
        "resnet32",
        "flip2 40",
        cross_entropy=70.77,
        mentornet=81.76,
        l2rw=85.66,
        meta_weight_net=87.54,
        deep_interactions=88.71,
        l2t_dln=89.39,
    ),
    **_column(
        "cifar100",
        "resnet32",
        "flip2 20",
        cross_entropy=50.86,
        mentornet=61.97,
        l2rw=57.47,
        meta_weight_net=64.22,
        deep_interactions=66.08,
        l2t_dln=70.05,
    ),
    **_column(
        "cifar100",
        "resnet32",
        "flip2 40",
        cross_entropy=43.01,
        mentornet=52.66,
        l2rw=50.98,
        meta_weight_net=58.64,
        deep_interactions=60.51,
        l2t_dln=61.27,
    ),
}
