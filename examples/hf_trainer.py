"""LoRA fine-tuning with transformers' Trainer, then the saved adapter is loaded again and checked.

`model.compile(backend="fastft")` compiles in place: the object keeps its class, so Trainer, peft and save_pretrained
see the model that they know. Do not use TrainingArguments(torch_compile_backend="fastft"): accelerate takes
built-in backends only.

    python examples/hf_trainer.py --tiny
    python examples/hf_trainer.py --model PATH_OR_NAME --out adapter
"""

import argparse
import tempfile

import torch
from common import blocks, quiet, small_llama, topics, train_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a saved transformers model; without it, a small Llama with random weights")
    parser.add_argument("--backend", default="fastft")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="20 steps of a very small model")
    parser.add_argument("--out", help="where to save the adapter (default: a temporary folder)")
    args = parser.parse_args()
    quiet()
    steps, hidden, layers, length, batch_size = (20, 64, 2, 64, 4) if args.tiny else (args.steps, 256, 4, 128, 8)
    with tempfile.TemporaryDirectory() as scratch:
        base = args.model or f"{scratch}/base"
        cuda = torch.cuda.is_available()
        known, text = topics()
        if not args.model:
            tokenizer = train_tokenizer(known, 512)
            tokenizer.save_pretrained(base)
            small_llama(tokenizer, hidden, layers).save_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        rows = blocks(tokenizer, text, length)
        data = [{"input_ids": row, "labels": row} for row in rows]
        train, held_back = data[batch_size:], data[:batch_size]

        def load():
            return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if cuda else torch.float32)

        torch.manual_seed(0)
        model = get_peft_model(load(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.compile(backend=args.backend)  # before the Trainer
        settings = TrainingArguments(
            output_dir=f"{scratch}/trainer",
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=5e-3 if args.tiny else 1e-3,
            lr_scheduler_type="constant",
            bf16=cuda,
            logging_steps=5,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            dataloader_drop_last=True,  # one shape, one compilation
        )
        Trainer(model=model, args=settings, train_dataset=train).train()

        adapter = args.out or f"{scratch}/adapter"
        model.save_pretrained(adapter)

        def loss(model) -> float:
            batch = torch.stack([row["input_ids"] for row in held_back]).to(model.device)
            with torch.no_grad():
                return model.eval()(input_ids=batch, labels=batch).loss.item()

        again = PeftModel.from_pretrained(load(), adapter).to(model.device)  # plain eager
        untrained, trained, reloaded = loss(load().to(model.device)), loss(model), loss(again)
        print(f"held-back loss: base {untrained:.4f}, trained {trained:.4f}, saved and loaded again (eager) {reloaded:.4f}")
        if abs(trained - reloaded) > 0.1 * abs(trained - untrained):
            raise SystemExit("the reloaded adapter does not give the trained model's loss")


if __name__ == "__main__":
    main()
