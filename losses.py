"""The two losses of "Decoupled Contrastive Learning for Long-Tailed Recognition" (AAAI 2024).

dscl_loss       decoupled supervised contrastive loss; alpha=None is the plain SCL it corrects
pbsd_loss       patch-based self distillation
bank_attention  used by both: softmax attention of N embeddings over a bank of K

The losses take L2-normalised rows. Their time is O(N K D) for N embeddings and a queue of K; their
memory does not grow with K, since logits are computed in blocks and none is kept for backward. This
file needs only torch and can be copied alone.
"""

from numbers import Real

import torch


def dscl_loss(query, key, labels, queue, queue_labels, *, alpha=0.1, temperature=0.07):
    """Decoupled supervised contrastive loss, the paper's DSCL, mean over the anchors.

        L_i = logsumexp_m(z_m.z_i / tau) - a z_i+.z_i / tau - (1 - a) mean_{t in P_i} z_t.z_i / tau

    The paper writes -1/(|P_i| + 1) sum_t log [exp(w_t z_t.z_i / tau) / sum_m exp(z_m.z_i / tau)]
    over t in {z_i+} and P_i, with w_t = a (|P_i| + 1) for z_i+ and (1 - a)(|P_i| + 1) / |P_i| for
    P_i. w_t scales the logit; with the factor 1/(|P_i| + 1) it becomes a for z_i+ and
    (1 - a)/|P_i| for the others. The contrast set m is the other queries, all keys and the queue;
    P_i is its subset with the anchor's label, without the anchor's own key z_i+. The weight a is
    `alpha`, or 1 where P_i is empty; alpha=None sets a = 1 / (|P_i| + 1), which is SCL.

    query [B, D]         embeddings z_i; gradient flows to them as anchors and as contrast
    key [B, D]           momentum embeddings z_i+ of the same images; constant
    labels [B]           integer classes of the images
    queue [K, D]         past keys, filled slots only, K may be 0; constant
    queue_labels [K]     classes of the past keys
    alpha                in [0, 1] or None
    temperature          tau > 0

    Computed in float32 (float64 if the query is), also under autocast. ValueError or TypeError
    names a bad argument.
    """
    _check_temperature(temperature)
    if alpha is not None and not (isinstance(alpha, Real) and 0 <= alpha <= 1):
        raise ValueError(f"alpha must be a number in [0, 1] or None, got {alpha}")
    _check("query", query, (None, None), least=1)
    size, dim = query.shape
    _check("key", key, (size, dim))
    _check("labels", labels, (size,), integer=True)
    _check("queue", queue, (None, dim))
    _check("queue_labels", queue_labels, (len(queue),), integer=True)
    query, key, queue = _full_precision(query, key.detach(), queue.detach())

    with torch.autocast(query.device.type, enabled=False):
        scaled = query / temperature
        # The batch as contrast is a dense matrix: it is small, and gradient flows to its queries.
        batch = torch.cat([query, key])  # [2B, D]
        logits = scaled @ batch.T  # [B, 2B]
        own_logit = logits[:, size:].diagonal()  # [B] z_i+.z_i / tau
        itself = torch.eye(size, 2 * size, dtype=torch.bool, device=query.device)
        in_queue, _ = bank_attention(query, queue, temperature=temperature)  # [B] its logsumexp
        contrast = torch.cat([logits.masked_fill(itself, -torch.inf), in_queue[:, None]], dim=1)
        logsumexp = contrast.logsumexp(1)  # [B]

        # The sum over P_i uses a mask for the batch and per-class sums for the queue.
        mates = ((labels[:, None] == labels) & ~itself[:, :size]).to(query.dtype).repeat(1, 2)
        class_sum, class_count = _class_sums(labels, queue, queue_labels)  # [B, D], [B]
        positives = mates.sum(1) + class_count  # [B] |P_i|
        pull = (scaled * (mates @ batch + class_sum)).sum(1)  # [B] sum over P_i of z_t.z_i / tau
        mean_pull = pull / positives.clamp(min=1)

        if alpha is None:
            own_weight = 1 / (positives + 1)
        else:
            own_weight = torch.full_like(positives, alpha).masked_fill(positives == 0, 1)
        return (logsumexp - torch.lerp(mean_pull, own_logit, own_weight)).mean()


def pbsd_loss(roi, patch, key, queue, *, temperature=0.07):
    """Patch-based self distillation, the paper's PBSD, mean over patches and images.

        L_i = 1/L sum_j sum_t -p(z_t|c_i[j]) log p(z_t|s_i[j])

    p(z_t|.) is the softmax over the image's own key and the queue; labels are not used. Let A(q) be
    the mean of these vectors z_t, weighted by p(z_t|q). Then the cross-entropy is
    logsumexp(s) - s.A(c) / tau, and its gradient in s is (A(s) - A(c)) / tau.

    roi [L, B, D]        region embeddings c_i[j] of the query view, the teacher; constant
    patch [L, B, D]      embeddings s_i[j] of the same regions as patches, the student; has gradient
    key [B, D]           momentum embeddings z_i+; constant
    queue [K, D]         past keys, filled slots only, K may be 0; constant
    temperature          tau > 0

    Computed in float32 (float64 if the patch is), also under autocast. ValueError or TypeError
    names a bad argument.
    """
    _check_temperature(temperature)
    _check("patch", patch, (None, None, None), least=1)
    count, size, dim = patch.shape
    _check("roi", roi, (count, size, dim))
    _check("key", key, (size, dim))
    _check("queue", queue, (None, dim))
    patch, roi, key, queue = _full_precision(patch, roi.detach(), key.detach(), queue.detach())

    with torch.autocast(patch.device.type, enabled=False):
        # One pass over the queue for teacher and student.
        both = torch.stack([roi, patch])  # [2, L, B, D]
        logsumexp, mean = bank_attention(both.flatten(0, 2), queue, temperature=temperature)
        logsumexp, mean = logsumexp.view(2, count, size), mean.view(2, count, size, dim)
        own_logit = (both * key).sum(3) / temperature  # [2, L, B] z_i+.c / tau and z_i+.s / tau

        # Add z_i+ to A(c): p(z_i+|c) is the sigmoid of its logit minus the queue's logsumexp.
        p_own = (own_logit - logsumexp).detach().sigmoid()[0, ..., None]  # [L, B, 1]
        teacher_mean = torch.lerp(mean[0], key.expand_as(roi), p_own)  # [L, B, D]
        logsumexp = torch.logaddexp(logsumexp, own_logit)[1]  # [L, B] of the student
        return (logsumexp - (patch * teacher_mean).sum(2) / temperature).mean()


