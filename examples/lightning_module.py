"""Lightning: attach in `configure_optimizers`. Averages need theta in place before the callback reads the weights."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.nn.functional import mse_loss

from xgrad_optim import XAdamW


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def training_step(self, batch, _):
        return mse_loss(self.net(batch[0]), batch[1])  # at theta_hat

    def validation_step(self, batch, _):
        self.log("val_loss", mse_loss(self.net(batch[0]), batch[1]))  # at theta

    def on_validation_epoch_end(self):
        print("loss", self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self):
        optimizer = XAdamW(self.parameters(), lr=1e-2)
        optimizer.attach(self)
        return optimizer


class TrueEMAWeightAveraging(EMAWeightAveraging):
    """Averages theta, and exchanges the averages with theta around validation."""

    def on_train_batch_end(self, trainer, *args):
        self.put_true_weights(trainer)
        super().on_train_batch_end(trainer, *args)

    def on_validation_epoch_start(self, trainer, *args):
        self.put_true_weights(trainer)
        super().on_validation_epoch_start(trainer, *args)

    def on_train_end(self, trainer, *args):
        self.put_true_weights(trainer)
        super().on_train_end(trainer, *args)

    def put_true_weights(self, trainer):
        for optimizer in trainer.optimizers:
            optimizer.eval()


torch.manual_seed(0)
x = torch.randn(64, 8)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
quiet = {"default_root_dir": "output", "logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}

trainer = Trainer(max_epochs=3, gradient_clip_val=1.0, **quiet)
trainer.fit(Regression(), data, data)
trainer.save_checkpoint("output/final.ckpt")  # theta

trainer = Trainer(max_epochs=3, callbacks=[TrueEMAWeightAveraging(decay=0.9)], **quiet)
trainer.fit(Regression(), data, data)
