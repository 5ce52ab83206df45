"""The two losses of "Decoupled Contrastive Learning for Long-Tailed Recognition" (AAAI 2024).

dscl_loss and pbsd_loss take L2-normalised rows. They compute in float32, or in float64 if the rows
with gradient are float64, also under autocast. Their time is O(N K D) for N embeddings and a queue
of K. Their memory grows by 16 bytes a key only: bank_attention computes the logits in blocks and
keeps none for backward. This file needs only torch and can be copied alone.
"""

from numbers import Real

import torch


def dscl_loss(
    query, key, labels, queue, queue_labels, *, alpha=0.1, temperature=0.07, anchors=slice(None)
):
    """Decoupled supervised contrastive loss, the paper's DSCL, mean over the anchors.

        L_i = logsumexp_m(z_m.z_i / tau) - a_i z_i+.z_i / tau - (1 - a_i) mean_t(z_t.z_i / tau)

    m runs over the contrast set C_i: the other queries, all keys of the batch and the queue. t runs
    over the positives P_i: the samples of C_i with the anchor's label, without its own key z_i+.
    The weight a_i is `alpha`, or 1 if P_i is empty. alpha=None sets a_i = 1 / (|P_i| + 1): SCL.

    The paper has -1 / (|P_i| + 1) sum_t log [exp(w_t z_t.z_i / tau) / sum_m exp(z_m.z_i / tau)]
    with t over z_i+ and P_i. w_t scales the logit; with the factor 1 / (|P_i| + 1) it becomes a_i
    for z_i+ and (1 - a_i) / |P_i| for the others.

    query [B, D]         embeddings z_i; gradient flows to them as anchors and as contrast samples
    key [B, D]           momentum embeddings z_i+ of the same images; constant
    labels [B]           integer classes of the images
    queue [K, D]         past keys, filled slots only, K may be 0; constant
    queue_labels [K]     classes of the past keys
    alpha                in [0, 1] or None
    temperature          tau > 0
    anchors              slice of the B rows that are anchors i; all rows are contrast samples
    raises               ValueError or TypeError that names the bad argument
    """
    if alpha is not None and not (isinstance(alpha, Real) and 0 <= alpha <= 1):
        raise ValueError(f"alpha must be a number in [0, 1] or None, got {alpha}")
    _check("query", query, (None, None), least=1)
    size, dim = query.shape
    _check("key", key, (size, dim))
    _check("labels", labels, (size,), integer=True)
    _check("queue", queue, (None, dim))
    _check("queue_labels", queue_labels, (len(queue),), integer=True)
    if not (isinstance(anchors, slice) and range(size)[anchors]):
        raise ValueError(f"anchors must be a slice of the {size} rows of query, got {anchors}")
    query, key, queue = _full_precision(query, key.detach(), queue.detach())

    with torch.autocast(query.device.type, enabled=False):
        # C_i is the queue and the batch. The batch is a dense matrix: its queries have gradient.
        anchor = query[anchors]  # [A, D] z_i
        queue_logsumexp, _ = bank_attention(anchor, queue, temperature=temperature)  # [A]
        batch = torch.cat([query, key])  # [2B, D]
        scaled_anchor = anchor / temperature
        logits = scaled_anchor @ batch.T  # [A, 2B]
        own_logit = logits[:, size:][:, anchors].diagonal()  # [A] z_i+.z_i / tau
        is_anchor = torch.zeros_like(logits, dtype=torch.bool)  # [A, 2B]
        is_anchor[:, anchors].fill_diagonal_(True)
        batch_logsumexp = logits.masked_fill(is_anchor, -torch.inf).logsumexp(1)  # [A]
        logsumexp = torch.logaddexp(batch_logsumexp, queue_logsumexp)  # [A] over C_i

        # The sum over P_i uses a mask for the batch and per-class sums for the queue.
        same_class = labels[anchors, None] == labels  # [A, B]
        same_class[:, anchors].fill_diagonal_(False)
        is_positive = same_class.repeat(1, 2)  # [A, 2B] neither the anchor nor its own key
        queue_sum, queue_count = _class_sums(labels[anchors], queue, queue_labels)  # [A, D], [A]
        num_positives = is_positive.sum(1) + queue_count  # [A] |P_i|
        positive_sum = is_positive.to(query.dtype) @ batch + queue_sum  # [A, D] sum of z_t over P_i
        mean_positive_logit = (scaled_anchor * positive_sum).sum(1) / num_positives.clamp(min=1)

        alpha_i = 1 / (num_positives + 1)  # [A] the weight in SCL, and 1 if P_i is empty
        if alpha is not None:  # DSCL
            alpha_i = alpha_i.masked_fill(num_positives > 0, alpha)
        return (logsumexp - alpha_i * own_logit - (1 - alpha_i) * mean_positive_logit).mean()


