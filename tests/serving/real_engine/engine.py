"""Runs a model in vLLM, each in a process of its own, and compares its greedy tokens with those that are expected."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path
from typing import Any

TOKENS = 24
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def serve(
    folder: Path, kind: str, expected: dict[str, Any], *, times: int = 1, adapter: str = "", **options: Any
) -> str:
    """Runs one model in vLLM; says for how many prompts its tokens are those expected, or what it stopped at.

    Args:
        folder: Where `families` has made the model.
        kind: ``packed`` or ``float``.
        expected: ``prompts``, and the tokens and leads of each kind: `families.greedy`.
        times: How often the prompts are sent; only the last answer counts.
        adapter: Folder of a LoRA adapter.
        options: Of vLLM's engine.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    settings |= {"max_model_len": 64, "gpu_memory_utilization": 0.2, "seed": 0, "max_num_batched_tokens": 64}
    try:
        engine = LLM(str(folder / kind), **settings | options)
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=2)
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in expected["prompts"]]
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        for _ in range(times):
            answers = engine.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    except Exception as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(last.filename).name}: " + re.sub(r"\s+", " ", str(error))
    return compared([one.outputs[0] for one in answers], **expected[kind])


def leads_of(answer: Any) -> list[float]:
    """By how much the best token beat the second best, token by token."""
    best = (sorted((one.logprob for one in step.values()), reverse=True)[:2] for step in answer.logprobs)
    return [first - second for first, second in best]


def compared(answers: list[Any], tokens: list[list[int]], leads: list[list[float]]) -> str:
    """For how many prompts tokens are equal, and how far leads are from transformers' until tokens part."""
    equal, furthest = 0, 0.0
    for answer, other, lead in zip(answers, tokens, leads, strict=True):
        found = list(answer.token_ids)
        same = next((place for place in range(TOKENS) if found[place] != other[place]), TOKENS)
        equal += same == TOKENS
        apart = (abs(one - two) for one, two in zip(leads_of(answer)[:same], lead[:same], strict=True))
        furthest = max(furthest, *apart, 0.0)
    return f"{equal} of {len(tokens)}, {furthest:.0e}"


def in_a_child(*arguments: Any, **options: Any) -> str:
    """`serve` in a forked process, which shares what was imported and has an engine of its own."""
    os.environ |= ENVIRONMENT
    from vllm.model_executor.models import registry  # with all that is imported here, once for all children

    registry._run_in_subprocess = lambda function: function()  # looks a class up; this is a process of its own already
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer = serve(*arguments, **options)
        os.write(writing, answer.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer or "the process died"
