"""Metrics of generated images: detectors → features → statistics → values. One file per metric.

What is in which file:

    sampling.py           images of generators and diffusion models by seed
    detectors.py          images → features: load_detector
    digits.py             the shipped detector
    statistics.py         features → streaming mean and covariance
    frechet.py kernel.py precision_recall.py      one metric each
    references.py         what is compared with: load_reference
    evaluate.py           all numbers of one set of images
    paired.py             is one network better than another: differences over seed ranges
    named.py              metrics by name, for training runs

Import from these modules; the package itself imports nothing.
"""
