"""The ordered passes. A pass is a function of its file's name; the runner (fastft/runner.py) does the rest.

Stage 1, on Dynamo's graph (`GraphModule -> list[Match | Miss]`), and on the bodies of checkpoints and regions in it:
"""

from fastft.passes.accumulate_inplace import accumulate_inplace
from fastft.passes.attention import attention
from fastft.passes.dequantize_late import dequantize_late
from fastft.passes.documents import documents
from fastft.passes.float_attributes import float_attributes
from fastft.passes.fp8_compute import fp8_compute
from fastft.passes.linear_cross_entropy import linear_cross_entropy
from fastft.passes.lora_linear import lora_linear
from fastft.passes.lora_mlp import lora_mlp
from fastft.passes.normalize import normalize
from fastft.passes.quant_linear import quant_linear
from fastft.passes.rope import rope
from fastft.passes.rope_tables import rope_tables
from fastft.passes.unread_queries import unread_queries

STAGE_1 = [
    float_attributes,  # with dynamic=True: numbers that modules hold are constants again
    normalize,  # one spelling for each operation
    quant_linear,  # bitsandbytes' 4-bit linears -> linears on fastft::dequantize_4bit
    rope,  # finds rotary embeddings, for the report; Inductor's kernels for them stay
    rope_tables,  # cos and sin computed once a step, not in every kernel that reads them
    attention,  # SDPA or matmul, softmax, matmul with a mask -> fastft::attention
    documents,  # says what does not keep packed documents apart
    unread_queries,  # padded queries that no loss reads are left out of fastft::attention
    lora_linear,  # sibling linears with adapters -> fastft::lora_linear
    linear_cross_entropy,  # lm_head and its loss -> fastft::linear_cross_entropy, logits made when they are read
    fp8_compute,  # with options={"base_compute": "fp8"}: frozen linears -> fastft::fp8_linear, also those of fastft::lora_linear
    lora_mlp,  # gate, up and down with adapters -> fastft::lora_mlp, where kernels add the low-rank terms in passing
]

# Stage 4, on Inductor's forward and backward graph, after its own patterns (`Graph -> int`, the number of changes):
POST_GRAD = [
    accumulate_inplace,  # fastft::accumulate_mm -> accumulate_mm_ where the summand dies there
    dequantize_late,  # each weight is dequantized right before the GEMM that reads it
]

# What `options={"disable": [...]}` may name.
NAMES = tuple(run.__name__ for run in (*STAGE_1, *POST_GRAD))
