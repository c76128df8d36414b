"""The metrics, one file each: `refine.metrics.registry` finds them, everything else loops over what it found.

A file here holds the mathematics as plain functions of tensors, and a `METRIC` (`refine.metrics.metric.Metric`) that
says what the metric is called, what it needs, how it is computed and how tables and reports show it.
"""
