"""The small models and one optimiser step of them: bf16 arithmetic on fp32 masters, rows shared out over the cores."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pretrain_attention  # noqa: F401  registers "blocked_training"
import torch
from pretrain_data import IGNORED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

MUON_LR, ADAM_LR = 4e-3, 2e-3
WAVES = 16
POSITION_LR = 2e-4  # learned positions begin as waves, and are to stay near them while little is known
ITEM = 2048  # tokens of one worker's forward and backward, where the rows are not longer


def build_config(architecture: str, vocab_size: int) -> PreTrainedConfig:
    """The Llama of the tiny base (5.5M parameters, 8,192 positions), or a GPT-2 (3.8M, 2,048 learned positions)."""
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=192,
            n_layer=6,
            n_head=6,
            n_positions=2048,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            dtype="float32",
            **tokens,
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        dtype="float32",
        **tokens,
    )


class Trainer:
    """fp32 masters, a bf16 copy to compute with, and one replica of that copy per core that shares its weights."""

    def __init__(self, architecture: str, vocab_size: int, workers: int, seed: int) -> None:
        torch.manual_seed(seed)
        config = build_config(architecture, vocab_size)
        self.master = AutoModelForCausalLM.from_config(config, attn_implementation="blocked_training")
        with torch.no_grad():  # residual branches start small
            for name, weight in self.master.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_((2 * config.num_hidden_layers) ** -0.5)
            if hasattr(config, "n_positions"):
                self.master.transformer.wpe.weight.copy_(sinusoids(config.n_positions, config.n_embd))
        self.model = copy.deepcopy(self.master).to(torch.bfloat16)
        self.replicas = []
        for _ in range(workers):
            replica = copy.deepcopy(self.model)
            for shared, weight in zip(self.model.parameters(), replica.parameters(), strict=True):
                weight.data = shared.data
            self.replicas.append(replica)
        weights = dict(self.master.named_parameters())
        places = [w for name, w in weights.items() if "wpe" in name]
        tables = {id(m.weight) for m in self.master.modules() if isinstance(m, nn.Embedding)}
        matrices = [w for w in weights.values() if w.ndim == 2 and id(w) not in tables]
        others = [w for name, w in weights.items() if (w.ndim != 2 or id(w) in tables) and "wpe" not in name]
        muon = {"lr": MUON_LR, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        self.muons = [torch.optim.Muon(matrices[i::workers], **muon) for i in range(workers)]
        groups = [{"params": others, "rate": ADAM_LR}, {"params": places, "rate": POSITION_LR}]
        groups = [group for group in groups if group["params"]]
        self.adam = torch.optim.AdamW(groups, lr=ADAM_LR, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, inputs: np.ndarray, targets: np.ndarray, scale: float) -> float:
        """One update; returns the mean loss, nats per learned token."""
        learned = int((targets != IGNORED).sum())
        rows = max(1, ITEM // inputs.shape[1])
        items = [
            (torch.from_numpy(inputs[i : i + rows].copy()), torch.from_numpy(targets[i : i + rows].copy()))
            for i in range(0, len(inputs), rows)
        ]

        def work(replica: PreTrainedModel) -> float:
            total = 0.0
            while items:
                try:
                    x, y = items.pop()
                except IndexError:
                    break
                loss = summed_loss(replica, x, y) / learned
                loss.backward()
                total += float(loss.detach())
                for weight in replica.parameters():
                    weight.total = (
                        weight.grad.float() if weight.total is None else weight.total.add_(weight.grad)
                    )
                    weight.grad = None
            return total

        for replica in self.replicas:
            for weight in replica.parameters():
                weight.total = None
        loss = sum(self.pool.map(work, self.replicas))
        for master, *parts in zip(
            self.master.parameters(), *(r.parameters() for r in self.replicas), strict=True
        ):
            master.grad = sum(part.total for part in parts if part.total is not None)
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * scale
        for muon in self.muons:
            muon.param_groups[0]["lr"] = MUON_LR * scale
        list(self.pool.map(lambda optimizer: optimizer.step(), [*self.muons, self.adam]))
        self.copy_weights()
        return loss

    @torch.no_grad()
    def copy_weights(self) -> None:
        for weight, master in zip(self.model.parameters(), self.master.parameters(), strict=True):
            weight.copy_(master)


def sinusoids(positions: int, size: int) -> Tensor:
    """Positions [positions, size] to begin learning from: as waves, "the token before" is one turn for all of them.

    They take few of the channels, so that the tokens stay apart in the others.
    """
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(WAVES) / WAVES)
    return nn.functional.pad(torch.cat((angles.sin(), angles.cos()), 1) * 0.1, (0, size - 2 * WAVES))


def summed_loss(model: PreTrainedModel, x: Tensor, y: Tensor) -> Tensor:
    """The loss summed over the targets that are not ignored; x, y are [B, L]."""
    hidden = model.base_model(input_ids=x, use_cache=False, **_places(model, x)).last_hidden_state
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.flatten(0, 1).split(ITEM), y.flatten().split(ITEM), strict=True):
        logits = model.lm_head(h).float()
        total = total + nn.functional.cross_entropy(logits, t, ignore_index=IGNORED, reduction="sum")
    return total


def _places(model: PreTrainedModel, x: Tensor) -> dict[str, Tensor]:
    """Where learned positions begin: anywhere that leaves room, so that short rows train all of them."""
    if not hasattr(model.config, "n_positions"):
        return {}
    first = torch.randint(model.config.n_positions - x.shape[1] + 1, (len(x), 1))
    return {"position_ids": first + torch.arange(x.shape[1])}
