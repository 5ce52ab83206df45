"""The two losses of "Decoupled Contrastive Learning for Long-Tailed Recognition" (AAAI 2024).

Read dense_losses in tests/benchmark.py first: it defines both losses in 20 lines of plain matrices,
with the paper's names. dscl_loss and pbsd_loss have the same values without a matrix of N rows and
K keys of the queue. They take L2-normalised rows and compute in float32, or in float64 if the rows
with gradient are float64. Copy this file alone if you like.
"""

from numbers import Real

import torch


def dscl_loss(query, key, labels, queue, queue_labels, *, alpha=0.1, temperature=0.07,
              anchors=slice(None)):
    """Decoupled supervised contrastive loss, the paper's DSCL, mean over the anchors.

        L_i = logsumexp_m(z_m.z_i / tau) - a_i z_i+.z_i / tau - (1 - a_i) mean_t(z_t.z_i / tau)

    m runs over the contrast set C_i: the other queries, all keys of the batch and the queue. t runs
    over the positives P_i: the samples of C_i with the anchor's label, without its own key z_i+.
    The weight a_i is `alpha`, or 1 if P_i is empty. alpha=None sets a_i = 1 / (|P_i| + 1): SCL.

    query [B, D]         embeddings z_i; gradient flows to them as anchors and as contrast samples
    key [B, D]           momentum embeddings z_i+ of the same images; constant
    labels [B]           integer classes of the images
    queue [K, D]         past keys, filled slots only, K may be 0; constant
    queue_labels [K]     classes of the past keys
    alpha, temperature   in [0, 1] or None; tau > 0
    anchors              slice of the B rows that are anchors i; all rows are contrast samples
    raises               ValueError or TypeError that names the bad argument
    """
    if alpha is not None and not (isinstance(alpha, Real) and 0 <= alpha <= 1):
        raise ValueError(f"alpha must be a Python number in [0, 1] or None, got {alpha!r}")
    _check("query", query, (None, None), least=1)
    size, dim = query.shape
    _check("key", key, (size, dim))
    _check("labels", labels, (size,), integer=True)
    _check("queue", queue, (None, dim))
    _check("queue_labels", queue_labels, (len(queue),), integer=True)
    if not (isinstance(anchors, slice) and range(size)[anchors]):
        raise ValueError(f"anchors must be a slice of the {size} rows of query, got {anchors}")
    query, key, queue = _prepare(temperature, query, key, queue)
    contrast_labels = torch.cat([labels, labels, queue_labels])
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        results = _dscl(query, key, queue, contrast_labels, alpha, temperature, anchors)
    return _WithGradient.apply(query, *results)[0]


def _dscl(query, key, queue, contrast_labels, alpha, temperature, anchors):
    """dscl_loss and its gradient in the queries; contrast_labels [2B + K] are of all samples."""
    # The contrast set C_i: the queries without the anchor itself, the keys, and the queue.
    size, dim = query.shape
    anchor, own_key = query[anchors], key[anchors]  # [A, D] z_i and z_i+
    scaled_anchor, batch = anchor / temperature, torch.cat([query, key])  # [A, D], [2B, D]
    logits = scaled_anchor @ batch.T  # [A, 2B]
    logits[:, :size][:, anchors].fill_diagonal_(-torch.inf)
    top = logits.amax(1, keepdim=True)  # [A, 1]
    exp_logits = logits.sub_(top).exp_()  # [A, 2B]
    sums = exp_logits.sum(1, keepdim=True), exp_logits @ batch
    logsumexp, mean = _attend(scaled_anchor, queue, top, *sums)  # [A, 1], [A, D] of all of C_i

    # The sum over P_i is that of the anchor's class, without the anchor and its key.
    row = _rows_of_classes(contrast_labels, contrast_labels[:size][anchors])
    of_query, of_anchor = row[:size], row[:size][anchors]
    class_sums = query.new_zeros(len(anchor) + 1, dim)  # [A + 1, D]
    class_sums.index_add_(0, row[: 2 * size], batch).index_add_(0, row[2 * size :], queue)
    counts = query.new_zeros(len(anchor) + 1).index_add_(0, row, query.new_ones(len(row)))
    num_positives = counts[of_anchor, None] - 2  # [A, 1] |P_i|
    positive_sum = class_sums[of_anchor] - anchor - own_key  # [A, D]

    alpha_i = 1 / (num_positives + 1)  # [A, 1] the weight in SCL, and 1 if P_i is empty
    if alpha is not None:  # DSCL
        alpha_i = alpha_i.masked_fill(num_positives > 0, alpha)
    weight = (1 - alpha_i) / num_positives.clamp(min=1)  # [A, 1] of each sample of P_i
    target = alpha_i * own_key + weight * positive_sum  # [A, D]
    loss = (logsumexp - (scaled_anchor * target).sum(1, keepdim=True)).mean()

    # A times the gradient in z_j as a contrast sample, sum_i p_ij z_i / tau - weight_i z_i / tau,
    # with i over all anchors in the first term and over those of its class in the second.
    p = exp_logits[:, :size] * (top - logsumexp).exp_()  # [A, B] softmax over C_i
    pull = torch.zeros_like(class_sums).index_add_(0, of_anchor, weight * scaled_anchor)
    gradient = torch.addmm(pull[of_query], p.T, scaled_anchor, beta=-1)  # [B, D]
    # In z_i as an anchor: (mean - target) / tau. It is not its own positive: that term comes back.
    gradient[anchors] += weight * scaled_anchor + (mean - target) / temperature
    return loss, gradient / len(anchor)


