"""The decoder inside transformers' ``generate``. Run: python examples/inside_generate.py"""

from nabla_fast import DTOConfig, NablaDecoder
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer


def main() -> None:
    lm, rm = load_language_model(bundled("lm")), load_reward_model(bundled("rm"))
    tokenizer = load_tokenizer(bundled("tokenizer"))
    decoder = NablaDecoder(lm, rm, tokenizer, config=DTOConfig(max_generations=8))
    chat = [{"role": "user", "content": "7 4 10 3 -> 13"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = inputs["input_ids"].shape[1]
    plain = lm.generate(**inputs, max_new_tokens=40, do_sample=False)
    output = lm.generate(
        **inputs, custom_generate=decoder, max_new_tokens=40, seed=0, return_dict_in_generate=True
    )
    print("generate:", tokenizer.decode(plain[0, prompt:], skip_special_tokens=True))
    print("decoder: ", tokenizer.decode(output.sequences[0, prompt:], skip_special_tokens=True))
    print(f"reward {output.rewards[0]:.2f}, {len(output.results[0].revisions)} revisions")


if __name__ == "__main__":
    main()
