"""The losses against the published values, the written-out equations and the paper's theory."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from theory import own_key

import losses
from losses import _attend, dscl_loss, pbsd_loss
from models import Queue


def unit(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1).to(
        dtype
    )


def batch(size=6, bank=20, dim=5, patches=3, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (size,), generator=generator)
    labels[0] = 99  # an anchor whose P_i is empty
    return dict(
        query=unit(size, dim, dtype=dtype, seed=1).requires_grad_(),
        key=unit(size, dim, dtype=dtype, seed=2),
        labels=labels,
        queue=unit(bank, dim, dtype=dtype, seed=3),
        queue_labels=torch.randint(classes, (bank,), generator=generator),
        roi=unit(patches, size, dim, dtype=dtype, seed=4),
        patch=unit(patches, size, dim, dtype=dtype, seed=5).requires_grad_(),
    )


def dscl_of(b, **options):
    return dscl_loss(b["query"], b["key"], b["labels"], b["queue"], b["queue_labels"], **options)


def pbsd_of(b, **options):
    return pbsd_loss(b["roi"], b["patch"], b["key"], b["queue"], **options)


def loop_dscl(b, alpha, temperature):
    """The equations of SCL and DSCL, one anchor and one contrast sample at a time."""
    query, key, labels = b["query"], b["key"].detach(), b["labels"].tolist()
    total = 0
    for i, anchor in enumerate(query):
        contrast = [(j, z, y) for j, (z, y) in enumerate(zip(query, labels)) if j != i]
        contrast += [(None, z, y) for j, (z, y) in enumerate(zip(key, labels)) if j != i]
        contrast += [(None, z, y) for z, y in zip(b["queue"], b["queue_labels"].tolist())]
        denominator = (key[i] @ anchor / temperature).exp()
        for _, z, _ in contrast:
            denominator = denominator + (z @ anchor / temperature).exp()
        mates = [z for _, z, y in contrast if y == labels[i]]
        size = len(mates)
        if alpha is None or size == 0:
            own_weight = mate_weight = 1
        else:
            own_weight, mate_weight = alpha * (size + 1), (1 - alpha) * (size + 1) / size
        terms = torch.log((own_weight * (key[i] @ anchor) / temperature).exp() / denominator)
        for z in mates:
            terms = terms + torch.log(
                (mate_weight * (z @ anchor) / temperature).exp() / denominator
            )
        total = total - terms / (size + 1)
    return total / len(query)


def loop_pbsd(b, temperature):
    """The equation of PBSD, one patch and one bank entry at a time."""
    count, size, _ = b["patch"].shape
    total = 0
    for j in range(count):
        for i in range(size):
            bank = [b["key"][i], *b["queue"]]
            teacher = [(z @ b["roi"][j, i] / temperature).exp() for z in bank]
            student = [(z @ b["patch"][j, i] / temperature).exp() for z in bank]
            for c, s in zip(teacher, student):
                total = total - c / sum(teacher) * torch.log(s / sum(student))
    return total / (count * size)


def close(actual, expected, tolerance):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# Results of the published losses in float64: DSCL, PBSD, the norms of the gradients of queries and
# patches, and the inner products of these gradients with keys and regions.
PUBLISHED = [
    (
        dict(seed=1, size=16, dim=8, bank=48, patches=3, classes=4, power=1.0),
        dict(alpha=0.1, temperature=0.07),
        (12.307088786, 11.396656610, 4.346213168, 2.458282728, -1.603261169, -10.282822609),
    ),
    (  # P_i is empty for seven of twelve anchors
        dict(seed=2, size=12, dim=16, bank=30, patches=2, classes=200, power=0.5),
        dict(alpha=1 / 9, temperature=0.1),
        (6.144562675, 6.101869188, 3.279795414, 1.792444325, -4.494672082, -4.146989922),
    ),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("inputs, settings, published", PUBLISHED)
def test_values_and_gradients_match_the_published_losses(
    inputs, settings, published, dtype, tolerance
):
    seed, size, dim, bank, patches, classes, power = inputs.values()
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape):
        drawn = torch.randn(*shape, dim, dtype=torch.float64, generator=generator)
        return F.normalize(drawn, dim=-1).to(dtype)

    shares = (1.0 + torch.arange(classes)) ** -power  # long-tailed labels
    b = dict(query=rows(size), key=rows(size), queue=rows(bank))
    for name, count in dict(labels=size, queue_labels=bank).items():
        b[name] = shares.multinomial(count, replacement=True, generator=generator)
    b |= dict(roi=rows(patches, size), patch=rows(patches, size))
    query, patch = b["query"].requires_grad_(), b["patch"].requires_grad_()
    dscl, pbsd = dscl_of(b, **settings), pbsd_of(b, temperature=settings["temperature"])
    (dscl + pbsd).backward()
    assert dscl.dtype == pbsd.dtype == dtype
    products = (query.grad * b["key"]).sum(), (patch.grad * b["roi"]).sum()
    ours = torch.stack([dscl, pbsd, query.grad.norm(), patch.grad.norm(), *products])
    assert ours.tolist() == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("bank", [0, 1, 20])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0, None])
def test_dscl_matches_its_equation_written_as_loops(alpha, bank):
    b = batch(bank=bank)
    ours = dscl_of(b, alpha=alpha, temperature=0.2)
    loops = loop_dscl(b, alpha, 0.2)
    close(ours, loops, 1e-12)
    close(*(torch.autograd.grad(loss, b["query"])[0] for loss in (ours, loops)), 1e-12)


@pytest.mark.parametrize("bank", [0, 1, 20])
def test_pbsd_matches_its_equation_written_as_loops(bank):
    b = batch(bank=bank)
    ours, loops = pbsd_of(b, temperature=0.2), loop_pbsd(b, 0.2)
    torch.testing.assert_close(ours, loops, rtol=1e-12, atol=1e-12)  # 0 for an empty bank
    of_ours, of_loops = (torch.autograd.grad(loss, b["patch"])[0] for loss in (ours, loops))
    torch.testing.assert_close(of_ours, of_loops, rtol=1e-10, atol=1e-11)


def test_gradients_pass_gradcheck():
    b = batch()
    assert torch.autograd.gradcheck(
        lambda query: dscl_of(b | {"query": query}, temperature=0.5), b["query"]
    )
    assert torch.autograd.gradcheck(
        lambda patch: pbsd_of(b | {"patch": patch}, temperature=0.5), b["patch"]
    )


@pytest.mark.parametrize("loss", [dscl_of, pbsd_of])
def test_second_derivatives_are_refused(loss):
    b = batch()
    rows = b["query" if loss is dscl_of else "patch"]
    (gradient,) = torch.autograd.grad(loss(b), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (gradient.norm() + rows.norm()).backward()  # as in a gradient penalty


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("loss, name", [(dscl_of, "query"), (pbsd_of, "patch")])
def test_torch_func_gives_the_same_gradients(loss, name):
    b = batch()
    (expected,) = torch.autograd.grad(loss(b), b[name])
    rows = b[name].detach()
    gradient = torch.func.grad(lambda part: loss(b | {name: part}))
    assert torch.equal(gradient(rows), expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda p: gradient(p).norm())(rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mean_over_parts_of_the_anchors_is_the_loss_of_all(ranks):
    b = batch()
    per_rank = len(b["labels"]) // ranks
    slices = [slice(r * per_rank, (r + 1) * per_rank) for r in range(ranks)]
    parts = torch.stack([dscl_of(b, anchors=rows) for rows in slices]).mean()
    close(parts, dscl_of(b), 1e-12)
    close(*(torch.autograd.grad(loss, b["query"])[0] for loss in (parts, dscl_of(b))), 1e-12)
    for wrong in (slice(6, 9), range(2), 1):
        with pytest.raises(ValueError, match="^anchors must be a slice of the 6 rows"):
            dscl_of(b, anchors=wrong)


def test_only_query_and_patch_receive_gradient():
    b = batch()
    constants = [b[name].requires_grad_() for name in ("key", "queue", "roi")]
    (dscl_of(b) + pbsd_of(b)).backward()
    assert all(tensor.grad is None for tensor in constants)
    assert b["query"].grad.abs().min() > 0 and b["patch"].grad.abs().min() > 0


def bank_attention(query, bank, temperature):
    """logsumexp [N] and mean [N, D] of the attention over the bank; its first entry goes first."""
    first = bank[:1].repeat(len(query), 1)
    scaled = query / temperature
    top = (scaled * first).sum(1, keepdim=True)
    logsumexp, mean = _attend(scaled, bank[1:], top, torch.ones_like(top), first)
    return logsumexp[:, 0], mean


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_bank_attention_matches_the_dense_softmax_over_many_blocks(temperature):
    query, bank = unit(1100, 16), unit(1300, 16, seed=1)
    logits = query @ bank.T / temperature
    logsumexp, mean = bank_attention(query, bank, temperature)
    close(logsumexp, logits.logsumexp(1), 1e-12)
    close(mean, logits.softmax(1) @ bank, 1e-12)
    single, single_mean = bank_attention(query.float(), bank.float(), temperature)
    close(single.double(), logsumexp, 1e-5)
    close(single_mean.double(), mean, 1e-4)


def test_bank_attention_is_finite_and_exact_for_rows_of_any_norm_in_any_order():
    query = 30 * unit(600, 8)
    rising = torch.linspace(0, 50, 1300, dtype=torch.float64)[:, None] * unit(1300, 8, seed=1)
    for bank in (rising, rising.flip(0)):  # the maximum is in the last or first block
        logits = query @ bank.T / 1e-3  # up to 1.5 million
        logsumexp, mean = bank_attention(query, bank, 1e-3)
        close(logsumexp, logits.logsumexp(1), 1e-12)
        close(mean, logits.softmax(1) @ bank, 1e-8)
        single, single_mean = bank_attention(query.float(), bank.float(), 1e-3)
        close(single.double(), logsumexp, 1e-6)
        assert single_mean.isfinite().all()


def test_smallest_temperature_neither_overflows_nor_underflows():
    away = torch.eye(1, 8)
    for bank in (away, -away):  # logits of 1000 and -1000
        logsumexp, mean = bank_attention(away, bank, 1e-3)
        close(logsumexp, away @ bank[0] / 1e-3, 1e-6)
        close(mean, bank, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_converted_to_float32(dtype):
    b = batch()
    half = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in b.items()}
    lifted = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    for loss in (dscl_of, pbsd_of):
        assert loss(half).dtype == torch.float32
        assert loss(half) == loss(lifted)


def test_autocast_changes_nothing():
    b = batch(dtype=torch.float32, bank=700)
    plain = dscl_of(b), pbsd_of(b)
    with torch.autocast("cpu", torch.bfloat16):
        assert (dscl_of(b), pbsd_of(b)) == plain


@pytest.mark.parametrize("mates", [1, 5, 30])
def test_gradient_of_the_own_key_is_fixed_by_alpha_and_shrinks_in_scl(mates):
    # The contrast set is orthonormal: each entry of the anchor's gradient belongs to one sample. A
    # negative equal to the anchor takes all of the softmax, so only the positives' pull is left.
    basis = torch.eye(mates + 2, dtype=torch.float64)
    anchor = basis[:1].clone().requires_grad_()
    queue_labels = torch.zeros(mates + 1, dtype=torch.long)
    queue_labels[-1] = 1
    queue = torch.cat([basis[2:], basis[:1]])

    def ratio(alpha):
        label = torch.zeros(1, dtype=torch.long)
        loss = dscl_loss(anchor, basis[1:2], label, queue, queue_labels, alpha=alpha)
        pull = torch.autograd.grad(loss, anchor)[0][0]
        return (pull[1] / pull[2:].sum()).item()

    assert ratio(0.1) == pytest.approx(0.1 / 0.9, rel=1e-3)
    assert ratio(0.5) == pytest.approx(1.0, rel=1e-3)
    assert ratio(None) == pytest.approx(1 / mates, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.1, 0.3, None])
def test_free_embeddings_converge_to_the_probability_proven_in_the_paper(alpha):
    # Three anchors with 1, 4 and 12 positives in the queue; the embeddings are optimised directly.
    sizes, labels = (1, 4, 12), torch.arange(3)
    queue_labels = labels.repeat_interleave(torch.tensor(sizes))
    contrast = torch.eye(40, dtype=torch.float64)[: 3 + sum(sizes)]
    free = unit(3, 40).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        query = F.normalize(free, dim=1)
        loss = dscl_loss(query, contrast[:3], labels, contrast[3:], queue_labels, alpha=alpha)
        loss.backward()
        return loss

    optimizer.step(closure)
    query = F.normalize(free.detach(), dim=1)
    logits = query @ torch.cat([query, contrast]).T / 0.07  # the default temperature
    logits[:, :3].fill_diagonal_(-math.inf)
    own = logits.softmax(1)[:, 3:6].diagonal()
    expected = [1 / (size + 1) if alpha is None else alpha for size in sizes]
    assert own.tolist() == pytest.approx(expected, rel=0.02)


def test_theory_uses_the_contrast_set_of_the_loss():
    b = batch()
    rows = [b[name].detach() for name in ("query", "key", "labels", "queue", "queue_labels")]
    z, z_plus, labels, bank, bank_labels = rows
    queue = Queue(len(bank), dim=bank.shape[1]).double()
    queue.put(bank[None], bank_labels)
    p, mates = own_key(z[None], z_plus[None], labels, queue, 0.2)
    close(-p.log().mean(), dscl_loss(*rows, alpha=1, temperature=0.2), 1e-12)
    contrast = torch.cat([labels, labels, bank_labels])
    assert mates.tolist() == [(contrast == label).sum() - 2 for label in labels]
    assert mates[0] == 0 and mates[1:].min() > 0  # P_i of one anchor is empty


@pytest.mark.parametrize(
    "loss, name, change",
    [
        (dscl_of, "query", lambda rows: rows[0]),
        (dscl_of, "query", lambda rows: rows[:0]),
        (dscl_of, "query", lambda rows: rows.long()),
        (dscl_of, "key", lambda rows: rows[:-1]),
        (dscl_of, "labels", lambda rows: rows[:-1]),
        (dscl_of, "labels", lambda rows: rows.float()),
        (dscl_of, "queue", lambda rows: rows[:, :-1]),
        (dscl_of, "queue_labels", lambda rows: rows[:-1]),
        (dscl_of, "queue_labels", lambda rows: rows > 0),
        (pbsd_of, "patch", lambda rows: rows[0]),
        (pbsd_of, "roi", lambda rows: rows[:-1]),
        (pbsd_of, "key", lambda rows: rows[:-1]),
        (pbsd_of, "queue", lambda rows: rows[:, :-1]),
        (dscl_of, "labels", lambda rows: rows.tolist()),
        (pbsd_of, "roi", lambda rows: rows.numpy()),
        (dscl_of, "queue", lambda rows: None),
    ],
)
def test_bad_arguments_are_named(loss, name, change):
    b = batch()
    b[name] = change(b[name].detach())
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        loss(b)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e-40, "0.07", torch.tensor(0.07)])
def test_temperature_must_be_a_positive_number(value):
    b = batch()
    for call in (dscl_of, pbsd_of):
        with pytest.raises((ValueError, TypeError), match="^temperature must"):
            call(b, temperature=value)
    with pytest.raises(ValueError, match=r"Python number .* temperature.item\(\)\), got tensor"):
        dscl_of(b, temperature=torch.tensor(0.07))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "0.1", torch.tensor(0.1)])
def test_alpha_must_be_from_0_to_1(value):
    with pytest.raises(ValueError, match="^alpha must"):
        dscl_of(batch(), alpha=value)


def test_losses_imports_only_torch():
    source = Path(losses.__file__).read_text().splitlines()
    imports = [line for line in source if line.startswith(("import ", "from "))]
    assert {line.split()[1] for line in imports} == {"torch", "numbers"}  # and the standard library
