"""Gradient-guided decoding with the bundled models: many prompts, results as they finish."""

from nabla_fast import DTOConfig, NablaDecoder
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer

lm = load_language_model(bundled("lm"))  # or the folder of any causal language model
rm = load_reward_model(bundled("rm"))  # and of a sequence classifier with one label
tokenizer = load_tokenizer(bundled("tokenizer"))
decoder = NablaDecoder(lm, rm, tokenizer, config=DTOConfig(max_generations=8))

prompts = ["7 4 10 3 -> 13", "12 8 8 3 -> 44", "9 12 14 11 -> 6"]
with decoder.stream(prompts, seed=0, max_new_tokens=40) as stream:
    for index, result in stream:
        print(f"{prompts[index]}: {result.text}  (reward {result.reward:.1f})")
        for revision in result.revisions:
            old, new = (tokenizer.decode([token]) for token in (revision.old_token, revision.new_token))
            print(f"    token {revision.position}, {old!r} to {new!r}: {revision.reason}")