def _class_sums(labels, queue, queue_labels):
    """Sum [B, D] and number [B] of the queue entries of each anchor's class, without a mask."""
    labels, queue_labels = labels.long(), queue_labels.long()
    classes, _ = labels.sort()
    slot = torch.searchsorted(classes, queue_labels).clamp(max=len(classes) - 1)  # [K]
    slot = torch.where(classes[slot] == queue_labels, slot, len(classes))  # last row: other classes
    sums = queue.new_zeros(len(classes) + 1, queue.shape[1]).index_add_(0, slot, queue)
    counts = queue.new_zeros(len(classes) + 1).index_add_(0, slot, queue.new_ones(len(slot)))
    anchor = torch.searchsorted(classes, labels)  # [B]
    return sums[anchor], counts[anchor]


# Elements in a block of logits: as many as fit a CPU's cache; on other devices 2^25, 128 MB.
BLOCK = {"cpu": 2**18}


class _BankAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, bank):
        rows = min(512, max(1, len(query)))
        columns = BLOCK.get(query.device.type, 2**25) // rows
        blocks = []
        for block in query.split(rows):
            logsumexp, mean = block.new_full((len(block), 1), -torch.inf), torch.zeros_like(block)
            for chunk in bank.split(columns) if len(bank) else ():
                weights = block @ chunk.T  # [rows, columns] the logits
                top = weights.amax(1, keepdim=True)
                weights.sub_(top).exp_()
                total = weights.sum(1, keepdim=True)
                chunk_mean, chunk_logsumexp = (weights @ chunk).div_(total), total.log().add_(top)
                mean.lerp_(chunk_mean, (chunk_logsumexp - logsumexp).sigmoid_())
                logsumexp = torch.logaddexp(logsumexp, chunk_logsumexp)
            blocks.append((logsumexp.squeeze(1), mean))
        logsumexp, mean = map(torch.cat, zip(*blocks))
        ctx.save_for_backward(mean)
        ctx.mark_non_differentiable(mean)
        return logsumexp, mean

    @staticmethod
    def backward(ctx, grad_logsumexp, _):
        if torch.is_grad_enabled():  # `mean` depends on the query, but would be taken as constant
            raise RuntimeError("bank_attention has no second derivative; omit create_graph=True")
        (mean,) = ctx.saved_tensors
        return grad_logsumexp[:, None] * mean, None


def bank_attention(query, bank, *, temperature=0.07):
    """Softmax attention of each query over a constant bank, in chunks.

    query [N, D], bank [K, D]: rows of any norm, though both losses pass unit vectors.
    Returns (logsumexp [N], mean [N, D]) over the bank entries z_m:

        logsumexp = log sum_m exp(q.z_m / temperature)
        mean      = sum_m p(z_m|q) z_m,   p(z_m|q) = softmax over m of q.z_m / temperature

    `logsumexp` is differentiable in the query, once, at no extra cost: its gradient is exactly
    mean / temperature. `mean` and the bank are constants. An empty bank gives -inf and 0.
    ValueError or TypeError names a bad argument.
    """
    _check_temperature(temperature)
    _check("query", query, (None, None))
    _check("bank", bank, (None, query.shape[1]))
    query, bank = _full_precision(query, bank)
    with torch.autocast(query.device.type, enabled=False):
        return _BankAttention.apply(query / temperature, bank.detach())


def _full_precision(*tensors):
    """Convert half precision to float32, and all to float64 if the first tensor is float64."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _check_temperature(temperature):
    if not isinstance(temperature, Real):  # a tensor would get no gradient
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not (0 < temperature < float("inf") and 1 / temperature < torch.finfo(torch.float32).max):
        raise ValueError(f"temperature must be positive with a finite inverse, got {temperature}")


def _check(name, tensor, shape, least=0, integer=False):
    """Raise unless it is a tensor of this kind and shape (None: any size from `least` on)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    sizes = [s if e is None and s >= least else e for s, e in zip(tensor.shape, shape)]
    if tensor.ndim != len(shape) or list(tensor.shape) != sizes:
        expected = ", ".join(f"at least {least}" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")
    exact = tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not (exact if integer else tensor.is_floating_point()):
        kind = "an integer" if integer else "a float"
        raise ValueError(f"{name} must be of {kind} type, got {tensor.dtype}")
