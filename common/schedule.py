"""The rollout schedule: which weights draw which batch.

Steps, batches and updates count from 1. Batch k is trained on in step k, and update k is the one made from it. "Version
j" are the weights as they stood after update j; version 0 are the initial weights. With I = `sync_interval` and
O = `sync_offset`, batch k is drawn with

    version(k) = I · floor(max(0, k − 1 − O) / I)          lag(k) = (k − 1) − version(k)

The lag says how many updates old the policy is that drew the batch: 0 is on-policy. (I, O) = (1, 0) is ordinary
synchronous training, (20, 0) hands weights to the sampler every 20 steps, and (1, 1) is one-step off-policy, where
batch k + 1 can be drawn while batch k is trained on (Pan et al., Trinity-RFT, arXiv 2505.17826).
"""


def version_of_batch(k, sync_interval, sync_offset):
    """Version of the weights that batch `k` (≥ 1) is drawn with; depends on k alone, never on timing."""
    return sync_interval * (max(0, k - 1 - sync_offset) // sync_interval)


def batches_of_version(version, sync_interval, sync_offset):
    """Numbers of the batches drawn with weights `version`, a multiple of `sync_interval`; a range.

    version(k) = j  ⇔  j + O + 1 ≤ k ≤ j + O + I, and from k = 1 for j = 0.
    """
    first = version + sync_offset + 1 if version else 1
    return range(first, version + sync_offset + sync_interval + 1)


def is_due(update, sync_interval):
    """Whether the sampler gets the weights after this update: exactly the multiples of I occur as versions."""
    return update % sync_interval == 0
