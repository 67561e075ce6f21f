"""A Llama-shaped decoder of Hugging Face's transformers as a pipeline.

    pip install transformers
    torchrun --nproc-per-node 2 examples/pipeline_from_huggingface.py

`decoder_layers` is all that it takes: embedding, blocks, norm and head as a list. An embedding that is tied to the
head is found by itself. Weights keep their values; `engine.module.to_sequential()` gives them back on every rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeropipe
from zeropipe.pipe import PipelineModule

STEPS, ROWS, TIME, MICRO_BATCHES = 3, 2, 16, 4


class DecoderBlock(nn.Module):
    """One decoder layer with what it needs besides activations: rotary embeddings, made where it runs."""

    def __init__(self, block: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.block, self.rotary = block, rotary

    def forward(self, h: Tensor) -> Tensor:  # [batch, time, width]
        positions = torch.arange(h.shape[1], device=h.device)[None]
        out = self.block(h, position_ids=positions, position_embeddings=self.rotary(h, positions))
        return out[0] if isinstance(out, tuple) else out


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a `LlamaForCausalLM` (Mistral, Qwen2 and their like have the same shape)."""
    inner = model.model
    blocks = [DecoderBlock(block, inner.rotary_emb) for block in inner.layers]
    return [inner.embed_tokens, *blocks, inner.norm, model.lm_head]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    zeropipe.init_distributed()
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    tokens = [torch.randint(256, (ROWS, TIME)) for _ in range(MICRO_BATCHES)]
    with torch.no_grad():
        expected = sum(loss_of(model(t).logits, t) for t in tokens) / MICRO_BATCHES

    world = zeropipe.comm.get_world_size()
    pipeline = PipelineModule(decoder_layers(model), num_stages=world, loss_fn=loss_of)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    engine, *_ = zeropipe.initialize(model=pipeline, config=config)
    losses = [engine.train_batch(iter([(t, t) for t in tokens])).item() for _ in range(STEPS)]
    whole = engine.module.to_sequential()
    if zeropipe.comm.get_rank() == 0:
        print(f"the plain model's loss {expected.item():.6f}; the pipeline's {losses}")
        print(f"{sum(p.numel() for p in whole.parameters()):,} parameters in to_sequential()")


if __name__ == "__main__":
    main()
