"""LoRA fine-tuning in a loop of one's own. All that fastft needs is the line with torch.compile.

python examples/plain_loop.py --tiny
python examples/plain_loop.py --model PATH_OR_NAME --out adapter
"""

import argparse

import torch
from common import batches, blocks, quiet, small_llama, topics, train_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a saved transformers model; without it, a small Llama with random weights")
parser.add_argument("--backend", default="fastft")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--tiny", action="store_true", help="5 steps of a very small model")
parser.add_argument("--out", help="where to save the adapter")
args = parser.parse_args()
quiet()
steps, hidden, layers, length, batch_size = (5, 64, 2, 64, 2) if args.tiny else (args.steps, 256, 4, 128, 8)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
known, text = topics()
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    rows = torch.tensor(tokenizer("\n\n".join(text)).input_ids)
    rows = rows[: len(rows) // length * length].view(-1, length)
else:
    tokenizer = train_tokenizer(known, 512)
    model = small_llama(tokenizer, hidden, layers).to(dtype)
    rows = blocks(tokenizer, text, length)

torch.manual_seed(0)
model = get_peft_model(model.to(device), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()
model.train()
compiled = torch.compile(model, backend=args.backend)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

for step, batch in enumerate(batches(rows, batch_size, steps)):
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = compiled(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)

if args.out:
    model.save_pretrained(args.out)  # `model` is the peft model itself: torch.compile left it as it was
