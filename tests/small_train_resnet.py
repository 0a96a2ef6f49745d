"""train_resnet.py with small networks, for tests of all that happens around them."""
import contextlib
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import baselines
import models


def small_models():
    """`models.MODELS` with few and narrow layers."""
    return {name: (lambda num_discrete, builder=builder, **options:
                   builder(num_discrete, **{"widths": (4, 4, 8), **options}))
            for name, builder in models.MODELS.items()}


@contextlib.contextmanager
def little_work(boosting_rounds):
    """Small networks, and few rounds of boosting: from some dozen segments nothing is learned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "BOOSTING_ROUNDS", boosting_rounds)
        for name, builder in small_models().items():
            patch.setitem(models.MODELS, name, builder)
        yield


if __name__ == "__main__":
    models.MODELS.update(small_models())

    import train_resnet
    import training_header as header
    from tk_utils import run_script
    sys.exit(run_script(train_resnet.main, header.CheckpointError, header.DataError,
                        header.TrainingError))
