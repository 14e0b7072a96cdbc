"""The decode loop of the method written a second time, as plainly as possible.

No cache, no gradient kept, no small tensors: autograd over [L, V], a forward+backward of both models
over the whole sequence at every step, rollouts by transformers' ``generate`` with the global
generator seeded. It shares no code with the package and takes its models, config and problem only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass
class Naive:
    """Result of the loop, and the counts of what it used."""

    tokens: list[int] = field(default_factory=list)  # with an EOS where it ended in one
    generations: int = 0
    rejections: int = 0
    skipped: int = 0  # positions passed over by the selectors
    drawn: int = 0  # tokens of all rollouts
    descents: int = 0
    gradients: int = 0  # what those need: one at the start, one after each move of a hard token; soft: K
    # (position, old token, new token, accepted), and (proposed, current)
    proposals: list[tuple[int, int, int, bool]] = field(default_factory=list)
    rewards: list[tuple[float, float]] = field(default_factory=list)


class _InFloat64:
    """A logits processor: ``generate`` rounds logits to float32, which would draw by other numbers."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.double()


class _Over(StoppingCriteria):
    """Stops ``generate`` where the response holds a stop string."""

    def __init__(self, loop: NaiveLoop):
        self.loop = loop

    def __call__(self, ids: Tensor, scores: Tensor, **_) -> Tensor:
        response = ids[0, len(self.loop.prompt) :].tolist()
        return torch.tensor([self.loop.over(response)])


