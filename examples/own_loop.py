"""A decode loop of one's own around the ops, with transformers models as they are.

A greedy answer is walked along. Where the language model is unsure, the logits of the position descend on
the gradient of a reward until another token leads; the answer that goes on from there is kept if the reward
model likes it better. It is a loop to start from, not the one that NablaDecoder runs.
"""

import torch

from nabla_fast import ops
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer

lm, rm = load_language_model(bundled("lm")), load_reward_model(bundled("rm"))
tokenizer = load_tokenizer(bundled("tokenizer"))
lm_head = lm.get_output_embeddings().weight.detach()  # [V, H]
rm_table = rm.get_input_embeddings().weight.detach()  # [V, H_r], the same vocabulary
SCHEDULE = ops.cosine_schedule(20, 0.5)  # learning rates of 20 steps


@torch.no_grad()
def roll_out(ids: list[int]) -> list[int]:
    """The ids with the greedy answer that follows them."""
    start = torch.tensor([ids])
    whole = lm.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=40, do_sample=False)
    return whole[0].tolist()


def reward(ids: list[int]) -> tuple[float, torch.Tensor]:
    """The reward of a sequence, and minus its gradient [T, H_r] with respect to the embeddings."""
    embeddings = rm_table[ids].requires_grad_()  # [T, H_r]
    last = rm.base_model(inputs_embeds=embeddings[None]).last_hidden_state[0, -1]
    score = rm.score(last).sum()
    (gradient,) = torch.autograd.grad(-score, embeddings)
    return score.item(), gradient


@torch.no_grad()
def hidden_states(ids: list[int], start: int) -> torch.Tensor:
    """The final hidden states [L, H] that predict the ids from `start` on."""
    return lm.base_model(torch.tensor([ids])).last_hidden_state[0, start - 1 : -1]


def decode(text: str) -> None:
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = roll_out(prompt)
    best, cotangent = reward(ids)
    print(f"{text}: {tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)}  reward {best:.1f}")
    position = len(prompt)
    while position < len(ids) - 1:
        hidden = hidden_states(ids, position)
        unsure = ops.token_stats(hidden, lm_head).confidence < 0.9
        if not unsure.any():
            return
        position += int(unsure.nonzero()[0])
        row = hidden[unsure][:1]  # [1, H]
        z = ops.lm_logits(row, lm_head)  # [1, V]
        grad = ops.onehot_grad([cotangent[position][None]], [rm_table], row, lm_head, nll_coeff=1e-3)
        descent = ops.dto_descent(z, grad, ops.AdamState.zeros(z), SCHEDULE)
        if descent.flipped:
            proposal = roll_out([*ids[:position], int(descent.token)])
            score, gradient = reward(proposal)
            if score > best:
                ids, best, cotangent = proposal, score, gradient
                answer = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
                print(f"    token {position - len(prompt)} changed: {answer}  reward {best:.1f}")
        position += 1


for problem in ("7 4 10 3 -> 13", "14 9 2 -> 19", "16 10 6 -> 76", "17 3 1 -> 50"):
    decode(problem)
