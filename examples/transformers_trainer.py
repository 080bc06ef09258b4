"""transformers.Trainer: attach, and pass the optimizer with its scheduler."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from xgrad_optim import XAdamW

torch.manual_seed(0)
tokens = (torch.arange(16) + torch.randint(64, (64, 1))) % 64
data = [{"input_ids": row, "labels": row} for row in tokens]
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)

optimizer = XAdamW(model.parameters(), lr=1e-2)
optimizer.attach(model)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)

trainer = Trainer(
    model,
    TrainingArguments("output", max_steps=12, eval_strategy="steps", eval_steps=4, save_steps=4, report_to=[]),
    train_dataset=data[:48],
    eval_dataset=data[48:],
    optimizers=(optimizer, scheduler),
)
print("loss", trainer.evaluate()["eval_loss"])
trainer.train()
print("loss", trainer.evaluate()["eval_loss"])  # at theta
trainer.save_model("output/final")  # theta
trainer.train(resume_from_checkpoint="output/checkpoint-8")
