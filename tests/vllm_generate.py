"""Print as JSON the tokens that vLLM continues prompts with, greedily: run by vLLM's own Python, without hf_ivon.

python vllm_generate.py MODEL PROMPTS NUM_TOKENS [ADAPTER]     # PROMPTS: token ids as JSON, a list of lists
"""

import json
import sys


def main(model, prompts, num_tokens, adapter=None):
    """Print one line with the tokens."""
    from vllm import LLM, SamplingParams  # here, as the test suite looks into every file
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8,
        gpu_memory_utilization=0.2, enable_lora=adapter is not None, max_lora_rank=16,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=int(num_tokens), ignore_eos=True, detokenize=False)
    request = None if adapter is None else LoRARequest("merged", 1, adapter)
    found = llm.generate([{"prompt_token_ids": p} for p in json.loads(prompts)], greedy, lora_request=request)
    print(json.dumps([list(f.outputs[0].token_ids) for f in found]))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
