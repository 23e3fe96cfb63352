import pytest
from lightning.pytorch import Callback

from mergekit_lit.callbacks.view import step_ended


@pytest.mark.parametrize(("batches", "accumulate"), [(4, 1), (4, 2), (5, 2), (5, 3), (2, 4)])
def test_a_step_ended_when_lightning_counts_one(tiny, images, fit, batches, accumulate):
    """Also at the end of an epoch whose batches do not fill the last step."""
    seen = []

    class Watch(Callback):
        before = 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((step_ended(trainer, batch_idx), trainer.global_step > self.before))
            self.before = trainer.global_step

    data = images(8 * batches, 8)
    options = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": accumulate}
    fit(tiny(), Watch(), data=data, **options)
    assert len(seen) == 2 * batches
    assert all(told == counted for told, counted in seen)
