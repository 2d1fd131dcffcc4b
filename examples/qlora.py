"""QLoRA: a 4-bit base that is frozen, LoRA adapters that are trained; then the adapters are saved, loaded again in eager mode and checked.

The base is read by transformers with bitsandbytes' NF4 and nested statistics. On a CPU bitsandbytes needs no extra package either.

    python examples/qlora.py --tiny
    python examples/qlora.py --model PATH_OR_NAME --out adapter
"""

import argparse
import os
import tempfile
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: read when torch is imported

import torch  # noqa: E402
from common import batches, blocks, load_4bit, quiet, small_llama, topics, train_tokenizer  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import fastft  # noqa: E402

CPU = dict(vocab=512, hidden=256, layers=4, length=128, batch=8, steps=50)
GPU = dict(vocab=4096, hidden=2048, layers=16, length=1024, batch=4, steps=50)
TINY = dict(vocab=512, hidden=64, layers=1, length=64, batch=4, steps=20)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a saved transformers model; without it, a small Llama with random weights")
    parser.add_argument("--quant", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--backend", default="fastft")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a very small model")
    parser.add_argument("--out", help="where to save the adapter (default: a temporary folder)")
    args = parser.parse_args()
    quiet()
    size = TINY if args.tiny else GPU if DEVICE.type == "cuda" else CPU
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = args.model or f"{scratch}/base", args.out or f"{scratch}/adapter"
        known, text = topics()
        if not args.model:
            tokenizer = train_tokenizer(known, size["vocab"])
            tokenizer.save_pretrained(base)
            small_llama(tokenizer, size["hidden"], size["layers"]).to(DTYPE).save_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        *rows, held_back = blocks(tokenizer, text, size["length"]).split(size["batch"])[:-1]

        torch.manual_seed(0)
        model = load_4bit(base, args.quant, DTYPE, DEVICE)
        plain = sum(p.numel() * DTYPE.itemsize for p in AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE, device_map="meta").parameters())
        print(f"weights: {model.get_memory_footprint() / 2**20:,.1f} MiB with the linears in {args.quant}, {plain / 2**20:,.1f} without")
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).train()
        compiled = torch.compile(model, backend=args.backend)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3 if args.tiny else 1e-3)
        for step, batch in enumerate(batches(torch.cat(rows), size["batch"], args.steps or size["steps"])):
            batch = batch.to(DEVICE)
            loss = compiled(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 5 == 0:
                print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
        rewrites = Counter((row.pass_name, row.op, row.provider) for report in fastft.reports() for row in report.rewrites)
        for (name, op, provider), count in rewrites.items():
            print(f"{count:4d} x {name}: {op} ({provider})")

        model.save_pretrained(adapter)
        # In eager mode. There is no dropout: training mode computes what an evaluation would.
        again = PeftModel.from_pretrained(load_4bit(base, args.quant, DTYPE, DEVICE), adapter).train()
        batch = held_back.to(DEVICE)
        trained, reloaded = (call(input_ids=batch, labels=batch).loss.item() for call in (compiled, again))
        with again.disable_adapter():
            untrained = again(input_ids=batch, labels=batch).loss.item()
        print(f"held-back loss: base {untrained:.4f}, trained {trained:.4f}, adapters loaded again (eager) {reloaded:.4f}")
        if abs(trained - reloaded) > 0.1 * abs(trained - untrained):
            raise SystemExit("the reloaded adapters do not give the trained model's loss")


if __name__ == "__main__":
    main()
