"""A sparse GPT-2 in the Trainer of Transformers, saved, loaded again and asked for text.

python examples/transformers_trainer.py --steps 300 --folder sparse-gpt2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from text import batch, standard_library
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import sparsekern as sk
from sparsekern.integrations.transformers import SparseCallback, model_card

CONTEXT = 128


def main(steps: int = 300, width: int = 256, depth: int = 4, folder: str = "sparse-gpt2") -> str:
    """Train, save, load and write; return the text that the loaded model wrote."""
    text, _ = standard_library()
    rows = [{"input_ids": row, "labels": row} for row in batch(text, CONTEXT, 16 * steps, seed=0)]
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": depth, "n_head": width // 64, "n_positions": 4 * CONTEXT, "vocab_size": 256}
    options = {"activation_function": "gelu_pytorch_tanh", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **options, bos_token_id=10, eos_token_id=0, pad_token_id=0))
    sk.sparsify_(model, {"*.mlp.*": 0.9, "*": 0.7}, block_size=16)  # the log says that the tied head stays dense
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            logging_steps=max(1, steps // 10),
            report_to="none",
        ),
        train_dataset=rows,
        callbacks=[SparseCallback("rigl", update_every=max(1, steps // 20))],
    )
    trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on where it was stopped, to the bit
    trainer.save_model(folder)
    Path(folder, "README.md").write_text(model_card(model, folder))  # the folder is ready for push_to_hub
    again = AutoModelForCausalLM.from_pretrained(folder)  # sparse, with the blocks where they were
    prompt = torch.tensor([list(b"def ")], device=again.device)
    answer = again.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=CONTEXT, do_sample=True)
    written = bytes(answer[0].tolist()).decode(errors="replace")
    print(written)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", default="sparse-gpt2")
    main(**vars(parser.parse_args()))
