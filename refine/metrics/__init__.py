"""Metrics of generated images: detectors → features → statistics → values. One file per metric.

What is in which file:

    sampling.py           images of generators and diffusion models by seed
    image_sets.py         images of folders, zip files and .npz
    detectors.py          images → features: load_detector
      inception.py inception_weights.py     the network of FID, and the forms its weights come in
      digits.py effnet.py exported.py       the shipped detector; ImageNet's; programs of torch.export
    statistics.py         features → streaming mean and covariance
    metric.py             what a metric is: names, needs, rows of tables, how it is computed
    measures/             the metrics, one file each
    registry.py           finds them
    references.py         what is compared with: load_reference
      stored.py           other tools' caches, read without running anything in them
    pipeline.py           batches ahead of the detector, on every process
    evaluate.py           all numbers of one set of images
    named.py              metrics by name, for training runs

Import from these modules; the package itself imports nothing.
"""