class NaiveLoop:
    """One problem, decoded by :meth:`decode`.

    Args:
        lm, rm: transformers models in float64; ``rm`` may be None.
        config: a DTOConfig.
        prompt: the LM's token ids.
        reward_prefix, reward_suffix: the reward model's own ids around a response.
        token_map: [V] the reward model's id of each token of the LM; None where they are the same.
        tokenizer: decodes responses where there are stop strings.
        logits: of hidden states; None where they are the head's alone.
    """

    def __init__(
        self,
        lm,
        rm,
        config,
        prompt,
        reward_prefix=(),
        reward_suffix=(),
        *,
        seed=0,
        max_new_tokens=8,
        eos=(0,),
        stop=(),
        tokenizer=None,
        token_map=None,
        logits=None,
    ):
        self.lm, self.rm, self.config = lm, rm, config
        self.prompt, self.seed, self.max_new_tokens = list(prompt), seed, max_new_tokens
        self.reward_prefix, self.reward_suffix = list(reward_prefix), list(reward_suffix)
        self.eos, self.stop, self.tokenizer = set(eos), stop, tokenizer
        self.lm_table = _table(lm)
        self.logits = logits or lm.get_output_embeddings()
        if rm is not None:
            self.own_rm_table = _table(rm)
            self.token_map = torch.arange(len(self.own_rm_table)) if token_map is None else token_map
            self.rm_table = self.own_rm_table[self.token_map]

    def decode(self) -> Naive:
        config, result = self.config, Naive()
        self.result, committed = result, result.tokens
        rollout = self.rollout(committed, self.seed)
        result.generations = 1
        while rollout and result.generations < config.max_generations:
            selected = self.first_selected(committed, rollout)
            if selected is None:
                break
            result.skipped += selected
            committed += rollout[:selected]
            rollout = rollout[selected:]
            position, seed = len(committed), self.seed + len(committed)
            old = rollout[0]
            new = self.resample(committed, rollout, torch.Generator().manual_seed(seed))
            accepted = False
            if new != old:
                proposal = [] if self.over([*committed, new]) else self.rollout([*committed, new], seed)
                result.generations += 1
                accepted = True
                if config.rejection and self.rm is not None:
                    pair = self.reward([*committed, new, *proposal]), self.reward(committed + rollout)
                    result.rewards.append(pair)
                    accepted = pair[0] > pair[1]
                result.rejections += not accepted
                result.proposals.append((position, old, new, accepted))
            if accepted:
                committed.append(new)
                rollout = proposal
            else:
                committed.append(old)
                rollout = rollout[1:]
            if self.over(committed):
                rollout = []
        committed += rollout
        return result

    def over(self, response: list[int]) -> bool:
        """Whether the response ends with its last token."""
        if response and response[-1] in self.eos:
            return True
        if self.stop:
            text = self.tokenizer.decode(response, skip_special_tokens=True)
            if any(string in text for string in self.stop):
                return True
        return len(response) >= self.max_new_tokens

    @torch.no_grad()
    def rollout(self, response: list[int], seed: int) -> list[int]:
        """Tokens that continue a response, by transformers' own sampler."""
        sampling = self.config.rollout_sampling
        ids = torch.tensor([self.prompt + response])
        how = {"do_sample": False}
        if sampling.temperature > 0:
            how = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        torch.manual_seed(seed)
        output = self.lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens - len(response),
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=0,
            use_cache=False,
            logits_processor=LogitsProcessorList([_InFloat64()]),
            stopping_criteria=StoppingCriteriaList([_Over(self)]),
            **how,
        )
        self.result.drawn += output.shape[1] - ids.shape[1]
        return output[0, ids.shape[1] :].tolist()

    @torch.no_grad()
    def states(self, committed: list[int], rollout: list[int]) -> Tensor:
        """Hidden states [L, H] over the sampled tokens, which predict them."""
        start = len(self.prompt) + len(committed)
        ids = torch.tensor([self.prompt + committed + rollout])
        states = self.lm(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        return states[0, start - 1 : -1]

    def noise(self, committed: list[int], rollout: list[int]) -> Tensor:
        """Gumbel noise of the rollout's positions, [L, V]."""
        start = len(self.prompt) + len(committed)
        rows = [gumbel(self.seed, start + i, len(self.lm_table)) for i in range(len(rollout))]
        return torch.tensor(rows, dtype=torch.float64)

    def relaxed(self, z: Tensor, noise: Tensor) -> Tensor:
        """y [L, V], differentiable in z."""
        if self.config.relaxation == "soft":
            return torch.softmax(z / self.config.tau, dim=-1)
        if self.config.relaxation == "gumbel":
            z = z + self.config.gumbel_scale * noise
        soft = torch.softmax(z / self.config.tau, dim=-1)
        hard = torch.nn.functional.one_hot(z.argmax(dim=-1), z.shape[1])
        return hard + (soft - soft.detach())

    def loss(self, committed: list[int], y: Tensor) -> Tensor:
        """−[ν log-likelihood + λ reward] of the relaxed tokens y [L, V]."""
        prefix = torch.tensor(self.prompt + committed)
        read = torch.cat([self.lm_table[prefix], y @ self.lm_table])
        logits = self.lm(inputs_embeds=read[None], use_cache=False).logits[0, len(prefix) - 1 : -1]
        loss = -self.config.nll_coeff * (y * torch.log_softmax(logits, dim=-1)).sum()
        if self.rm is not None:
            before = self.own_rm_table[self.reward_prefix + self.token_map[committed].tolist()]
            after = self.own_rm_table[self.reward_suffix]
            sequence = torch.cat([before, y @ self.rm_table, after])
            loss = loss - self.config.reward_coeff * self.rm(inputs_embeds=sequence[None]).logits[0, 0]
        return loss

    def onehot_grad(self, committed: list[int], y: Tensor) -> Tensor:
        """G [L, V] at y."""
        y = y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(committed, y), y)
        return gradient

    def first_selected(self, committed: list[int], rollout: list[int]) -> int | None:
        config = self.config
        z = self.logits(self.states(committed, rollout)).detach()
        p = torch.softmax(z, dim=-1)
        entropy = -(p * p.log()).sum(dim=-1)
        norm = torch.zeros(len(rollout))
        if config.grad_threshold is not None:
            y = self.relaxed(z, self.noise(committed, rollout))
            norm = self.onehot_grad(committed, y).norm(dim=-1)
        for i in range(len(rollout)):
            if config.confidence_threshold is not None and p[i].max() > config.confidence_threshold:
                continue
            if config.entropy_threshold is not None and entropy[i] < config.entropy_threshold:
                continue
            if config.grad_threshold is not None and norm[i] < config.grad_threshold:
                continue
            return i
        return None

    def resample(self, committed: list[int], rollout: list[int], generator: torch.Generator) -> int:
        """The first position's token after K Adam steps."""
        config = self.config
        latents, soft = config.parameter == "latents", config.relaxation == "soft"
        states = self.states(committed, rollout)
        z = self.logits(states).detach()
        noise = self.noise(committed, rollout)
        count = 1 if config.update == "first" and not config.weight_decay else len(rollout)
        theta = (states if latents else z)[:count].clone().requires_grad_()
        adam = torch.optim.Adam([theta], betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay)
        self.result.descents += 1
        last = None
        for k in range(config.iters):
            adam.param_groups[0]["lr"] = self.learning_rate(k)
            moved = self.logits(theta) if latents else theta
            y = self.relaxed(torch.cat([moved, z[count:]]), noise)
            self.result.gradients += soft or last is None or not torch.equal(y, last)
            last = y.detach()
            (theta.grad,) = torch.autograd.grad(self.loss(committed, y), theta)
            if config.update == "first":
                theta.grad[1:] = 0  # which weight decay comes on top of
            adam.step()
        first = theta[:1].detach()
        return self.sample(self.logits(first).detach() if latents else first, generator)

    def learning_rate(self, k: int) -> float:
        config = self.config
        if k < config.warmup_steps:
            return config.lr * k / config.warmup_steps
        progress = (k - config.warmup_steps) / (config.iters - config.warmup_steps)
        shares = {
            "cosine": max(config.min_lr_ratio, 0.5 * (1 + math.cos(math.pi * progress))),
            "linear": max(config.min_lr_ratio, 1 - progress),
            "constant": 1.0,
        }
        return config.lr * shares[config.schedule]

    def sample(self, scores: Tensor, generator: torch.Generator) -> int:
        """A token of scores [1, V] through transformers' own filters."""
        sampling = self.config.resample_sampling
        if sampling.temperature > 0:
            scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
        if sampling.top_k > 0:
            scores = TopKLogitsWarper(sampling.top_k)(None, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(None, scores)
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator))

    @torch.no_grad()
    def reward(self, response: list[int]) -> float:
        ids = self.reward_prefix + self.token_map[response].tolist() + self.reward_suffix
        mask = torch.ones(1, len(ids), dtype=torch.int64)
        return float(self.rm(torch.tensor([ids]), attention_mask=mask).logits[0, 0])


def _table(model) -> Tensor:
    """Embeddings that a model reads for each of its tokens, [V, H]."""
    embeddings = model.get_input_embeddings()
    return embeddings(torch.arange(embeddings.weight.shape[0])).detach()


def gumbel(seed: int, position: int, vocabulary: int) -> list[float]:
    """−log(−log u) of one row; u from Philox-4x32-10 keyed by seed, position and token."""
    low = 0xFFFFFFFF
    noise: list[float] = []
    for block in range((vocabulary + 3) // 4):
        c = [block, position & low, position >> 32, 0]
        k = [seed & low, seed >> 32]
        for _ in range(10):
            left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(right >> 32) ^ c[1] ^ k[0], right & low, (left >> 32) ^ c[3] ^ k[1], left & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        noise += [-math.log(-math.log(((word >> 9) + 0.5) / 2**23)) for word in c]
    return noise[:vocabulary]
