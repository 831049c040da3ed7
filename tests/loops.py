"""The definitions in plain Python floats, loop by loop: an oracle that shares no line with the package.

Rows are lists of floats. There may be more candidates than anchors: the positive of anchor i is candidate i + offset.
"""

import math


def unit(vector, eps):
    norm = math.sqrt(sum(x * x for x in vector))
    return [0.0] * len(vector) if norm <= eps else [x / norm for x in vector]


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def mean(values):
    return sum(values) / len(values) if values else 0.0


def instance(anchors, candidates, temperature, anchor_labels, candidate_labels, offset, mask, ignored):
    losses = []
    for i, anchor in enumerate(anchors):
        kept = []
        for j, candidate in enumerate(candidates):
            if mask and j != i + offset:
                same = anchor_labels[i] == candidate_labels[j] and anchor_labels[i] != ignored
                if same:
                    continue
            kept.append(cosine(anchor, candidate) / temperature)
        losses.append(log_sum_exp(kept) - cosine(anchor, candidates[i + offset]) / temperature)
    return mean(losses)


def sample(anchors, candidates, temperature, anchor_labels, candidate_labels, ignored):
    losses = []
    for anchor, label in zip(anchors, anchor_labels, strict=True):
        if label == ignored:
            continue
        everything = [cosine(anchor, candidate) / temperature for candidate in candidates]
        positives = [value for value, other in zip(everything, candidate_labels, strict=True) if other == label]
        losses.append(log_sum_exp(everything) - mean(positives))
    return mean(losses)


def category(student, teacher, temperature, labels, present_only, ignored):
    losses = []
    for k, column in enumerate(student):
        if present_only and not any(label == k and label != ignored for label in labels):
            continue
        everything = [cosine(column, other) / temperature for other in teacher]
        losses.append(log_sum_exp(everything) - everything[k])
    return mean(losses)


def terms(
    student,
    teacher,
    labels=None,
    *,
    teacher_labels=None,
    offset=0,
    temperature=(0.1, 0.1, 0.1),
    direction="student",
    mask_same_class=False,
    present_only=False,
    ignore_index=-100,
    eps=1e-12,
    active=(True, True, True),
):
    """(instance, sample, category) of lists of rows; 0.0 for a term that is not active."""
    s, t = ([unit(row, eps) for row in rows] for rows in (student, teacher))
    theirs = labels if teacher_labels is None else teacher_labels
    sides = {"student": [(s, t, labels, theirs, offset)], "teacher": [(t, s, theirs, labels, -offset)]}
    sides["symmetric"] = sides["student"] + sides["teacher"]
    found = [0.0, 0.0, 0.0]
    if active[0]:
        found[0] = mean(
            [
                instance(a, k, temperature[0], la, lk, o, mask_same_class, ignore_index)
                for a, k, la, lk, o in sides[direction]
            ]
        )
    if active[1]:
        found[1] = mean([sample(a, k, temperature[1], la, lk, ignore_index) for a, k, la, lk, _ in sides[direction]])
    if active[2]:
        cs, ct = ([unit(column, eps) for column in columns(rows)] for rows in (student, teacher))
        found[2] = category(cs, ct, temperature[2], labels, present_only, ignore_index)
    return tuple(found)


def loss(student, teacher, labels=None, *, weight=(1.0, 1.0, 1.0), **options):
    active = tuple(w != 0 for w in weight)
    return sum(w * x for w, x in zip(weight, terms(student, teacher, labels, active=active, **options), strict=True))


def slopes(function, rows, step=1e-6):
    """Gradient of ``function(rows)`` by every entry of a list of rows, by central differences (error about 1e-9)."""
    found = []
    for i, row in enumerate(rows):
        line = []
        for j, x in enumerate(row):
            values = []
            for moved in (x + step, x - step):
                changed = [list(r) for r in rows]
                changed[i][j] = moved
                values.append(function(changed))
            line.append((values[0] - values[1]) / (2 * step))
        found.append(line)
    return found


def shared(a, b, ignored):
    """How far two labels agree: classes as numbers, or lists of class weights."""
    if isinstance(a, int) and isinstance(b, int):
        return float(a == b and a != ignored)
    classes = len(a) if isinstance(a, list) else len(b)
    a, b = (x if isinstance(x, list) else [float(x == c and x != ignored) for c in range(classes)] for x in (a, b))
    return sum(x * y for x, y in zip(a, b, strict=True))


def largest(label):
    """The class of a label; None for a row of zeros."""
    if isinstance(label, int):
        return label
    return label.index(max(label)) if any(label) else None


def info_nce(
    anchors,
    candidates,
    anchor_labels=None,
    candidate_labels=None,
    *,
    temperature=0.1,
    positives="diagonal",
    offset=0,
    mask_same_class=False,
    normalize=True,
    ignore_index=-100,
    eps=1e-12,
):
    """The loss of each anchor; None for one without a positive."""
    if normalize:
        anchors, candidates = ([unit(row, eps) for row in rows] for rows in (anchors, candidates))
    losses = []
    for i, anchor in enumerate(anchors):
        a = [cosine(anchor, candidate) / temperature for candidate in candidates]
        if positives == "label":
            weights = [shared(anchor_labels[i], label, ignore_index) for label in candidate_labels]
            total = sum(weights)
            if total == 0:
                losses.append(None)
                continue
            losses.append(log_sum_exp(a) - sum(w * x for w, x in zip(weights, a, strict=True)) / total)
            continue
        own = largest(anchor_labels[i]) if mask_same_class else None
        kept = [
            x
            for j, x in enumerate(a)
            if j == i + offset or own in (None, ignore_index) or largest(candidate_labels[j]) != own
        ]
        losses.append(log_sum_exp(kept) - a[i + offset])
    return losses


def reduce(losses, reduction):
    counted = [loss for loss in losses if loss is not None]
    return {"mean": mean(counted), "sum": sum(counted)}[reduction]


def sample_with_queue(student, rows, labels, row_labels, temperature, ignored, eps=1e-12):
    """The sample-wise term of student anchors against teacher rows, the batch's and further ones."""
    losses = info_nce(
        student, rows, labels, row_labels, temperature=temperature, positives="label", ignore_index=ignored, eps=eps
    )
    return reduce(losses, "mean")
