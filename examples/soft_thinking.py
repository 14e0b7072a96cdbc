"""Soft Thinking: a few steps read mixtures of likely tokens in place of tokens, then the answer is greedy.

Source: Zhang et al., Soft Thinking, arXiv:2505.15778. Run: python examples/soft_thinking.py
"""

import torch

from nabla_fast import ops
from nabla_fast.checkpoints import bundled, load_language_model, load_tokenizer

TOP_K, THOUGHTS, MOST = 8, 4, 40


@torch.no_grad()
def soft_thinking(lm: torch.nn.Module, ids: torch.Tensor) -> list[int]:
    """Tokens of a greedy answer after some soft steps.

    Args:
        ids: [1, S] int64, the prompt.
    """
    table, end = lm.get_input_embeddings().weight.detach(), lm.generation_config.eos_token_id
    output = lm(ids, use_cache=True)
    for _ in range(THOUGHTS):
        logits = output.logits[:, -1]
        if ops.token_stats(logits).entropy.item() < 0.1:  # it is sure: thinking ends
            break
        likely = logits.topk(TOP_K)
        masked = torch.full_like(logits, -torch.inf).scatter(1, likely.indices, likely.values)
        (thought,) = ops.embedding_mix(masked, [table], hard=False)  # [1, H]
        output = lm(inputs_embeds=thought[:, None], past_key_values=output.past_key_values)
    tokens: list[int] = []
    while len(tokens) < MOST:
        token = output.logits[:, -1].argmax(dim=-1)
        if token.item() == end:
            break
        tokens.append(int(token))
        output = lm(token[:, None], past_key_values=output.past_key_values)
    return tokens


def main() -> None:
    lm, tokenizer = load_language_model(bundled("lm")), load_tokenizer(bundled("tokenizer"))
    chat = [{"role": "user", "content": "7 4 10 3 -> 13"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    print(tokenizer.decode(soft_thinking(lm, ids["input_ids"])))


if __name__ == "__main__":
    main()
