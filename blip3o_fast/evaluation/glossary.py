"""What the report says about its own numbers, in plain words. Strings are HTML fragments."""

from blip3o_fast.evaluation.report import Report, Result

METRICS = (
    (
        "Token cosine",
        "The cosine between each generated patch token and the true token at the same place, "
        "averaged over the patches of an image, then over images. 1 is perfect. Encoders give all "
        "tokens a large common part, so 0.5 can be poor and 0.9 ordinary: read it beside the mean "
        "predictor.",
    ),
    (
        "Image cosine",
        "The tokens of an image are averaged first and the cosine is taken of the two averages. "
        "The published BLIP3-o results call this CLIP similarity. Averaging removes the errors of "
        "single tokens, which makes it a flattering number.",
    ),
    (
        "Centred cosine",
        "The token cosine after the mean token of the training data, at the same position, has "
        "been subtracted from both sides. It sees only what differs from image to image: the mean "
        "predictor scores 0, and a perfect answer 1.",
    ),
    (
        "MSE and R<sup>2</sup>",
        "MSE is the squared error, averaged over channels, tokens and images; lower is better. "
        "R<sup>2</sup> is the share of the variation around the training mean that is explained: 1 "
        "is perfect, 0 is no better than the mean predictor, and below 0 is worse.",
    ),
    (
        "R@k",
        "Among the averaged, centred tokens of all images, is the true image one of the k nearest "
        "to the generated one? And the other way round, is the generated one among the k nearest "
        "to the true one? The table shows the first way at k = 1. A constant answer scores chance.",
    ),
    (
        "CKA",
        "Linear centred kernel alignment: whether images that are alike among the true embeddings "
        "are alike among the generated ones, whatever the rotation or scale. It runs high when "
        "there are few images for many channels; the debiased value in the details does not.",
    ),
    (
        "Intervals",
        "Photos are drawn again with replacement, each with all of its crops, and the number is "
        "computed anew, many times over; the bracket holds the middle part of the values so found. "
        "Ridge and the DiT are compared sample by sample, which is sharper than comparing "
        "brackets.",
    ),
    (
        "The baselines",
        "Both are fitted on the training data only. The mean predictor answers with the mean "
        "training token at each position, whatever the image. Ridge is one linear map from an EVA "
        "token to the CLIP token at the same place; its strength was chosen on training photos set "
        "aside.",
    ),
)


def sampling_paragraphs(report: Report) -> tuple[str, str]:
    """Why few evaluations score higher than many, and what this report's curve shows of it."""
    why = (
        "The sampler starts from noise at t = 0, where the state says nothing about the image. The "
        "best velocity there points from the noise to the mean of all embeddings that fit the "
        "condition, E[x<sub>1</sub> | eva], so a single Euler step lands on that mean, and no "
        "other answer has a smaller squared error. Many small steps follow the flow to one "
        "<em>sample</em> of those embeddings: sharper and more typical of real ones, but its "
        "expected squared error is twice that of the mean, and its cosine lower. Few evaluations "
        "suit search and translation; many suit generation. (Published checkpoints with their "
        "published time grid start elsewhere, so for them a single step is not this mean.)"
    )
    first, last, best = report.dit[0], report.dit[-1], report.best
    if first is last:
        return (
            why,
            f"Only one setting was measured: {_plural(first)}, token cosine {_value(first)}.",
        )
    return why, (
        f"Measured here: token cosine {_value(first)} with {_plural(first)} and {_value(last)} "
        f"with {_plural(last)}; the best was {_value(best)} with {_plural(best)}."
    )


def constant_sentence(report: Report) -> str:
    """How high a predictor that never looks at the image already scores."""
    mean = report.mean.metrics
    return (
        f"Without looking at the image, the mean predictor already reaches "
        f"{mean.image_cosine.value:.3f} in image cosine and {mean.token_cosine.value:.3f} in token "
        "cosine; only what lies above that was learnt about images."
    )


def _value(result: Result) -> str:
    return f"{result.metrics.token_cosine.value:.3f}"


def _plural(result: Result) -> str:
    return f"{result.evaluations} evaluation" + ("" if result.evaluations == 1 else "s")
