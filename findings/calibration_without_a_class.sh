#!/usr/bin/env bash
# venn-abers 1.5.4. Given probabilities of 20 classes, predict_proba returns as many columns as there
# are classes among the calibration labels, in their order. If one rare class has no image there, all
# columns after it move one to the left, silently: column 3 is then class 4. argmax, and any sum over
# columns, is off by one from there on. Without the last class nothing moves, without the first all do.
#
# venn-abers 1.5.4
# accuracy of argmax before calibration 0.604, of 20 classes
# calibration images of all classes: 20 columns, accuracy of argmax 0.594
# no calibration image of class 19: 19 columns, accuracy of argmax 0.570
# no calibration image of class 3: 19 columns, accuracy of argmax 0.115, with columns put back 0.578
# no calibration image of class 0: 19 columns, accuracy of argmax 0.022, with columns put back 0.580
#
# It hurts calibration of many-class models on a small val split of a long-tailed set, where the rare
# classes that have no image differ from split to split. numpy.unique(y_cal) names the columns: write
# them into an array of zeros with a column for every class, or see to it that val has every class.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet venn-abers==1.5.4 numpy==2.4.6 scikit-learn==1.9.1
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W error - <<'EOF'
from importlib.metadata import version

import numpy as np
from venn_abers import VennAbersCalibrator

print("venn-abers", version("venn-abers"))
random = np.random.default_rng(0)
probabilities = np.exp(3 * random.normal(size=(4000, 20)))
probabilities /= probabilities.sum(1, keepdims=True)
labels = np.array([random.choice(20, p=p) for p in probabilities])
p_cal, p_test, y_cal, y_test = *np.split(probabilities, 2), *np.split(labels, 2)
before = (p_test.argmax(1) == y_test).mean()
print(f"accuracy of argmax before calibration {before:.3f}, of 20 classes")
for missing in (None, 19, 3, 0):
    rows = y_cal != missing
    found = VennAbersCalibrator().predict_proba(p_cal=p_cal[rows], y_cal=y_cal[rows], p_test=p_test)
    accuracy = (found.argmax(1) == y_test).mean()
    whole = np.zeros_like(p_test)
    whole[:, np.unique(y_cal[rows])] = found
    restored = (whole.argmax(1) == y_test).mean()
    print("calibration images of all classes" if missing is None else
          f"no calibration image of class {missing}", end=": ")
    print(f"{found.shape[1]} columns, accuracy of argmax {accuracy:.3f}"
          + (f", with columns put back {restored:.3f}" if missing in (0, 3) else ""))
    assert found.shape[1] == 20 - (missing is not None) and restored > before - 0.06
    assert accuracy < 0.2 if missing in (0, 3) else accuracy == restored
EOF
