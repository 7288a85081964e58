"""A step that is not finite is never taken, and the message says whose it was; loss scaling as Lightning resumes it."""

import pytest
import torch

from hiperlab.errors import StoppedError
from hiperlab.report.precision import ScaledPrecision
from tests.report.toy import Toy, build


def test_nan_loss_stops_before_the_step(tmp_path):
    toy = Toy(bad_step=12)
    trainer, checkpoints, _ = build(tmp_path, 20)
    with pytest.raises(StoppedError) as stopped:
        trainer.fit(toy)
    assert stopped.value.code == 1
    message = str(stopped.value)
    assert "\n" not in message
    assert "step 13: loss is nan (cats views 0, 1 samples 24, 25 timesteps 240, 250)" in message
    assert "step-000010.ckpt" in message
    assert trainer.global_step == 12 and toy.weight.isfinite().all()
    assert checkpoints.good == [10]


def test_only_the_bad_micro_batch_is_named(tmp_path):
    toy = Toy(bad_step=2)
    trainer, _, _ = build(tmp_path, 5, accumulate_grad_batches=2)
    with pytest.raises(StoppedError, match=r"loss is nan, nan \(cats views 2, 0 samples 8, 9 .*samples 10, 11"):
        trainer.fit(toy)


def test_infinite_gradient_names_the_parameter(tmp_path):
    toy = Toy(bad_gradient=3)
    trainer, _, _ = build(tmp_path, 5)
    with pytest.raises(StoppedError, match=r"step 4: the gradient of weight is not finite .*no earlier checkpoint"):
        trainer.fit(toy)
    assert toy.weight.isfinite().all()


def scaled(folder, steps, toy, resume=None, **options):
    precision = ScaledPrecision("cpu")
    trainer, checkpoints, _ = build(folder, steps, every=5, plugins=[precision], **options)
    trainer.fit(toy, ckpt_path=resume, weights_only=True)
    return precision.scaler, checkpoints


def test_scaled_training_equals_plain_and_resumes_with_its_scale(tmp_path):
    plain = Toy()
    build(tmp_path / "plain", 10, gradient_clip_val=0.05)[0].fit(plain)
    toy = Toy()
    _, checkpoints = scaled(tmp_path / "scaled", 10, toy, gradient_clip_val=0.05)
    torch.testing.assert_close(toy.weight, plain.weight)
    assert toy.weight.dtype == torch.float32
    saved = torch.load(checkpoints.last_good, weights_only=True)["ScaledPrecision"]
    assert saved["_growth_tracker"] == 10
    resumed, _ = scaled(tmp_path / "scaled", 12, Toy(), checkpoints.last_good)
    assert resumed._get_growth_tracker() == 12


def test_the_scaler_handles_an_infinite_gradient_itself(tmp_path):
    toy = Toy(bad_gradient=3)
    scaler, _ = scaled(tmp_path, 6, toy)
    assert scaler.get_scale() == 2.0**15
    assert toy.weight.isfinite().all()
    with pytest.raises(StoppedError, match="loss is nan"):
        scaled(tmp_path / "nan", 6, Toy(bad_step=3))