def _rows_of_classes(labels, anchor_labels):
    """The row of each label's class in a table of A + 1 rows for A anchors, sorted by class.

    A class has the row of its first anchor; all classes without an anchor share the last row.
    """
    classes, _ = anchor_labels.long().sort()
    row = torch.searchsorted(classes, labels.long()).clamp_(max=len(classes) - 1)
    return row.masked_fill_(classes[row] != labels, len(classes))


def pbsd_loss(roi, patch, key, queue, *, temperature=0.07):
    """Patch-based self distillation, the paper's PBSD, mean over patches and images.

        L_i = 1/L sum_j sum_t -p(z_t|c_i[j]) log p(z_t|s_i[j])

    t runs over the image's own key z_i+ and the queue; labels are not used. p(z_t|q) is the softmax
    of z_t.q / tau over t, so log p(z_t|s) = z_t.s / tau - logsumexp(s). The p(z_t|c) sum to 1, so
    sum_t -p(z_t|c) log p(z_t|s) = logsumexp(s) - s.mean(c) / tau; mean(c) = sum_t p(z_t|c) z_t.

    roi [L, B, D]        region embeddings c_i[j] of the query view, the teacher; constant
    patch [L, B, D]      embeddings s_i[j] of the same regions as patches, the student; has gradient
    key [B, D]           momentum embeddings z_i+ of the images; constant
    queue, temperature   as in dscl_loss, also what is raised
    """
    _check("patch", patch, (None, None, None), least=1)
    _check("roi", roi, patch.shape)
    _check("key", key, patch.shape[1:])
    _check("queue", queue, (None, patch.shape[2]))
    patch, roi, key, queue = _prepare(temperature, patch, roi, key, queue)

    with torch.no_grad(), torch.autocast(patch.device.type, enabled=False):
        both = torch.cat([roi, patch]).flatten(0, 1) / temperature  # [2LB, D] teacher, student
        own_key = key.repeat(2 * len(patch), 1)  # [2LB, D]
        own_logit = (both * own_key).sum(1, keepdim=True)
        logsumexp, mean = _attend(both, queue, own_logit, torch.ones_like(own_logit), own_key)
        _, student_logsumexp = logsumexp.chunk(2)  # [LB, 1]
        teacher_mean, student_mean = mean.chunk(2)  # [LB, D] mean(c), mean(s)
        _, student = both.chunk(2)  # [LB, D]
        loss = (student_logsumexp - (student * teacher_mean).sum(1, keepdim=True)).mean()
        gradient = (student_mean - teacher_mean) / (temperature * len(student))
    return _WithGradient.apply(patch, loss, gradient.view_as(patch))[0]


# Logits in a block, which has 256 columns or more: 512 KB for a CPU's cache, 128 MB elsewhere.
BLOCK = {"cpu": 2**17}


def _attend(scaled, bank, top, total, weighted_sum):
    """The logsumexp [N, 1] of the logits of scaled queries, and their softmax-weighted mean [N, D].

    They run over a bank and entries before it. Of these top [N, 1] is the largest logit; total
    [N, 1] and weighted_sum [N, D], changed in place, sum exp(logit - top) and exp(logit - top) z_m.
    """
    columns = max(256, BLOCK.get(scaled.device.type, 2**25) // max(1, len(scaled)))
    block = scaled.new_empty(len(scaled), min(columns, len(bank)))  # used for all chunks
    for chunk in bank.split(columns) if len(bank) else ():
        logits = torch.mm(scaled, chunk.T, out=block[:, : len(chunk)])
        last_top, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        weights = logits.sub_(top).exp_()  # at most 1, whatever the norms
        rescale = (last_top - top).exp_()  # the sums so far were of exp(logit - last_top)
        total.mul_(rescale).add_(weights.sum(1, keepdim=True))
        weighted_sum.mul_(rescale).addmm_(weights, chunk)
    return total.log().add_(top), weighted_sum.div_(total)


class _WithGradient(torch.autograd.Function):
    """(value, gradient): a value and its gradient in `learned`, both computed without autograd."""

    @staticmethod
    def forward(learned, value, gradient):
        return value.clone(), gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_value, grad_gradient):
        if grad_gradient is not None:  # it is an output because otherwise this would be silent
            raise RuntimeError("the losses have no second derivative")
        (gradient,) = ctx.saved_tensors
        return None if grad_value is None else grad_value * gradient, None, None


def _prepare(tau, learned, *constants):
    """Check tau; convert all to float32, or to float64 if `learned` is."""
    # A tensor would silently get no gradient, and 1 / tau must not overflow in float32.
    if not (isinstance(tau, Real) and 1e-38 < tau < float("inf")):
        allowed = "a Python number above 1e-38 (of a tensor: temperature.item())"
        raise ValueError(f"temperature must be {allowed}, got {tau!r}")
    dtype = torch.promote_types(learned.dtype, torch.float32)
    return [tensor.to(dtype) for tensor in (learned, *constants)]


def _check(name, tensor, shape, least=0, integer=False):
    """Raise unless it is a tensor of this kind and shape (None: any size from `least` on)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = [n >= least if want is None else n == want for n, want in zip(tensor.shape, shape)]
    if tensor.ndim != len(shape) or not all(fits):
        expected = ", ".join(f"at least {least}" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")
    is_integer = tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not (is_integer if integer else tensor.is_floating_point()):
        kind = "an integer" if integer else "a float"
        raise ValueError(f"{name} must be of {kind} type, got {tensor.dtype}")