def pbsd_loss(roi, patch, key, queue, *, temperature=0.07):
    """Patch-based self distillation, the paper's PBSD, mean over patches and images.

        L_i = 1/L sum_j sum_t -p(z_t|c_i[j]) log p(z_t|s_i[j])

    t runs over the image's own key z_i+ and the queue; labels are not used. p(z_t|q) is the softmax
    of z_t.q / tau over t, so log p(z_t|s) = z_t.s / tau - logsumexp(s). The p(z_t|c) sum to 1, so
    sum_t -p(z_t|c) log p(z_t|s) = logsumexp(s) - s.A(c) / tau, where A(c) = sum_t p(z_t|c) z_t.

    roi [L, B, D]        region embeddings c_i[j] of the query view, the teacher; constant
    patch [L, B, D]      embeddings s_i[j] of the same regions as patches, the student; has gradient
    key [B, D]           momentum embeddings z_i+ of the images; constant
    queue, temperature   as in dscl_loss
    raises               ValueError or TypeError that names the bad argument
    """
    _check("patch", patch, (None, None, None), least=1)
    count, size, dim = patch.shape
    _check("roi", roi, (count, size, dim))
    _check("key", key, (size, dim))
    _check("queue", queue, (None, dim))
    patch, roi, key, queue = _full_precision(patch, roi.detach(), key.detach(), queue.detach())

    with torch.autocast(patch.device.type, enabled=False):
        # A(c) is the mean over the queue and z_i+, whose probability p(z_i+|c) is p_own.
        logsumexp, mean = bank_attention(roi.flatten(0, 1), queue, temperature=temperature)
        own_logit = (roi * key).sum(2) / temperature  # [L, B] z_i+.c / tau
        p_own = (own_logit - logsumexp.view_as(own_logit)).sigmoid()[..., None]  # [L, B, 1]
        teacher_mean = p_own * key + (1 - p_own) * mean.view_as(roi)  # [L, B, D] A(c)

        # logsumexp(s) is over the queue and z_i+ as well.
        logsumexp, _ = bank_attention(patch.flatten(0, 1), queue, temperature=temperature)
        own_logit = (patch * key).sum(2) / temperature  # [L, B] z_i+.s / tau
        logsumexp = torch.logaddexp(logsumexp.view_as(own_logit), own_logit)  # [L, B]
        return (logsumexp - (patch * teacher_mean).sum(2) / temperature).mean()


def _class_sums(labels, queue, queue_labels):
    """Sum [B, D] and number [B] of the queue entries of each anchor's class, without a mask."""
    ordered, _ = labels.long().sort()  # equal labels share the row of the first of them
    slot = torch.searchsorted(ordered, queue_labels.long()).clamp(max=len(ordered) - 1)  # [K]
    slot = torch.where(ordered[slot] == queue_labels, slot, len(ordered))  # last row: other classes
    sums = queue.new_zeros(len(ordered) + 1, queue.shape[1]).index_add_(0, slot, queue)
    counts = queue.new_zeros(len(ordered) + 1).index_add_(0, slot, queue.new_ones(len(slot)))
    anchor = torch.searchsorted(ordered, labels.long())  # [B]
    return sums[anchor], counts[anchor]


# Logits in a block of 256 columns or more: 512 KB for a CPU's cache, 128 MB elsewhere.
BLOCK = {"cpu": 2**17}


class _BankAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, bank):
        columns = max(256, BLOCK.get(query.device.type, 2**25) // max(1, len(query)))
        block = query.new_empty(len(query), min(columns, len(bank)))  # used for all chunks
        top = query.new_full((len(query), 1), -torch.inf)  # the largest logit so far
        total = torch.zeros_like(top)  # sum_m exp(logit - top) so far
        weighted_sum = torch.zeros_like(query)  # sum_m exp(logit - top) z_m so far
        for chunk in bank.split(columns) if len(bank) else ():
            logits = torch.mm(query, chunk.T, out=block[:, : len(chunk)])
            last_top, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
            rescale = (last_top - top).exp_()
            weights = logits.sub_(top).exp_()
            total.mul_(rescale).add_(weights.sum(1, keepdim=True))
            weighted_sum.mul_(rescale).addmm_(weights, chunk)
        mean = weighted_sum / total.clamp(min=1)  # total >= 1, or 0 for an empty bank
        ctx.save_for_backward(mean)
        ctx.mark_non_differentiable(mean)
        return (top + total.log()).squeeze(1), mean

    @staticmethod
    def backward(ctx, grad_logsumexp, _):
        if torch.is_grad_enabled():  # `mean` depends on the query, but would be taken as constant
            raise RuntimeError("bank_attention has no second derivative; omit create_graph=True")
        (mean,) = ctx.saved_tensors
        return grad_logsumexp[:, None] * mean, None  # the query was divided by the temperature


def bank_attention(query, bank, *, temperature=0.07):
    """Softmax attention of each query [N, D] over a constant bank [K, D], as an online softmax.

    Rows may have any norm. Returns (logsumexp [N], mean [N, D]) over the bank entries z_m:

        logsumexp = log sum_m exp(q.z_m / temperature)
        mean      = sum_m p(z_m|q) z_m,   p(z_m|q) = softmax over m of q.z_m / temperature

    `logsumexp` is differentiable in the query, once, at no extra cost: its gradient is exactly
    mean / temperature. `mean` and the bank are constants. An empty bank gives -inf and 0. Raises
    ValueError or TypeError that names the bad argument.
    """
    # A tensor would get no gradient; the inverse has to be a float32.
    if not (isinstance(temperature, Real) and 1e-38 < temperature < float("inf")):
        raise ValueError(f"temperature must be a number above 1e-38, got {temperature}")
    _check("query", query, (None, None))
    _check("bank", bank, (None, query.shape[1]))
    query, bank = _full_precision(query, bank)
    with torch.autocast(query.device.type, enabled=False):
        return _BankAttention.apply(query / temperature, bank.detach())


def _full_precision(*tensors):
    """Convert half precision to float32, and all to float64 if the first tensor is float64."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


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
